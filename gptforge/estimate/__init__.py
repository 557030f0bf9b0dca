"""Parameters, FLOPs and memory of a configuration, computed without torch."""
