"""Our own GPU kernels, each beside a plain torch reference; only what measured faster is here."""
