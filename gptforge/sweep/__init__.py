"""Hyperparameter search: many training runs on one machine, compared on a second split."""
