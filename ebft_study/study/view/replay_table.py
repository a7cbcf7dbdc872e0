"""`study FILE --what-if`: an early-stopping replay of a recorded study, and its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ebft_study import config, text
from ebft_study.config import RunConfig, Section
from ebft_study.errors import ResultsError, refuse, rule_broken
from ebft_study.results import copies
from ebft_study.storage import Location, storage_path
from ebft_study.study.folder import history, study_yaml
from ebft_study.study.resolving import checks, plugin_use, race_rules, study_file
from ebft_study.study.spec import normalize, trials
from ebft_study.study.spec.study_spec import SchedulerSpec, StoppingSpec, StudySpec
from ebft_study.study.stopping.replay import (
    RecordedTrial,
    Replay,
    as_started,
    recorded_concurrency,
    recorded_trials,
    replay,
)
from ebft_study.study.view.display import print_plain

SECTIONS = ("scheduler", "stopping", "objective", "budget")
"""Sections that a replay may change: those that stop trials, not those that define them."""


@dataclass(frozen=True)
class StudyReplays:
    """A study as it ran, and under each requested kind of early stopping."""

    spec: StudySpec
    concurrency: int
    as_it_ran: Replay
    alternatives: dict[str, Replay]


def replay_study(
    file: Path, *, profile: str | None, overrides: Sequence[str], name: str | None, storage: Location
) -> StudyReplays:
    """Replay the study that `file` describes. Its folder in `storage` is `name` if it ran under another name."""
    folder = storage_path(storage) / (name or str(config.read_yaml(file).get("study")))
    if not copies.either_exists(folder / study_yaml.NAME):
        remedy = f"Run it first, or name the study with --name (and --storage, now {storage})"
        raise ResultsError(f"{folder}: is no study, and an early-stopping replay needs a finished one. {remedy}")
    spec = study_with(folder, file, profile, overrides)
    recorded = recorded_trials(folder, spec)
    concurrency = spec.budget.max_concurrent_trials or recorded_concurrency(folder)
    without = spec.model_copy(update={"scheduler": SchedulerSpec(), "stopping": StoppingSpec()})
    changed = alternatives(spec, recorded)
    replays = {
        label: replay(
            as_started(recorded, each),
            each,
            concurrency=concurrency,
            scores=history.scores(folder, spec.objective.metric),
        )
        for label, each in changed.items()
    }
    return StudyReplays(spec, concurrency, replay(recorded, without, concurrency=concurrency), replays)


def study_with(folder: Location, file: Path, profile: str | None, overrides: Sequence[str]) -> StudySpec:
    """The recorded study, under the scheduler, rules, objective and budget of `file` and of the overrides."""
    recorded = study_yaml.read(folder)
    if recorded.search.algorithm == "optuna":
        raise ResultsError(f"{folder}: Optuna chose its trials by their results, which stops would have changed. "
                           "An early-stopping replay needs a grid or a random search")  # fmt: skip
    allowed = [item for item in overrides if study_file.section_of(item) in SECTIONS]
    profile = profile or study_yaml.content(folder).get("profile")
    asked = study_file.read_study(config.read_yaml(file), str(file), profile)
    asked = plugin_use.with_metrics(study_file.with_sections(asked, allowed))
    _refuse_changes(recorded, [item for item in overrides if item not in allowed])
    spec = recorded.model_copy(update={name: getattr(asked, name) for name in SECTIONS})
    if spec.scheduler.kind == "pbt":
        rule = "trials that continue from the checkpoints of others cannot be replayed from their own results"
        remedy = "Use asha, hyperband, median, extrapolation or race"
        raise rule_broken(source=str(file), key="scheduler.kind", given="pbt", rule=rule, remedy=remedy)
    runs = _runs(spec)
    plugin_use.load(spec, runs, source=str(file), folder=plugin_use.folder_of(str(file)))
    refuse(race_rules.broken_rules(spec, runs), source=str(file))
    n_trials = len(spec.seeds.all) * (len(spec.baselines) + len(runs))
    checks.check_stopping(spec, n_trials=n_trials, runs=runs, source=str(file))
    compared = spec if _describe(spec) else spec.model_copy(update={"scheduler": SchedulerSpec(kind="asha")})
    checks.check_comparable(compared, runs, str(file))
    return spec


def _refuse_changes(recorded: StudySpec, overrides: Sequence[str]) -> None:
    """Overrides may repeat how the study was started, but not change its trials."""
    before = _settings_of_trials(recorded)
    after = _settings_of_trials(study_file.with_overrides(recorded, overrides))
    for name, value in before.items():
        if after.get(name) != value:
            raise rule_broken(
                source="command line",
                key=name,
                given=after.get(name),
                rule=f"an early-stopping replay has trials that ran with {value!r}",
                remedy=f"Drop it, or override {', '.join(f'{section}.*' for section in SECTIONS)}",
            )


def _settings_of_trials(spec: StudySpec) -> dict[str, Any]:
    """Settings of a study's first trial, and the sections that define the trials and their resources."""
    first = trials.build(spec, trials.enumerated(spec)[0], seed=spec.seeds.all[0], source="command line")
    content = normalize.dump(spec)
    return {**config.flatten(first), **{name: content[name] for name in study_file.SECTIONS if name not in SECTIONS}}


def alternatives(spec: StudySpec, recorded: Sequence[RecordedTrial]) -> dict[str, StudySpec]:
    """The early stopping of a study file; if none, every scheduler and every rule at its defaults."""
    if _describe(spec):
        return {_describe(spec): spec}
    longest = max(trial.total_steps for trial in recorded)
    grace = min(int(SchedulerSpec.model_fields["grace_period_steps"].default), max(1, longest // 4))
    schedulers = [
        SchedulerSpec.model_validate({"kind": kind, "grace_period_steps": grace})
        for kind in ("asha", "hyperband", "median", "extrapolation", "race")
    ]
    rules = [StoppingSpec.model_validate({rule: {}}) for rule in StoppingSpec.model_fields if rule != "functions"]
    changes = [{"scheduler": each} for each in schedulers] + [{"stopping": each} for each in rules]
    changed = [spec.model_copy(update=change) for change in changes]
    changed = [each for each in changed if not any(race_rules.broken_rules(each, _runs(each)))]
    return {_describe(each): each for each in changed}


def _runs(spec: StudySpec) -> list[RunConfig]:
    """Settings of the configurations on the axes, at one seed."""
    on_axes = trials.enumerated(spec)[len(spec.baselines) :]
    return [trials.build(spec, configuration, seed=spec.seeds.all[0]) for configuration in on_axes]


def _describe(spec: StudySpec) -> str:
    """`asha (grace_period_steps 5, reduction_factor 3, brackets 1) and divergence (...)`; '' for neither."""

    def with_settings(name: str, section: Section) -> str:
        settings = {key: value for key, value in section.model_dump().items() if key != "kind"}
        return f"{name} ({', '.join(f'{key} {trials.format_value(value)}' for key, value in settings.items())})"

    kind = spec.scheduler.kind
    named = [] if kind == "none" else [with_settings(kind, spec.scheduler)]
    named += [with_settings(name.replace("_", " "), rule) for name, rule in spec.stopping if rule]
    return text.listed(named)


# --- tables ----------------------------------------------------------------------------------------------------


def show(replays: StudyReplays, console: Console) -> None:
    """A line on the study as it ran, a row for each alternative, and every stop if there is only one."""
    print_plain(console, _as_it_ran(replays))
    table = _table("early stopping", "stopped", "steps saved", "trial time saved", "study takes", "chosen", "regret")
    for label, alternative in replays.alternatives.items():
        table.add_row(label, *_cells(alternative, replays.spec.resources.gpus))
    console.print(table)
    if len(replays.alternatives) == 1:
        (alternative,) = replays.alternatives.values()
        console.print(_stops(alternative) if alternative.stops else "no trial would have been stopped")


def _as_it_ran(replays: StudyReplays) -> str:
    ran = replays.as_it_ran
    baselines = sum(trial.is_baseline for trial in ran.trials)
    finished, mean = ran.means[ran.winner]
    size = (
        f"{len(ran.trials) - baselines} trials on its axes, {baselines} of baselines, {replays.concurrency} at a time"
    )
    cost = f"{text.count(ran.steps_done)} steps, {text.duration(ran.seconds)}"
    best = f"{ran.winner} ({mean:.4g}, mean of {finished} finished seed{'s' * (finished != 1)})"
    return f"{replays.spec.study}: {size}, {cost}. Best by {replays.spec.objective.metric}: {best}"


def _cells(alternative: Replay, gpus: float) -> tuple[str, ...]:
    on_axes, steps = sum(not trial.is_baseline for trial in alternative.trials), alternative.steps_done
    percent = 100 * alternative.steps_saved / max(steps, 1)
    saved = f"{text.count(alternative.steps_saved)} of {text.count(steps)} ({percent:.0f} %)"
    gpu_hours = alternative.seconds_saved / 3600 * gpus
    time_saved = text.duration(alternative.seconds_saved) + (f" ({gpu_hours:.3g} GPU hours)" if gpu_hours else "")
    stopped = f"{len(alternative.stops)} of {on_axes}"
    return stopped, saved, time_saved, text.duration(alternative.seconds), *_choice(alternative)


def _choice(alternative: Replay) -> tuple[str, str]:
    """The configuration that would have been chosen, and its regret."""
    chosen = alternative.chosen
    if not chosen:
        return "nothing was left", text.NOTHING
    (seeds, mean), seeds_left = alternative.means[chosen], alternative.means_left[chosen][0]
    by = f", by {seeds_left} of {seeds} seeds" if seeds_left < seeds else ""
    if chosen == alternative.winner:
        return f"the same{by}", "0"
    return f"{chosen} ({mean:.4g}){by}", f"{alternative.regret:.2g}"


def _stops(alternative: Replay) -> Table:
    table = _table("trial", "settings", "stopped at", "after", "why", left=("trial", "settings", "why"))
    for stop in alternative.stops:
        trial = stop.trial
        settings, after = f"{trial.configuration} seed={trial.seed}", text.duration(stop.at_seconds)
        reason = stop.reason.rpartition(";")[0]
        table.add_row(trial.trial_id, settings, f"{stop.step}/{trial.total_steps}", after, reason)
    return table


def _table(*headers: str, left: Sequence[str] = ("early stopping", "chosen")) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for header in headers:
        table.add_column(header, justify="left" if header in left else "right", no_wrap=header not in left)
    return table
