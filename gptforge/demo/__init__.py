"""The web page: writing with a run's model, and watching it learn."""
