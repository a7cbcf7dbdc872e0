"""The content of a study file, and the configurations and trials that follow from it."""
