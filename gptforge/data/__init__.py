"""From a text to the batches of a run."""
