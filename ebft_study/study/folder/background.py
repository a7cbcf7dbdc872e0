"""Work of a thread beside the code of a context."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def in_background(work: Callable[[threading.Event], None], *, name: str) -> Iterator[None]:
    """Context beside which a thread called `name` does `work`, which returns soon after the event that it is given."""
    over = threading.Event()
    thread = threading.Thread(target=work, args=(over,), daemon=True, name=name)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
