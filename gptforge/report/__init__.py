"""What a run reports: model summary, step lines, log files, metrics, curves and verdict."""
