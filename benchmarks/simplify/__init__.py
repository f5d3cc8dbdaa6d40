"""Exact clean-up beside other simplifiers: what is left, whether it is right, and how long it takes."""
