"""The network in 8-bit integers: what training for quantisation trains, and what the int8 file computes."""
