"""Checkpoints that are complete or absent, and the run folders that hold them."""
