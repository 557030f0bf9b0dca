"""Judging a model on text it has not learned from."""
