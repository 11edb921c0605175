"""Other best-of-N projects, each run in its own virtual environment, which is created at the first measurement."""
