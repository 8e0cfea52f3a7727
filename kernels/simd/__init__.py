"""The vocabulary of the kernels: tiles of vector registers. The only folder that speaks LLVM.

A ``Tile`` is a value of ``rows x cols`` vector registers, each ``lanes`` elements
wide, as an SSA value: a local variable that holds one costs no memory. Its shape
is part of its type, so a function that is given one tile knows the shape of the
others it needs (``like`` in the signatures), and Numba compiles each function once
for each shape.

Pointers are Numba's ``CPointer(element)``. Steps between rows of the caller's
memory are in bytes, as NumPy counts them; steps in scratch memory in elements.

| module | what it has |
|---|---|
| `tile` | the type, and the pieces of LLVM that every word is made of |
| `pointers` | addresses, records, prefetching, tickets that threads draw |
| `registers` | making, loading and storing tiles |
| `arithmetic` | lane by lane, over rows and over lanes; bits of words |
| `functions` | exp and tanh |
| `products` | between lanes and rows: outer products, sums of lanes, transposition |
| `formats` | elements as callers store them |
| `scalars` | scalar code that others wrote, over lanes |
"""

# The operators of tiles exist once this has been imported.
from . import arithmetic as arithmetic
