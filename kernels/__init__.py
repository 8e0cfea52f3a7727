"""The compiled part: see README.md beside this file. Imported by fastattn at the first call."""
