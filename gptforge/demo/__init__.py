"""The web page: generate text with a run's model, and watch its training."""
