"""The studies of a folder, a line each, read from their folders alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from ebft_study import results
from ebft_study.analysis import selection
from ebft_study.analysis.summary import summarize
from ebft_study.errors import EbftError
from ebft_study.storage import Location, StoragePath, absolute, storage_path
from ebft_study.study.folder import lock, study_yaml
from ebft_study.study.folder.trial_states import OPEN
from ebft_study.study.spec import trials
from ebft_study.study.view.display import print_plain


@dataclass(frozen=True)
class ListedStudy:
    """A study in a line; `done` of its `trials` are over."""

    name: str
    state: str
    done: int = 0
    trials: int = 0
    started: str = ""
    best: str = ""
    """Objective, its mean over seeds, and the configuration; empty where nothing is the best yet."""
    problem: str = ""
    """Why nothing more is known of it."""


def listed(storage: Location) -> list[ListedStudy]:
    """The studies of a folder, by name, also those that cannot be read."""
    return [_listed(folder) for folder in results.studies_in(storage)]


def show(studies: Sequence[ListedStudy], storage: Location, console: Console) -> None:
    """Print a line for each study of the folder `storage`."""
    if not studies:
        print_plain(console, f"No studies in {absolute(storage_path(storage))}. Ready ones: ebft-study init --list")
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for header in ("study", "state", "trials", "started", "best so far"):
        table.add_column(header, justify="right" if header == "trials" else "left", overflow="fold")
    for study in studies:
        table.add_row(study.name, study.state, f"{study.done}/{study.trials}", study.started, study.best)
    console.print(table)
    for study in studies:
        if study.problem:
            print_plain(console, study.problem, style="yellow")


def _listed(folder: StoragePath) -> ListedStudy:
    try:
        is_running = lock.is_held(folder)
        spec, found = study_yaml.read(folder), results.load(folder, without=("samples", "scores", "events"))
        best = _best(found)
    except EbftError as error:
        return ListedStudy(folder.name, "unreadable", problem=str(error))
    needed = found.trials[found.trials["status"] != results.SKIPPED]["status"].tolist()
    n_trials = max(trials.number_of_trials(spec), len(needed))
    done, failed = sum(status not in OPEN for status in needed), needed.count("failed")
    if is_running:
        state = "running"
    elif any(status in OPEN for status in needed) or not needed:
        state = "interrupted"
    else:
        state = f"finished, {failed} failed" if failed else "finished"
    started = str(found.spec.get("created_at", ""))[:16].replace("T", " ")
    return ListedStudy(folder.name, state, done, n_trials, started, best)


def _best(found: results.Results) -> str:
    summary = summarize(found)
    best = selection.best(summary.configurations)
    metric, _ = summary.objective
    return f"{metric} {best.validated(metric):.4g}: {best.name}" if best else ""
