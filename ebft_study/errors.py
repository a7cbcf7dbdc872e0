"""Errors whose message a user can act on: the value, the rule that it breaks, the remedy.

Every error carries plain strings only, so that it survives pickling between Ray processes.
The command line prints `str(error)` as one line and exits with `error.exit_code`.
"""

from __future__ import annotations

from collections.abc import Iterable


class EbftError(Exception):
    """Base of errors that the user causes and can repair. Never retried: the same input fails the same way."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class ConfigError(EbftError):
    """A configuration that cannot run, refused before anything starts."""


class DataError(EbftError):
    """A data set that is missing, unreadable, or yields nothing to train on."""


class ModelError(EbftError):
    """A model or feature network that is missing or does not fit the rest of the configuration."""


class ResultsError(EbftError):
    """A study or results folder that is missing, unreadable, or belongs to something else."""


class FitError(EbftError):
    """Points that cannot tell the parameters of a scaling law: the fit is refused, with the reason."""


class StorageError(EbftError):
    """Storage that cannot be read or written: full, read-only or unreachable. The study stops and can be resumed."""


class NoFileError(StorageError):
    """A folder, named pipe, socket or device where a file belongs; reading it might wait for ever, or never end."""


class LockLostError(StorageError):
    """The study is another driver's by now, or gone: this driver and its trials write nothing more."""


class CheckpointError(EbftError):
    """A requested checkpoint is missing or unusable."""


class SandboxError(EbftError):
    """No containment for generated programs on this machine, or limits under which none can run."""


class ServiceError(Exception):
    """A rollout engine or feature service has ended or does not answer: this attempt fails, the next may succeed."""


class ParityError(Exception):
    """Log-probabilities of rollout engine and trainer differ: the trial stops and reports both."""


class NonFiniteError(Exception):
    """A loss, gradient or metric is NaN or infinite: the trial stops, the study continues."""

    def __init__(self, quantity: str, value: float, step: int) -> None:
        super().__init__(quantity, value, step)
        self.quantity, self.value, self.step = quantity, value, step

    def __str__(self) -> str:
        return (
            f"{self.quantity} became {self.value} at step {self.step}; "
            "lower learning_rate, raise gamma, or lower max_grad_norm"
        )


Broken = tuple[str, object, str, str]
"""A broken rule: key, given value, rule, remedy."""


def refuse(broken: Iterable[Broken], *, source: str) -> None:
    """Raise `ConfigError` for the first broken rule, if there is one."""
    for key, given, rule, remedy in broken:
        raise rule_broken(source=source, key=key, given=given, rule=rule, remedy=remedy)


def rule_broken(*, source: str, key: str, given: object, rule: str, remedy: str) -> ConfigError:
    """Build the one-line error for a broken rule: "source: key=value: rule. Remedy"."""
    return ConfigError(f"{source}: {key}={given!r}: {rule}. {remedy}")


def one_line(error: BaseException) -> str:
    """Text of a library's error on a single line of at most 300 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + "..."
