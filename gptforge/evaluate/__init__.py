"""Evaluation: validation loss, and zero-shot tasks."""
