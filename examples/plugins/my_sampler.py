"""A sampler: Optuna's TPE with axes that depend on each other, and fewer random configurations to begin with.

A class of Optuna's needs no function: `sampler: optuna.samplers:NSGAIIISampler`.
"""

from optuna.samplers import BaseSampler, TPESampler


def joint_tpe(seed: int, n_startup_trials: int = 4) -> BaseSampler:
    """`seed` is given by the study, the rest by `sampler_options`."""
    return TPESampler(seed=seed, multivariate=True, n_startup_trials=n_startup_trials, constant_liar=True)
