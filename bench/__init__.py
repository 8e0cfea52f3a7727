"""Measures fastattn against its peers and against what the machine can do."""

from .machine import limit_threads

# Before anything imports NumPy: its BLAS asks for the number of threads only then.
limit_threads()
