"""The idea: a network's linear parts as maps, folded into one convolution each, and the proof that nothing changed."""
