"""Relay of reports from Ray Train to Ray Tune: one small actor for the whole study.

    worker --ray.train.report--> Train controller --put--> relay --take--> trial --ray.tune.report--> Tune

A mailbox holds one item, so that a controller waits until the trial has passed the item before on to Tune.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray

NAME = "relay"


class Relay:
    """Mailboxes by name; lives in an actor of its own."""

    def __init__(self) -> None:
        self._boxes: dict[str, asyncio.Queue[Any]] = {}

    async def put(self, box: str, item: Any) -> None:
        """Leave `item`; waits while an earlier one is still there."""
        await self._box(box).put(item)

    async def take(self, box: str, timeout_seconds: float) -> tuple[Any] | None:
        """The next item in a 1-tuple, or None when none came in time."""
        try:
            return (await asyncio.wait_for(self._box(box).get(), timeout_seconds),)
        except TimeoutError:
            return None

    async def close(self, box: str) -> None:
        """Remove a mailbox; senders that still wait are released."""
        queue = self._boxes.pop(box, None)
        while queue is not None and not queue.empty():
            queue.get_nowait()
            await asyncio.sleep(0)

    def _box(self, box: str) -> asyncio.Queue[Any]:
        return self._boxes.setdefault(box, asyncio.Queue(maxsize=1))


def start() -> Any:
    """Create the study's relay; called by the driver, in the study's namespace."""
    # All trials may wait in `take` at the same time; a crash of this process must not be the end of the study.
    options = {"name": NAME, "num_cpus": 0, "max_concurrency": 10_000, "max_restarts": -1, "max_task_retries": -1}
    return ray.remote(Relay).options(**options).remote()


def find() -> Any:
    """The study's relay, from any process of the study."""
    return ray.get_actor(NAME)
