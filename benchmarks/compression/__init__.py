"""Fewer bytes and fewer multiplications: what each pass of compression makes of a model, beside others."""
