"""The only package that turns a Config, or a saved run, into objects."""
