"""Zeroing single weights: which tensors may lose some, and how those that stay make good for it."""
