"""One trial goes on from another one's checkpoint: what is put on disk and on record, and what a resume finds there.

The donor goes on training and removes its old checkpoints, so the one that is taken over is linked (or copied) into an
attempt of the receiving trial's own. From that attempt on, the trial is on a new *line*: checkpoints of its earlier
attempts are not its own past any more and are never started from.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ebft_study import config, results
from ebft_study.places import Location, Place
from ebft_study.results.lineage import lineage
from ebft_study.study import attempts

_UNFINISHED = ".takeover-"


@dataclass(frozen=True)
class Line:
    """What a trial has been continuing since its last takeover; the defaults are those of a trial without any.

    `settings` (dotted path -> value) are in force from `attempt` on, `donor` is whose checkpoint of `donor_step` that
    attempt begins with, `donor_attempt` where the donor's own line began, `score` the trial's objective before.
    """

    attempt: int = 0
    donor: str = ""
    donor_step: int = 0
    donor_attempt: int = 0
    score: float = math.nan
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Standing:
    """A trial's objective when it was last compared with others, and the step of that."""

    step: int
    value: float


def lines(study_folder: Location) -> dict[str, Line]:
    """The present line of every trial that took over another's state."""
    found: dict[str, Line] = {}
    for row in lineage(study_folder).to_dict("records"):
        if row["attempt"] < found.get(row["trial_id"], Line()).attempt:
            continue
        found[row["trial_id"]] = Line(
            **{name: row[name] for name in ("attempt", "donor", "donor_step", "donor_attempt", "score")},
            settings={config.resolve_key(name): value for name, value in row["after"].items()},
        )
    return found


def standings(study_folder: Path, *, metric: str, interval: int, after: int) -> dict[str, Standing]:
    """Where each trial stood at the last multiple of `interval` beyond step `after`, on its present line."""
    measured = results.read_table(study_folder, "metrics")
    of, found = lines(study_folder), dict[str, Standing]()
    for trial_id, rows in measured[measured[metric].notna()].groupby("trial_id"):
        line = of.get(str(trial_id), Line())
        due = rows[(rows["attempt"] >= line.attempt) & (rows["step"] > after) & (rows["step"] % interval == 0)]
        if len(due):
            last = due.sort_values("step").iloc[-1]
            found[str(trial_id)] = Standing(int(last["step"]), float(last[metric]))
    taken_over = {trial_id: Standing(line.donor_step, line.score) for trial_id, line in of.items()}
    return taken_over | found


def take_over(
    study_folder: Path, trial_id: str, *, donor: str, donor_attempt: int, record: Callable[[int, Path, int], None]
) -> tuple[int, Path, int] | None:
    """Give a trial the donor's newest complete checkpoint as the beginning of a new line.

    `record(attempt, checkpoint, step)` puts it on record. Whatever can fail happens before, and a crash after leaves a
    record that `start_from` can follow. Returns the same three, or None when the donor has no checkpoint.
    """
    found = _linked(study_folder, trial_id, donor, donor_attempt)
    if found is None:
        return None
    temporary, name, step = found
    attempt = attempts.begin(study_folder, trial_id)
    checkpoint = _path(attempts.folder(study_folder, trial_id, attempt)) / name
    record(attempt, checkpoint, step)
    temporary.rename(checkpoint)
    return attempt, checkpoint, step


def start_from(study_folder: Location, trial_id: str, line: Mapping[str, Any] | None) -> Place | None:
    """The newest complete checkpoint of a trial's present line; of its donor where that is gone, never an older one.

    Raises:
        FileNotFoundError: the donor has none any more either.
    """
    if line is None:
        return attempts.newest_checkpoint(study_folder, trial_id)
    own = attempts.newest_checkpoint(study_folder, trial_id, since=line["attempt"])
    instead = own or attempts.newest_checkpoint(study_folder, line["donor"], since=line["donor_attempt"])
    if instead is None:
        raise FileNotFoundError(
            f"{trial_id}: the checkpoint of {line['donor']} (step {line['donor_step']}) that it took over is gone, "
            f"and {line['donor']} has no other"
        )
    return instead


def tidy(study_folder: Path) -> None:
    """Remove what a driver left behind that was killed in the middle of a takeover. Only for the study's one driver."""
    for folder in (study_folder / "train").glob(f"{_UNFINISHED}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _linked(study_folder: Path, trial_id: str, donor: str, donor_attempt: int) -> tuple[Path, str, int] | None:
    """A link to the donor's newest checkpoint under a temporary name, its real name, and its step."""
    from ebft_study.training import checkpoint

    temporary = study_folder / "train" / f"{_UNFINISHED}{trial_id}"
    for _ in range(3):  # the donor may remove it meanwhile, when it has written a newer one
        newest = attempts.newest_checkpoint(study_folder, donor, since=donor_attempt)
        if newest is None:
            return None
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            shutil.copytree(_path(newest), temporary, copy_function=_link_or_copy)
        except (OSError, shutil.Error):
            continue
        step = checkpoint.step_of(temporary)
        if step is not None:
            return temporary, newest.name, step
    shutil.rmtree(temporary, ignore_errors=True)
    return None


def _path(where: Place) -> Path:
    """Of a place on a disk: stores know no links, so nothing is taken over in them."""
    assert where.local
    return where.local


def _link_or_copy(source: str, target: str) -> None:
    """Checkpoints never change once they are written, so a second name costs no space where the disk knows links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
