"""Errors for people: what was given, which rule it breaks, what to do.

Every error carries plain strings only, so that it survives pickling between Ray processes.
The command line prints `str(error)` as one line and exits with `error.exit_code`.
"""

from __future__ import annotations


class EbftError(Exception):
    """Base of all errors that a user can cause and correct. Never worth a retry: the same input fails the same way."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class ConfigError(EbftError):
    """A configuration that cannot be run, found before anything starts."""


class DataError(EbftError):
    """A data set that is missing, unreadable, or yields nothing to train on."""


class ModelError(EbftError):
    """A model or feature network that is missing or does not fit the rest of the configuration."""


class ResultsError(EbftError):
    """A study or results folder that is missing, unreadable, or belongs to something else."""


class StorageError(EbftError):
    """A disk or store that cannot be read or written: full, read-only, gone. A study stops, and can be resumed."""


class CheckpointError(EbftError):
    """No usable checkpoint where one was asked for."""


class ServiceError(Exception):
    """A rollout engine or feature service is gone or silent: the trial's attempt fails, and the next one may do."""


class ParityError(Exception):
    """The rollout engine computes other log-probabilities than the trainer: the trial stops with the numbers."""


class NonFiniteError(Exception):
    """A loss, gradient or metric is NaN or infinite: the trial stops, the study goes on."""

    def __init__(self, quantity: str, value: float, step: int) -> None:
        super().__init__(quantity, value, step)
        self.quantity, self.value, self.step = quantity, value, step

    def __str__(self) -> str:
        return (
            f"{self.quantity} became {self.value} at step {self.step}; "
            "lower learning_rate, raise gamma, or lower max_grad_norm"
        )


def rule_broken(*, source: str, key: str, given: object, rule: str, remedy: str) -> ConfigError:
    """One line for a broken rule: where it stands, what was given, the rule, and what to do."""
    return ConfigError(f"{source}: {key}={given!r}: {rule}. {remedy}")


def one_line(error: BaseException) -> str:
    """The text of an error on one line, at most 300 letters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}..."
