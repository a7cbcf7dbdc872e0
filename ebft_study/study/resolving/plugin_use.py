"""The plug-ins that a study names: each is loaded and checked before anything starts, and recorded with its digest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ebft_study import plugins
from ebft_study.config import RunConfig
from ebft_study.errors import ConfigError
from ebft_study.results import METRICS
from ebft_study.study.spec.study_spec import ObjectiveSpec, StudySpec

SCHEDULER_MEMBERS = ("group", "is_due", "judged", "standard", "is_behind", "verdict")
"""Of `stopping.schedulers.Rule`."""
CALLBACK_HOOKS = ("on_study_start", "on_trial_start", "on_report", "on_trial_end", "on_study_end")
"""Of `driver.callbacks.StudyCallback`: a callback has at least one."""
EXTRA_METRICS = "extra_metrics"


def folder_of(source: str) -> str:
    """Where the plug-ins of a study file are looked for: the folder that it is in, or the current one."""
    path = Path(source)
    return str((path.parent if path.is_file() else Path()).resolve())


def with_metrics(spec: StudySpec) -> StudySpec:
    """The study with objectives by name: one that is given as a plug-in is also a metric of all its runs."""
    evaluation = dict(spec.run.get("evaluation", {}))
    given = evaluation.get(EXTRA_METRICS, ())
    paths = [_expanded(str(name).strip()) for name in (given.split(",") if isinstance(given, str) else given)]
    known = {*(name for name, entry in METRICS.items() if not entry.plugin), *map(plugins.name_of, paths)}
    objectives: list[ObjectiveSpec] = []
    for objective in spec.objective.all:
        path = objective.metric if objective.metric in known else _expanded(objective.metric)
        if plugins.is_path(path):
            paths = [*paths, *([] if path in paths else [path])]
        metric = plugins.name_of(path) if plugins.is_path(path) else path
        objectives.append(objective.model_copy(update={"metric": metric, "further": ()}))
    if not paths:
        return spec
    first = objectives[0].model_copy(update={"further": tuple(objectives[1:])})
    run = {**spec.run, "evaluation": {**evaluation, EXTRA_METRICS: paths}}
    return spec.model_copy(update={"objective": first, "run": run})


def _expanded(name: str) -> str:
    try:
        return plugins.expanded(name)
    except ValueError as error:
        raise ConfigError(f"{name!r}: {error}") from None


def load(spec: StudySpec, runs: Sequence[RunConfig], *, source: str, folder: str | None) -> None:
    """Import all plug-ins of a study, and check how they are called; metrics are registered.

    Args:
        folder: where modules are looked for that Python does not find.

    Raises:
        ConfigError: one cannot be used, in one line that says why.
    """
    uses = list(_uses(spec, runs))
    if uses:
        plugins.search_in(folder)
    try:
        for key, path, check in uses:
            check(key, path)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error.message}") from error


def record(spec: StudySpec, runs: Iterable[RunConfig]) -> dict[str, Any]:
    """Provenance of the plug-ins that were loaded: import path -> setting, digest, and what a metric declares.

    The digest of a callback, which changes no result, is not compared when the study is resumed.
    """
    entries: dict[str, Any] = {}
    for key, path, _ in _uses(spec, runs):
        digest = "sha256" if key == "callbacks" else "fingerprint"
        entries[path] = {"setting": key, digest: plugins.fingerprint(path), "folder": plugins.folder_with(path)}
        entry = METRICS.get(plugins.name_of(path)) if key.endswith(EXTRA_METRICS) else None
        if entry is not None:
            entries[path]["metric"] = entry.declaration
    return entries


def for_tasks(spec: StudySpec, runs: Sequence[RunConfig], folder: str | None) -> dict[str, Any]:
    """What `plugins.search_in` needs in the processes of trials; empty without plug-ins."""
    entries = record(spec, runs)
    expected = {path: entry["fingerprint"] for path, entry in entries.items() if "fingerprint" in entry}
    return {"folder": folder, "expected": expected} if entries else {}


Check = Callable[[str, str], None]


def _uses(spec: StudySpec, runs: Iterable[RunConfig]) -> Iterator[tuple[str, str, Check]]:
    """Setting, import path and check of every plug-in, once."""
    search, scheduler = spec.search, spec.scheduler
    if search.algorithm == "optuna" and plugins.is_path(search.sampler):
        yield "search.sampler", search.sampler, _makes_a_sampler(search.sampler_options)
    if plugins.is_path(scheduler.kind):
        yield "scheduler.kind", scheduler.kind, _makes_a_rule(scheduler.options)
    for path, options in spec.stopping.functions.items():
        yield "stopping.functions", path, _called_with(options, "history")
    for path, options in spec.callbacks.items():
        yield "callbacks", path, _makes_a_callback(options)
    for path in dict.fromkeys(path for run in runs for path in run.evaluation.extra_metrics):
        yield f"evaluation.{EXTRA_METRICS}", path, _is_a_metric
    for name in dict.fromkeys(run.data.dataset for run in runs):
        if plugins.is_path(name):
            yield "data.dataset", name, _called_with({}, "config")
    for verifier in dict.fromkeys(run.verifier.verifier for run in runs):
        if verifier is not None and plugins.is_path(verifier):
            yield "verifier.verifier", verifier, lambda key, path: plugins.load(path, key=key)


def _called_with(options: Mapping[str, Any], *arguments: str) -> Check:
    def check(key: str, path: str) -> None:
        target = plugins.load(path, key=key)
        plugins.check_arguments(target, path, key=key, arguments=arguments, options=options)

    return check


def _makes_a_sampler(options: Mapping[str, Any]) -> Check:
    def check(key: str, path: str) -> None:
        _called_with(plugins.seeded(path, key=key, options=options, seed=0))(key, path)

    return check


def _makes_a_rule(options: Mapping[str, Any]) -> Check:
    def check(key: str, path: str) -> None:
        made = plugins.call(path, key=key, options=options)
        what = "an ebft_study.study.stopping.schedulers.Rule"
        plugins.check_members(made, SCHEDULER_MEMBERS, path, key=key, what=what)

    return check


def _makes_a_callback(options: Mapping[str, Any]) -> Check:
    def check(key: str, path: str) -> None:
        made = plugins.call(path, key=key, options=options)
        if not any(hasattr(made, hook) for hook in CALLBACK_HOOKS):
            rule, remedy = "it has made an object without any hook", f"Give it some of {', '.join(CALLBACK_HOOKS)}"
            raise plugins.refused(key, path, rule, remedy)

    return check


def _is_a_metric(key: str, path: str) -> None:
    from ebft_study.evaluation.extra_metrics import load_metrics  # needs torch

    load_metrics([path])
