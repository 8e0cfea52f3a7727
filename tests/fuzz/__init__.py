"""Calls of everything public with what nobody would expect: no crash, no garbage, no other error.

`draw` makes arguments, `judge` says what a right result is, `surface` has one program of calls for
each public name, and `python -m fuzz` (in the folder tests/) runs any number of them, in processes
that may die.
"""
