"""How fast a configuration trains here, and where the time goes; beside others in the same run."""
