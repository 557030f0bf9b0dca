"""Models in other programs' forms: one table of names each."""
