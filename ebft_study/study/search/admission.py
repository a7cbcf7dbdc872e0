"""Which trial may start, where trials of one study need different amounts of a cluster.

Ray starts whatever fits. Beside many trials of one GPU, one that needs four would wait for ever, because every GPU that
comes free is taken by the next small trial before three others do. Here trials start strictly in the order of their
search: while the next one does not fit, nobody starts, so that it waits for no more than the trials that run already.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from ebft_study.study.folder.trial_states import TrialResult
from ebft_study.study.search.listed import Search
from ebft_study.study.spec.trials import Trial


class Admission:
    """A `Search` that hands out a trial as soon as there is room for it, and no other one before it."""

    def __init__(self, search: Search, share: Callable[[Trial], Fraction]) -> None:
        """`share`: the part of the cluster that a trial takes, from over 0 to 1."""
        self._search, self._share = search, share
        self._taken: dict[str, Fraction] = {}
        self._next: Trial | None = None

    def next(self) -> Trial | None:
        if self._next is None:
            self._next = self._search.next()
        if self._next is None:
            return None
        needed = self._share(self._next)
        if sum(self._taken.values(), start=needed) > 1:
            return None
        trial, self._next = self._next, None
        self._taken[trial.trial_id] = needed
        return trial

    def ended(self, trial_id: str, trial_result: TrialResult) -> None:
        self._taken.pop(trial_id, None)
        self._search.ended(trial_id, trial_result)

    @property
    def exhausted(self) -> bool:
        return self._next is None and self._search.exhausted
