"""Sampled completions side by side: the base model, SFT, EBFT and other trials on the same prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ebft_study import text
from ebft_study.analysis.summary import StudySummary
from ebft_study.report.drawing import compared_configurations

MAX_CONTEXT_CHARACTERS = 240
MAX_PROMPTS, MAX_SAMPLES = 4, 4
BASE = "base model"
Prompt = tuple[int, int, str]
"""Sequence, anchor and text: trials with other data or lengths have other prompts."""
Completion = tuple[str, str]
"""Text and reward."""


@dataclass(frozen=True)
class SamplePrompt:
    """One prompt and its completions by model; of models that sampled from it."""

    context: str
    ground_truth: str
    models: dict[str, list[Completion]]

    @property
    def rows(self) -> list[list[Completion | None]]:
        """The k-th completion of each model, in rows."""
        longest = max(map(len, self.models.values()))
        return [[each[k] if k < len(each) else None for each in self.models.values()] for k in range(longest)]


class Samples:
    """Completions of the data set's prompts, by trial, at the first and at the last step with any."""

    def __init__(self, study: StudySummary) -> None:
        samples = study.results.samples
        samples = samples[samples["benchmark"].isna()]
        # Texts of one trial are the same for all its prompts' samples: only the last step is shown.
        last = samples[samples["step"] == samples.groupby("trial_id")["step"].transform("max")]
        self._last = {str(trial): _by_prompt(rows) for trial, rows in last[last["step"] > 0].groupby("trial_id")}
        self._steps = {str(trial): int(step) for trial, step in last.groupby("trial_id")["step"].first().items()}
        base = samples[samples["step"] == 0]
        self._base = {str(trial): _by_prompt(rows) for trial, rows in base.groupby("trial_id")}

    def of(self, trial_id: str) -> dict[Prompt, tuple[str, list[Completion]]]:
        """Prompt -> ground truth and completions of a trial."""
        return self._last.get(trial_id, {})

    def step(self, trial_id: str) -> int:
        return self._steps.get(trial_id, 0)

    def of_base(self, prompt: Prompt, trial_id: str) -> list[Completion]:
        """Completions of a trial's base model, sampled by itself or else by another trial from the same prompt."""
        of_trials = [self._base.get(trial_id, {}), *self._base.values()]
        return next((found[prompt][1] for found in of_trials if prompt in found), [])


def side_by_side(samples: Samples, trials: Mapping[str, str], limit: int = MAX_PROMPTS) -> list[SamplePrompt]:
    """Prompts of the last of some trials with the completions of all that sampled from them, the base model first.

    Args:
        trials: label -> trial.
    """
    found = {label: samples.of(trial) for label, trial in trials.items()}
    prompts = [prompt for of_trial in reversed(found.values()) for prompt in of_trial]
    shown = []
    for prompt in list(dict.fromkeys(prompts))[:limit]:
        with_prompt = {label: of_trial[prompt] for label, of_trial in found.items() if prompt in of_trial}
        base = samples.of_base(prompt, list(trials.values())[-1])
        models = {BASE: base} if base else {}
        models |= {label: completions for label, (_, completions) in with_prompt.items()}
        truth = next(truth for truth, _ in reversed(with_prompt.values()))
        shown.append(SamplePrompt(_cut(prompt[2]), truth, models))
    return shown


def best_of_methods(study: StudySummary, samples: Samples) -> list[SamplePrompt]:
    """SFT's and EBFT's best configurations, each at its first finished seed, on two prompts."""
    trials = {label: first_trial(c.finished) for label, c in compared_configurations(study)}
    return side_by_side(samples, trials, limit=2) if trials else []


def first_trial(trials: pd.DataFrame) -> str:
    return str(trials.sort_values("seed")["trial_id"].iloc[0])


def _by_prompt(rows: pd.DataFrame) -> dict[Prompt, tuple[str, list[Completion]]]:
    found: dict[Prompt, tuple[str, list[Completion]]] = {}
    columns = ["sequence", "anchor", "context", "ground_truth", "sample", "completion", "reward"]
    for sequence, anchor, context, truth, _, completion, reward in _records(rows, columns):
        key = (int(sequence), int(anchor), _words(context))
        completions = found.setdefault(key, (_words(truth), []))[1]
        if len(completions) < MAX_SAMPLES:
            completions.append((_words(completion), text.number(reward, 2)))
    return found


def _records(rows: pd.DataFrame, columns: list[str]) -> Iterable[list[Any]]:
    ordered = rows.sort_values(["sequence", "anchor", "sample"])
    records: list[list[Any]] = ordered[columns].to_numpy(dtype=object).tolist()
    return records


def _words(value: Any) -> str:
    return "" if text.is_missing(value) else str(value)


def _cut(context: str) -> str:
    return "…" + context[-MAX_CONTEXT_CHARACTERS:] if len(context) > MAX_CONTEXT_CHARACTERS else context
