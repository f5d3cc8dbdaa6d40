"""Weights that share values: which tensors get codebooks, how large, and which entry stands for which weight."""
