"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

PLAIN_LINES = 5
"""Lines that are printed in all where there is no terminal."""


class Progress:
    """Context manager that shows how many of `total` units are done."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, total, 0
        self.started = time.perf_counter()
        self.bar: Bar | None = None
        if sys.stderr.isatty():
            columns = TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.fields[note]}")
            self.bar = Bar(*columns, TimeRemainingColumn())
            self.task = self.bar.add_task(title, total=total, note="")

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, note: str = "") -> None:
        """Count one more unit as done; `note` is shown after it."""
        self.done += 1
        if self.bar:
            self.bar.update(self.task, advance=1, note=note)
        elif self.done % max(self.total // PLAIN_LINES, 1) == 0:
            elapsed = time.perf_counter() - self.started
            print(f"{self.title}: {self.done}/{self.total}, {note}, {elapsed:.0f} s", flush=True)
