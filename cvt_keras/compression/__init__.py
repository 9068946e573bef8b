"""Smaller networks by the parts of tensorflow-model-optimization that work on Keras 3: pruning, clustering, quantisation."""
