"""What a run tells: summary, step lines, log, metrics, curves, verdict."""
