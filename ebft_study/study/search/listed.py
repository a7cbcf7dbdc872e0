"""Order of trials that are known from the start: population by population, with large trials in their turn.

Plain Python: Ray's side of it is `tune_hooks.StudySearcher`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Protocol

from ebft_study.study.folder.trial_states import TrialResult
from ebft_study.study.spec.trials import Trial


class Search(Protocol):
    """A source of trials. `next` returns None when there is no trial to start at present."""

    def next(self) -> Trial | None: ...

    def ended(self, trial_id: str, trial_result: TrialResult) -> None: ...

    @property
    def exhausted(self) -> bool:
        """True when `next` will never return a trial again."""
        ...


class ListedSearch:
    """Hands out the trials of a list in order."""

    def __init__(self, waiting: Iterable[Trial]) -> None:
        self._waiting = deque(waiting)

    def next(self) -> Trial | None:
        return self._waiting.popleft() if self._waiting else None

    def ended(self, trial_id: str, trial_result: TrialResult) -> None:
        """Do nothing: the order of listed trials does not depend on results."""

    @property
    def exhausted(self) -> bool:
        return not self._waiting


class PopulationSearch(ListedSearch):
    """Hands out a whole population: all trials of a seed, then those of the next seed when slots are free."""

    def __init__(self, waiting: Iterable[Trial], *, slots: int) -> None:
        super().__init__(waiting)
        self._slots = slots
        self._started_seeds: set[int] = set()
        self._running: set[str] = set()

    def next(self) -> Trial | None:
        if not self._waiting:
            return None
        if self._waiting[0].seed not in self._started_seeds and len(self._running) >= self._slots:
            return None
        trial = self._waiting.popleft()
        self._started_seeds.add(trial.seed)
        self._running.add(trial.trial_id)
        return trial

    def ended(self, trial_id: str, trial_result: TrialResult) -> None:
        self._running.discard(trial_id)


class Admission:
    """Hands out the trials of another search, each when the cluster has room for it, and no later one before it.

    Ray starts whatever fits. Among many trials of one GPU, a trial of four would wait forever, because the next small
    trial takes every GPU that becomes free. In strict order it waits only for trials that run already.
    """

    def __init__(self, search: Search, share: Callable[[Trial], Fraction]) -> None:
        """`share`: the part of the cluster that a trial takes, from over 0 to 1."""
        self._search, self._share = search, share
        self._taken: dict[str, Fraction] = {}
        self._next: Trial | None = None

    def next(self) -> Trial | None:
        self._next = trial = self._next or self._search.next()
        if trial is None:
            return None
        share = self._share(trial)
        if sum(self._taken.values(), start=share) > 1:
            return None
        self._taken[trial.trial_id], self._next = share, None
        return trial

    def ended(self, trial_id: str, trial_result: TrialResult) -> None:
        self._taken.pop(trial_id, None)
        self._search.ended(trial_id, trial_result)

    @property
    def exhausted(self) -> bool:
        return self._next is None and self._search.exhausted
