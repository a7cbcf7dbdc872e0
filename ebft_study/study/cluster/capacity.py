"""The CPUs, GPUs and memory of machines. Imports neither Ray nor torch."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Node:
    """One machine of a cluster, or this one."""

    cpus: float
    gpus: float = 0.0
    memory_bytes: float = 0.0
    """Memory that Ray may reserve; 0 where it is not needed."""

    def workers(self, cpus: float, gpus: float) -> int:
        """Number of processes that fit if each takes so much. A part of a GPU is never spread over two."""
        by_cpu = math.floor(self.cpus / cpus + 1e-9)
        if not gpus:
            return by_cpu
        by_gpu = int(self.gpus) * math.floor(1 / gpus + 1e-9) if gpus < 1 else math.floor(self.gpus / gpus + 1e-9)
        return min(by_cpu, by_gpu)


@dataclass(frozen=True)
class ClusterCapacity:
    """The machines on which the trials of a study run. `is_existing`: of a cluster that others started."""

    nodes: tuple[Node, ...]
    is_existing: bool = False

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)

    def without_gpus(self, taken: float) -> ClusterCapacity:
        """The rest when services take so many GPUs; a GPU that they use in part is not shared."""
        left, nodes = math.ceil(taken), []
        for node in sorted(self.nodes, key=lambda node: -node.gpus):
            here = min(left, int(node.gpus))
            nodes.append(Node(node.cpus, node.gpus - here, node.memory_bytes))
            left -= here
        return ClusterCapacity(tuple(nodes), self.is_existing)


def this_machine(*, gpus: bool) -> ClusterCapacity:
    """The resources of this process; GPUs are counted only on request, because that imports torch."""
    return ClusterCapacity((Node(cpu_count(), gpu_count() if gpus else 0),))


def cpu_count() -> int:
    """CPU cores that this process may use: those it is bound to, or the whole cores of a container's quota if fewer."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(_quota(_CGROUP) or cores)))


def _quota(cgroup: Path) -> float | None:
    """CPU cores' worth of time that the control group of a container may use, in version 1 or 2; None without limit."""
    files = (cgroup / "cpu.max",), (cgroup / "cpu" / "cpu.cfs_quota_us", cgroup / "cpu" / "cpu.cfs_period_us")
    for version in files:
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            quota, period = map(float, " ".join(file.read_text() for file in version).split())
            return quota / period if quota > 0 else None
    return None


def gpu_count() -> int:
    """GPUs that this process may use."""
    import torch

    return int(torch.cuda.device_count())
