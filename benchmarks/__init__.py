"""Side-by-side runs against the tools users know. Each module is one command: python -m benchmarks.NAME."""
