"""The next trial of a study: listed, drawn at random, or chosen by Optuna."""
