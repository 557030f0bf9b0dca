"""Backends, which compute the loss and the gradients of one micro-batch at a time."""
