"""Mutated files of every format that is read: each is refused in words or it works.

`python -m tests.fuzz --rounds 20000` runs as many rounds a format as you like.
"""
