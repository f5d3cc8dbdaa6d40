"""Structured pruning beside onnxsim's at equal multiply-accumulates, without fine-tuning, on models with tasks.

    python -m benchmarks.pruning --zoo DIR [--models DIR] [NAME ...] [--part PART ...] [--onnxsim PYTHON]

`__main__` tells the parts and options. Every recipe runs in a process of its own, with a limit on time and memory; one
that fails says so in its place, and the rest goes on.
"""
