"""The time that a study is expected to take, by the throughput of earlier trials on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ebft_study import text
from ebft_study.storage import Location
from ebft_study.study.forecast.benchmarks import benchmark_settings, benchmark_work
from ebft_study.study.forecast.throughput import Throughput, measured
from ebft_study.study.forecast.trial_groups import TrialGroup, trial_groups
from ebft_study.study.resolving.resolved import ResolvedStudy


@dataclass(frozen=True)
class PredictedGroup:
    """Trials that cost the same, and how fast one of them is."""

    group: TrialGroup
    throughput: Throughput

    @property
    def seconds(self) -> float:
        """Duration of one trial."""
        return self.throughput.seconds(self.group.work)

    def at_speed(self, index: int) -> Throughput:
        """The lowest (0) or highest (1) speed that it may have."""
        others = self.throughput.others
        return self.throughput.at(others[index]) if others else self.throughput


@dataclass(frozen=True)
class Prediction:
    """The time of a study, recorded at its start so that its report can compare it with the time that it took."""

    groups: Sequence[PredictedGroup]
    concurrency: int

    @property
    def n_trials(self) -> int:
        return sum(row.group.number for row in self.groups)

    @property
    def seconds(self) -> float:
        """Wall-clock time from the first start to the last end."""
        return _wall_seconds([(row.group.number, row.seconds) for row in self.groups], self.concurrency)

    @property
    def unknown_models(self) -> list[str]:
        """Models of which no trial has finished here: other models reach a tenth of a machine's speed, or ten times."""
        return sorted({row.group.example.run.model for row in self.groups if row.throughput.others})

    @property
    def seconds_between(self) -> tuple[float, float]:
        """Time of the study at the highest and at the lowest speed of other models, where its own are unknown."""
        low, high = (
            replace(self, groups=[replace(row, throughput=row.at_speed(index)) for row in self.groups])
            for index in (1, 0)
        )
        return low.seconds + low.base_seconds, high.seconds + high.base_seconds

    @property
    def base_seconds(self) -> float:
        """Time that benchmarks of the base models take, each once, before or at the start of the first trials."""
        runs = [(row.group.example.run, row.throughput) for row in self.groups]
        distinct = {
            (run.model, run.model_revision, run.uses_engine, benchmark_settings(run)): (benchmark_work(run), throughput)
            for run, throughput in runs
        }
        return sum(speed.evaluation_seconds(work.flops, work.judging_seconds) for work, speed in distinct.values())

    @property
    def mean_seconds(self) -> float:
        """Mean duration of a trial."""
        return sum(row.group.number * row.seconds for row in self.groups) / self.n_trials

    @property
    def message(self) -> str:
        """`about 6 min 5 s for 15 trials, 2 at a time`; a range where the speed of a model is unknown."""
        time = self.between if self.unknown_models else f"about {text.duration(self.seconds)}"
        return f"{time} for {self.n_trials} trials, {self.concurrency} at a time"

    @property
    def between(self) -> str:
        """`4 min 2 s to 55 min 0 s`."""
        return " to ".join(map(text.duration, self.seconds_between))

    @property
    def details(self) -> dict[str, Any]:
        """Plain values, as the event of the study's start holds them."""
        kinds: list[dict[str, Any]] = [
            {
                "label": row.group.label,
                "steps": row.group.example.run.total_steps,
                "seconds": round(row.seconds, 3),
                "startup_seconds": round(row.throughput.startup_seconds, 3),
                "trials": list(row.group.trial_ids),
                "number": row.group.number,
            }
            for row in self.groups
        ]
        seconds = _wall_seconds([(kind["number"], kind["seconds"]) for kind in kinds], self.concurrency)
        return {"at_once": self.concurrency, "seconds": seconds, "kinds": kinds}


def predict(study: ResolvedStudy, *, storage: Location) -> Prediction | None:
    """The prediction for a study; None where nothing was measured on this machine yet."""
    measurements = measured(storage)
    if not measurements:
        return None
    concurrency = min(study.concurrency, study.n_trials)
    rows = [
        PredictedGroup(group, measurements.throughput(group.work, concurrency=concurrency))
        for group in trial_groups(study)
    ]
    return Prediction(rows, concurrency)


def _wall_seconds(numbers_and_seconds: Sequence[tuple[int, float]], concurrency: int) -> float:
    """All slots are busy all the time, and nothing takes less than the longest trial."""
    total = sum(number * seconds for number, seconds in numbers_and_seconds)
    return max([total / concurrency, *(seconds for _, seconds in numbers_and_seconds)])
