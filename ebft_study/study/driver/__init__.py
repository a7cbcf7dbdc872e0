"""Running a study with Ray Tune and Ray Train: runner, session, hooks, trials, monitor, services."""
