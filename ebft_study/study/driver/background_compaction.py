"""What a driver does now and then while its study runs: merge the small files of the trials that are over.

A report is a file of its own. A study of thousands of trials would leave hundreds of thousands of them to its end, and
whoever reads the study meanwhile would open every one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from ebft_study import results
from ebft_study.errors import EbftError
from ebft_study.storage import Location

_EVERY_SECONDS = 600.0
_WORTH_IT = 16  # trials that ended since


@contextlib.contextmanager
def housekeeping(
    folder: Location, ended: Callable[[], int], *, every_seconds: float = _EVERY_SECONDS, worth_it: int = _WORTH_IT
) -> Iterator[None]:
    """Inside, results are compacted every so often.

    Args:
        ended: how many trials of the study are over.
    """
    over = threading.Event()

    def work() -> None:
        done = ended()
        while not over.wait(every_seconds):
            if ended() - done >= worth_it:
                done = ended()
                with contextlib.suppress(EbftError, OSError):  # nothing is lost; the end of the session tries again
                    results.compact(folder)

    thread = threading.Thread(target=work, daemon=True, name="housekeeping")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
