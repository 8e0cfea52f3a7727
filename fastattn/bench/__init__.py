"""Measures fastattn against its peers and against what the machine can do.

`fastattn bench` runs it, and so does `make bench` in the repository.
"""
