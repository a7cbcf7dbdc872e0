"""Networks whose weights are divided among workers, and the passes that need all of them.

    `unsharded(network)`   every worker has all weights: for passes of which each worker makes as many as it likes
    elsewhere              a worker has its part; the layers of a trained network are gathered one by one as they run

Which networks are divided, and how, is `training.distributed`'s choice; any other network is simply itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn

ATTRIBUTE = "weight_shards"
"""Attribute of a divided network: its `Shards`."""


class Shards(ABC):
    """Weights of which every worker has a part."""

    _users = 0

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Context in which every worker has all of them. Contexts may be nested; the outermost one moves weights."""
        self._users += 1
        if self._users == 1:
            self.gather()
        try:
            yield
        finally:
            self._users -= 1
            if self._users == 0:
                self.release()

    @abstractmethod
    def gather(self) -> None:
        """Exchange the parts; all workers call this at the same time."""

    @abstractmethod
    def release(self) -> None:
        """Keep the own part only."""


def shards_of(network: nn.Module) -> Sequence[Shards]:
    """The shards of a network; none where every worker has all its weights."""
    return getattr(network, ATTRIBUTE, ())


def is_sharded(network: nn.Module) -> bool:
    """Whether workers divide its weights among themselves."""
    return bool(shards_of(network))


@contextmanager
def unsharded(*networks: nn.Module) -> Iterator[None]:
    """Context in which every worker has all weights of some networks.

    All workers must enter and leave; what each one runs inside may differ.
    """
    with ExitStack() as stack:
        for network in networks:
            for shards in shards_of(network):
                stack.enter_context(shards.gathered())
        yield
