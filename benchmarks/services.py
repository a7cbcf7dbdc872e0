"""The feature networks of a grid of trials, one each, against one service for all of them: the same work on both sides.

Every trial embeds the samples and the ground truth of the same batches, for two epochs. Its completions are its own,
but for a share that all trials have drawn alike. One after another in this process, trials with a network each take as
many seconds of CPU as they would side by side in processes of their own; trials of the service wait side by side.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor, nn

from benchmarks import running
from benchmarks.cluster import empty_cache, local_ray, require
from benchmarks.rows import Row, judged
from benchmarks.settings import DEPTHS, Settings
from benchmarks.shapes import Inputs, model_config, random_inputs, random_model
from ebft_study.features import FeatureBackend, Features, NetworkOptions
from ebft_study.features.keys import FeatureSpec
from ebft_study.features.local import LocalFeatures
from ebft_study.networks.loading import load_model
from ebft_study.pretraining.ladder import train_tokenizer

if TYPE_CHECKING:
    from ebft_study.features.service import ServiceFeatures

EPOCHS = 2
TOLERANCE = 1e-6
"""Of features."""
TIMEOUT_SECONDS = 600.0
SPEC = FeatureSpec(DEPTHS, "last_token", "per_layer")


@dataclass(frozen=True)
class Grid:
    """What all trials together ask for."""

    settings: Settings
    trials: int = 9
    steps: int = 3
    """Batches of an epoch, of `settings.batch_size` sequences."""
    shared_completions: float = 0.25

    def batches(self) -> list[Inputs]:
        """Those of an epoch, and a further one to warm up; new objects every time."""
        size = self.settings.batch_size
        return list(random_inputs(replace(self.settings, batch_size=size * (self.steps + 1))).parts(size))

    def completions(self, epoch: int, trial: int, step: int, inputs: Inputs) -> Tensor:
        """[S, B, n, G], drawn anew in each epoch."""
        first = (epoch * (self.steps + 1) + step) * (self.trials + 1)
        common, own = torch.Generator().manual_seed(first), torch.Generator().manual_seed(first + 1 + trial)
        shape, vocabulary = inputs.noise.shape, model_config(self.settings.model).vocab_size
        alike = torch.rand(shape[:3], generator=common) < self.shared_completions
        everyones, ours = (torch.randint(0, vocabulary, shape, generator=generator) for generator in (common, own))
        return torch.where(alike[..., None], everyones, ours)

    def run_trial(self, backend: FeatureBackend, epoch: int, trial: int) -> list[Features]:
        """One epoch of one trial."""
        return [
            backend.embed(inputs.batch, inputs.anchors, self.completions(epoch, trial, step, inputs))[0]
            for step, inputs in enumerate(self.batches()[:-1])
        ]

    def warm_up(self, backend: FeatureBackend) -> None:
        """One batch that no epoch contains."""
        inputs = self.batches()[-1]
        backend.embed(inputs.batch, inputs.anchors, self.completions(0, 0, self.steps, inputs))


@dataclass
class Side:
    """What one way of doing the work cost, epoch by epoch, and its features in the order epoch, trial, step."""

    cpu_seconds: list[float] = field(default_factory=list)
    """Of the processes that hold the networks."""
    client_seconds: list[float] = field(default_factory=list)
    """CPU seconds of the trials' own end, where the networks are elsewhere."""
    wall_seconds: list[float] = field(default_factory=list)
    usage: list[dict[str, tuple[float, float]]] = field(default_factory=list)
    """See `FeatureBackend.drain_usage`, summed over trials."""
    network_bytes: int = 0
    resident_bytes: int = 0
    """Of the service's process, at the end."""
    features: list[Features] = field(default_factory=list)


def sections(grid: Grid) -> Iterator[tuple[str, list[Row]]]:
    """All rows.

    Raises:
        ConfigError: Ray is not installed, or settings that no run could have.
        ServiceError: the service is gone or silent.
    """
    require("features", "ray")
    running.check(grid.settings)
    if grid.settings.threads:
        torch.set_num_threads(grid.settings.threads)
    yield "setting", _setting_rows(grid)
    yield "features", measure(grid)


def measure(grid: Grid) -> list[Row]:
    """Both sides, with a cache folder that is empty before and gone afterwards."""
    with network_folder(grid.settings) as folder, empty_cache():
        local = local_side(grid, folder)
        with local_ray():
            service = service_side(grid, folder)
    return [*epoch_rows(local, service), *total_rows(local, service), agreement_row(local.features, service.features)]


@contextmanager
def network_folder(settings: Settings) -> Iterator[Path]:
    """A random network on disk, as a hub or a ladder would have it."""
    with tempfile.TemporaryDirectory(prefix="ebft-bench-") as name:
        random_model(settings).save_pretrained(name)
        # Nothing is encoded, but no network is loaded without a tokenizer.
        train_tokenizer(["nothing to read"], 300).save_pretrained(name)
        yield Path(name)


def _setting_rows(grid: Grid) -> list[Row]:
    settings = grid.settings
    facts: dict[str, float | str] = {
        "torch": str(torch.__version__),
        "model": settings.model,
        "sequence_length": settings.sequence_length,
        "n_samples": settings.n_samples,
        "completion_length": settings.completion_length,
        "batch_size": settings.batch_size,
        "threads": torch.get_num_threads(),
        "trials": grid.trials,
        "steps": grid.steps,
        "shared_completions": grid.shared_completions,
    }
    return [Row(f"setting/{name}", value) for name, value in facts.items()]


# --- the two sides ---------------------------------------------------------------------------------------------


def local_side(grid: Grid, folder: Path) -> Side:
    """A network of its own for every trial; all are held at a time, and used one after another."""
    side = Side()
    backends = [
        LocalFeatures(load_model(str(folder)).model, depths=SPEC.depths, pooling=SPEC.pooling, normalize=SPEC.normalize)
        for _ in range(grid.trials)
    ]
    side.network_bytes = sum(tensor_bytes(backend.network) for backend in backends)
    grid.warm_up(backends[0])
    for epoch in range(EPOCHS):
        cpu, wall = time.process_time(), time.perf_counter()
        for trial, backend in enumerate(backends):
            side.features += grid.run_trial(backend, epoch, trial)
        side.cpu_seconds.append(time.process_time() - cpu)
        side.wall_seconds.append(time.perf_counter() - wall)
    return side


def service_side(grid: Grid, folder: Path) -> Side:
    """One network in an actor, asked by one thread per trial; Ray runs."""
    import ray

    from ebft_study.features.service import ServiceFeatures, start_service

    run = grid.settings.run()
    options = replace(
        NetworkOptions.from_config(run, device=torch.device("cpu"), threads=torch.get_num_threads()), name=str(folder)
    )
    # The service lives as long as this handle.
    handle = start_service(options)
    backends = [ServiceFeatures(options, SPEC, timeout_seconds=TIMEOUT_SECONDS) for _ in range(grid.trials)]
    process = psutil.Process(ray.get(handle.process_id.remote()))
    side = Side(network_bytes=tensor_bytes(load_model(str(folder)).model))
    grid.warm_up(backends[0])
    _drain(backends)
    for epoch in range(EPOCHS):
        _service_epoch(grid, backends, process, epoch, side)
    side.resident_bytes = int(process.memory_info().rss)
    ray.kill(handle)
    return side


def _service_epoch(
    grid: Grid, backends: Sequence[ServiceFeatures], process: psutil.Process, epoch: int, side: Side
) -> None:
    cpu, client, wall = _cpu_seconds(process), time.process_time(), time.perf_counter()
    with ThreadPoolExecutor(len(backends)) as pool:
        trials = range(len(backends))
        for features in pool.map(lambda trial: grid.run_trial(backends[trial], epoch, trial), trials):
            side.features += features
    side.cpu_seconds.append(_cpu_seconds(process) - cpu)
    side.client_seconds.append(time.process_time() - client)
    side.wall_seconds.append(time.perf_counter() - wall)
    side.usage.append(_drain(backends))


def _drain(backends: Sequence[ServiceFeatures]) -> dict[str, tuple[float, float]]:
    """What all trials measured since the last time, added up."""
    summed: dict[str, tuple[float, float]] = {}
    for backend in backends:
        for name, (total, count) in backend.drain_usage().items():
            before = summed.get(name, (0.0, 0.0))
            summed[name] = (before[0] + total, before[1] + count)
    return summed


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def tensor_bytes(network: nn.Module) -> int:
    """Of all weights and buffers, shared ones once."""
    tensors = [*network.parameters(), *network.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


# --- rows ------------------------------------------------------------------------------------------------------


def epoch_rows(local: Side, service: Side) -> Iterator[Row]:
    """A line per epoch: seconds, hits, tokens."""
    for epoch, usage in enumerate(service.usage):
        name = f"features/epoch_{epoch + 1}"
        seconds = {
            "local_cpu": local.cpu_seconds,
            "service_cpu": service.cpu_seconds,
            "clients_cpu": service.client_seconds,
            "local_wall": local.wall_seconds,
            "service_wall": service.wall_seconds,
        }
        for column, values in seconds.items():
            yield Row(f"{name}/{column}", values[epoch], "s", cell=True)
        for column in ("sample_hit_rate", "ground_truth_hit_rate"):
            found, asked = usage[column]
            yield Row(f"{name}/{column}", found / asked, cell=True)
        for column in ("tokens_embedded", "tokens_saved"):
            yield Row(f"{name}/{column}", int(usage[f"feature_{column}"][0]), cell=True)


def total_rows(local: Side, service: Side) -> list[Row]:
    """Both epochs together, and memory. The service's CPU seconds include those of the trials that wait for it."""
    alone, together = sum(local.cpu_seconds), sum(service.cpu_seconds) + sum(service.client_seconds)
    return [
        Row("features/cpu/local", alone, "s"),
        Row("features/cpu/service", together, "s"),
        Row("features/cpu/saved", alone / together, "x"),
        Row("features/network_bytes/local", local.network_bytes, "B"),
        Row("features/network_bytes/service", service.network_bytes, "B"),
        Row("features/network_bytes/saved", local.network_bytes / service.network_bytes, "x"),
        Row("features/service/resident_bytes", service.resident_bytes, "B"),
    ]


def agreement_row(local: Sequence[Features], service: Sequence[Features]) -> Row:
    """The largest difference of any feature; it fails where one is no number, too."""
    differences = [
        (one - other).abs().max()
        for own, asked in zip(local, service, strict=True)
        for one, other in ((own.phi, asked.phi), (own.psi, asked.psi))
    ]
    # Unlike Python's, this maximum keeps NaN.
    return judged("agreement/service_features", float(torch.stack(differences).max()), TOLERANCE)
