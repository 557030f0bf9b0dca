"""What this machine can do, and what is wrong with data, before time is spent on either."""
