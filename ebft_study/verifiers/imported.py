"""Verifiers of the user, by import path."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import cast

from ebft_study import plugins
from ebft_study.config import VerifierConfig
from ebft_study.errors import ConfigError
from ebft_study.verifiers import Judgement, Problem, Verifier
from ebft_study.verifiers.base import AnswerVerifier, scored

Function = Callable[[Sequence[Problem], Sequence[str]], Sequence[float | None]]
_KEY = "verifier.verifier"
_MEMBERS = ("name", "lowest", "highest", "judge", "close")


class ImportedFunction(AnswerVerifier):
    """A function of problems and answers (completions after stop strings and parse rule) that returns scores 0 to 1.

    None as a score says that the function itself failed on the answer.
    """

    def __init__(self, path: str, function: Function, config: VerifierConfig) -> None:
        super().__init__(path, config)
        self._function = function

    def score(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[Judgement]:
        """The function's score of each answer.

        Raises:
            ConfigError: the function has raised, or returned anything but one score from 0 to 1 for each answer.
        """
        try:
            scores = list(self._function(problems, answers))
        except Exception as error:
            raise plugins.raised(_KEY, self.name, error) from error
        if len(scores) != len(answers):
            raise _refused(self.name, f"it has returned {len(scores)} scores for {len(answers)} answers", "Repair it")
        for score in scores:
            if score is not None and not 0.0 <= score <= 1.0:
                raise _refused(self.name, f"it has returned the score {score}", "Return numbers from 0 to 1, or None")
        return [scored(None if score is None else float(score)) for score in scores]


def load_imported(path: str, config: VerifierConfig) -> Verifier:
    """The verifier behind `package.module:name`: a function as above, or a factory without arguments of a `Verifier`.

    Raises:
        ConfigError: there is no such object, or it is neither.
    """
    target = plugins.load(path, key=_KEY)
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        raise _refused(path, "is no function and no class", _KINDS) from None
    required = sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    if required == 2:
        return ImportedFunction(path, target, config)
    if required != 0:
        raise _refused(path, f"takes {required} arguments", _KINDS)
    verifier = plugins.call(path, key=_KEY, options={})
    plugins.check_members(verifier, _MEMBERS, path, key=_KEY, what="an ebft_study.verifiers.Verifier")
    return cast(Verifier, verifier)


_KINDS = (
    "Name a function of (problems, completions) that returns scores, or a factory without arguments that returns an "
    "ebft_study.verifiers.Verifier"
)


def _refused(path: str, rule: str, remedy: str) -> ConfigError:
    return plugins.refused(_KEY, path, rule, remedy)
