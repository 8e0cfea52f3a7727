"""How good the numbers are: what `test_numerics.py` asks of a sample, asked of everything.

`python -m numerics` (in the folder tests/) measures, and prints the table of the documentation.
"""
