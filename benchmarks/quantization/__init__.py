"""Quantizing passes beside other tools: accuracy, size, latency, and what they promise of their results.

    python -m benchmarks.quantization --zoo DIR [--models DIR] [NAME ...] [--only PART ...] [--ours PASSES]

`__main__` tells the parts and options. Every recipe runs in a process of its own, with a limit on time and memory; one
that fails says so in its place, and the rest goes on.
"""
