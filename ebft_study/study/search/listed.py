"""Which trial runs next. Plain Python: Ray's side of it is `tune_hooks.StudySearcher`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Protocol

from ebft_study.study.folder.trial_states import TrialResult
from ebft_study.study.spec.trials import Trial


class Search(Protocol):
    """A source of trials. `next` returns None when there is nothing to hand out at present."""

    def next(self) -> Trial | None: ...

    def ended(self, trial_id: str, trial_result: TrialResult) -> None: ...

    @property
    def exhausted(self) -> bool:
        """True when `next` will never return a trial again."""
        ...


class ListedSearch:
    """Hands out given trials in order."""

    def __init__(self, waiting: Iterable[Trial]) -> None:
        self._waiting = deque(waiting)

    def next(self) -> Trial | None:
        return self._waiting.popleft() if self._waiting else None

    def ended(self, trial_id: str, trial_result: TrialResult) -> None:
        """Nothing depends on how a listed trial ended."""

    @property
    def exhausted(self) -> bool:
        return not self._waiting


class PopulationSearch(ListedSearch):
    """Hands out whole populations: all trials of a seed at once, those of the next seed when places are free."""

    def __init__(self, waiting: Iterable[Trial], *, places: int) -> None:
        super().__init__(waiting)
        self._places = places
        self._begun: set[int] = set()
        self._out: set[str] = set()

    def next(self) -> Trial | None:
        if not self._waiting or (self._waiting[0].seed not in self._begun and len(self._out) >= self._places):
            return None
        trial = self._waiting.popleft()
        self._begun.add(trial.seed)
        self._out.add(trial.trial_id)
        return trial

    def ended(self, trial_id: str, trial_result: TrialResult) -> None:
        self._out.discard(trial_id)
