"""Commands with more to say than a few lines: what each takes, and what it does."""
