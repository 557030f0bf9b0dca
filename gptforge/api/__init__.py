"""Training from Python: what `gptforge.train` and `gptforge.Run` do beyond the command line."""
