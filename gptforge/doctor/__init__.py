"""Checks of the machine and of data, before time is spent on either."""
