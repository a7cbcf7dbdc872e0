"""Studies: a file that states a question, the trials that answer it, and the driver that runs them with Ray."""
