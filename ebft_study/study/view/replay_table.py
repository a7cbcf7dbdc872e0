"""`study FILE --what-if`: the file's early stopping over the trials that a study has on record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ebft_study import config, text
from ebft_study.config import Section
from ebft_study.errors import ResultsError, rule_broken
from ebft_study.results import copies
from ebft_study.storage import Location, storage_path
from ebft_study.study.folder import study_yaml
from ebft_study.study.resolving import checks, study_file
from ebft_study.study.spec import normalize, trials
from ebft_study.study.spec.study_spec import ResourcesSpec, SchedulerSpec, StoppingSpec, StudySpec
from ebft_study.study.stopping.replay import (
    RecordedTrial,
    Replay,
    means_by_configuration,
    places_on_record,
    recorded_trials,
    replay,
)

SECTIONS = ("scheduler", "stopping", "objective", "budget")
"""What a what-if may change: how trials are stopped, not what they were."""


@dataclass(frozen=True)
class WhatIf:
    """The study as it ran, and under each kind of early stopping that was asked for."""

    places: int
    as_it_ran: Replay
    replays: dict[str, Replay]


def what_if(
    file: Path, *, profile: str | None, overrides: Sequence[str], name: str | None, storage: Location
) -> tuple[StudySpec, WhatIf]:
    """Replay the study that `file` describes; it lies in `storage`, under `name` if it ran under another one."""
    folder = storage_path(storage) / (name or str(config.read_yaml(file).get("study")))
    if not copies.either_exists(folder / study_yaml.NAME):
        remedy = f"Run it first, or name the study with --name (and --storage, now {storage})"
        raise ResultsError(f"{folder}: is no study, and a what-if replays a finished one. {remedy}")
    spec = study_with(folder, file, profile, overrides)
    ran = recorded_trials(folder, spec)
    places = spec.budget.max_concurrent_trials or places_on_record(folder)
    nothing = spec.model_copy(update={"scheduler": SchedulerSpec(), "stopping": StoppingSpec()})
    replays = {label: replay(ran, asked, places=places) for label, asked in alternatives(spec, ran).items()}
    return spec, WhatIf(places, replay(ran, nothing, places=places), replays)


def study_with(folder: Location, file: Path, profile: str | None, overrides: Sequence[str]) -> StudySpec:
    """The study on record, under the scheduler, rules, objective and budget of `file` and of the overrides."""
    recorded = study_yaml.read(folder)
    if recorded.search.algorithm == "optuna":
        raise ResultsError(f"{folder}: Optuna chose its trials by their results, which stops would have changed. "
                           "A what-if needs a grid or a random search")  # fmt: skip
    asked = study_file.read_study(
        config.read_yaml(file), str(file), profile or study_yaml.content(folder).get("profile")
    )
    asked = study_file.with_sections(asked, [item for item in overrides if study_file.section_of(item) in SECTIONS])
    _refuse_changes(recorded, [item for item in overrides if study_file.section_of(item) not in SECTIONS])
    spec = recorded.model_copy(update={name: getattr(asked, name) for name in SECTIONS})
    if spec.scheduler.kind == "pbt":
        rule = "trials that go on from others cannot be replayed from what they did on their own"
        remedy = "Ask for asha, hyperband or median"
        raise rule_broken(source=str(file), key="scheduler.kind", given="pbt", rule=rule, remedy=remedy)
    runs = [trials.build(spec, configuration, seed=spec.seeds[0]) for configuration in trials.enumerated(spec)]
    n_trials = len(spec.seeds) * len(runs)
    checks.check_stopping(spec, n_trials=n_trials, total_steps=[run.total_steps for run in runs], source=str(file))
    return spec


def _refuse_changes(recorded: StudySpec, overrides: Sequence[str]) -> None:
    """What trials were may be given again, as it was when the study was started."""
    before, after = _given(recorded), _given(study_file.with_overrides(recorded, overrides))
    for name, value in before.items():
        if after.get(name) != value:
            raise rule_broken(
                source="command line",
                key=name,
                given=after.get(name),
                rule=f"a what-if replays trials that ran with {value!r}",
                remedy=f"Drop it, or override {', '.join(f'{section}.*' for section in SECTIONS)}",
            )


def _given(spec: StudySpec) -> dict[str, Any]:
    """Settings of a study's first trial, and what else says which trials there are and what each occupies."""
    first = trials.build(spec, trials.enumerated(spec)[0], seed=spec.seeds[0], source="command line")
    plain = normalize.dump(spec)
    return {**config.flatten(first), **{name: plain[name] for name in study_file.SECTIONS if name not in SECTIONS}}


# --- what to compare -------------------------------------------------------------------------------------------


def alternatives(spec: StudySpec, ran: Sequence[RecordedTrial]) -> dict[str, StudySpec]:
    """What the study asks for; where that is nothing, every scheduler and every rule at its defaults."""
    if _describe(spec):
        return {_describe(spec): spec}
    longest = max(trial.total_steps for trial in ran)
    grace = min(int(SchedulerSpec.model_fields["grace_period_steps"].default), max(1, longest // 4))
    found = []
    for kind in ("asha", "hyperband", "median"):
        scheduler = SchedulerSpec.model_validate({"kind": kind, "grace_period_steps": grace})
        found.append(spec.model_copy(update={"scheduler": scheduler}))
    for rule in StoppingSpec.model_fields:
        found.append(spec.model_copy(update={"stopping": StoppingSpec.model_validate({rule: {}})}))
    return {_describe(one): one for one in found}


def _describe(spec: StudySpec) -> str:
    """`asha (grace_period_steps 5, reduction_factor 3, brackets 1) and divergence (...)`; '' for neither."""
    kind = spec.scheduler.kind
    named = [] if kind == "none" else [_with_settings(kind, spec.scheduler)]
    named += [_with_settings(name.replace("_", " "), rule) for name, rule in spec.stopping if rule]
    return text.listed(named)


def _with_settings(name: str, section: Section) -> str:
    settings = {key: value for key, value in section.model_dump().items() if key != "kind"}
    return f"{name} ({', '.join(f'{key} {trials.format_value(value)}' for key, value in settings.items())})"


# --- for people ------------------------------------------------------------------------------------------------


def show(spec: StudySpec, found: WhatIf, console: Console) -> None:
    """One line on the study as it ran, a line for each alternative, and for a single one every stop."""
    console.print(_as_it_ran(spec, found), markup=False, highlight=False, soft_wrap=True)
    table = _table("early stopping", "stopped", "steps saved", "trial time saved", "study takes", "chosen", "regret")
    for label, one in found.replays.items():
        table.add_row(label, *_row(one, spec.resources))
    console.print(table)
    if len(found.replays) == 1:
        _show_stops(next(iter(found.replays.values())), console)


def _as_it_ran(spec: StudySpec, found: WhatIf) -> str:
    ran = found.as_it_ran
    baselines = sum(trial.is_baseline for trial in ran.trials)
    finished, mean = _final(ran, ran.winner)
    size = f"{len(ran.trials) - baselines} trials on its axes, {baselines} of baselines, {found.places} at a time"
    cost = f"{text.count(_steps(ran))} steps, {text.duration(ran.seconds)}"
    seeds = f"{finished} finished seed{'s' * (finished != 1)}"
    best = f"{ran.winner} ({mean:.4g}, mean of {seeds})"
    return f"{spec.study}: {size}, {cost}. Best by {spec.objective.metric}: {best}"


def _row(one: Replay, resources: ResourcesSpec) -> tuple[str, ...]:
    """The cells of a replay."""
    on_axes, steps = sum(not trial.is_baseline for trial in one.trials), _steps(one)
    saved = f"{text.count(one.steps_saved)} of {text.count(steps)} ({100 * one.steps_saved / max(steps, 1):.0f} %)"
    chosen, regret = ("nothing was left", text.NOTHING) if not one.chosen else _choice(one)
    gpu_hours = one.seconds_saved / 3600 * resources.gpus
    spared = f" ({gpu_hours:.3g} GPU hours)" if gpu_hours else ""
    times = text.duration(one.seconds_saved) + spared, text.duration(one.seconds)
    return f"{len(one.stops)} of {on_axes}", saved, *times, chosen, regret


def _choice(one: Replay) -> tuple[str, str]:
    """What would have been chosen, and its regret."""
    seeds, mean = _final(one, one.chosen)
    by = f", by {one.seeds_left} of {seeds} seeds" if one.seeds_left < seeds else ""
    if one.chosen == one.winner:
        return f"the same{by}", "0"
    return f"{one.chosen} ({mean:.4g}){by}", f"{one.regret:.2g}"


def _final(one: Replay, configuration: str) -> tuple[int, float]:
    """Number of finished seeds and mean of the objective, by what is on record."""
    return means_by_configuration(one.trials, one.objective.metric)[configuration]


def _steps(one: Replay) -> int:
    return sum(trial.steps_done for trial in one.trials)


def _show_stops(one: Replay, console: Console) -> None:
    if not one.stops:
        console.print("no trial would have been stopped")
        return
    table = _table("trial", "settings", "stopped at", "after", "why", left=("trial", "settings", "why"))
    for stop in one.stops:
        trial = stop.trial
        what, when = f"{trial.configuration} seed={trial.seed}", text.duration(stop.at_seconds)
        table.add_row(trial.trial_id, what, f"{stop.step}/{trial.total_steps}", when, stop.reason.rpartition(";")[0])
    console.print(table)


def _table(*headers: str, left: Sequence[str] = ("early stopping", "chosen")) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for header in headers:
        table.add_column(header, justify="left" if header in left else "right", no_wrap=header not in left)
    return table
