"""Reads published weights, without a model: files and hub -> state dict, config -> variant, weight maps, `Checkpoint`."""
