"""Our own ways to compute, each beside a plain reference; only what measured faster is here."""
