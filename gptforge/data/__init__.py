"""The data path: from text files to the batches of a run."""
