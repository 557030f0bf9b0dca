"""Prepare text: files of any kind and size into token shards."""
