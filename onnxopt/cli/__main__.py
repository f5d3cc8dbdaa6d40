"""`python -m onnxopt.cli`."""

from onnxopt.cli import main

main()
