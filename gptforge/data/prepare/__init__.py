"""Prepare training data: encode text files of any size into token shards."""
