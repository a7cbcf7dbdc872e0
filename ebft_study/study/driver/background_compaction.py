"""Merging the small files of finished trials while the study runs.

A report is a file of its own. A study of thousands of trials would leave hundreds of thousands of them to its end, and
every reader would open each of them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from ebft_study import results
from ebft_study.errors import EbftError
from ebft_study.storage import Location
from ebft_study.study.folder.background import in_background

_EVERY_SECONDS = 600.0
_FEWEST_TRIALS = 16  # that ended since the last time


@contextlib.contextmanager
def compacting(
    folder: Location,
    ended: Callable[[], int],
    check: Callable[[], None] = lambda: None,
    *,
    every_seconds: float = _EVERY_SECONDS,
    fewest_trials: int = _FEWEST_TRIALS,
) -> Iterator[None]:
    """Compact the results every so often until the end of the context.

    Args:
        ended: how many trials of the study are over.
        check: raises when the study is another driver's by now.
    """

    def work(over: threading.Event) -> None:
        done = ended()
        while not over.wait(every_seconds):
            if ended() - done >= fewest_trials:
                done = ended()
                with contextlib.suppress(EbftError, OSError):  # nothing is lost; the end of the session tries again
                    check()
                    results.compact(folder)

    with in_background(work, name="compaction"):
        yield
