"""Published weights below the model: files and hub -> state dict, config -> variant, weight maps, `Checkpoint`."""
