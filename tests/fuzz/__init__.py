"""Fuzzing of every file format that is read: `python -m tests.fuzz --rounds 20000` runs longer."""
