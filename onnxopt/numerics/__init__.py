"""Number formats and the arithmetic behind them, in plain numpy.

- `affine`: scales, zero-points and codes of 8-bit integers, bias quantization, SQNR;
- `saturation`: the 16-bit pair sums of x86 integer kernels, and scales that keep them in range.
"""
