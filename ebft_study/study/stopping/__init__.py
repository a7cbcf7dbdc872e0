"""Early stopping: rules for single trials, schedulers that compare trials, and the replay of finished studies."""
