"""The 8-bit network: the form that training for quantisation trains, and that the int8 file computes."""
