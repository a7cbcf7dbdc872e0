"""The feature networks of a grid of trials, one each, against one service for all of them: the same work for both.

Every trial embeds the samples and the ground truth of the same batches, for two epochs. Its completions are its own,
but for a share that is the same in all trials. One after another in this process, trials with a network each take as
many CPU seconds as they would in concurrent processes; trials of the service wait concurrently, in threads.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from benchmarks.measure import empty_cache, local_ray
from benchmarks.rows import Row, Titled, judged
from benchmarks.settings import DEPTHS, Settings
from benchmarks.workload import Inputs, model_config, prepare, random_inputs, random_model, setting_rows
from ebft_study.features import FeatureBackend, Features, NetworkOptions
from ebft_study.features.keys import FeatureSpec
from ebft_study.features.local import LocalFeatures
from ebft_study.networks.loading import load_model
from ebft_study.pretraining.ladder import train_tokenizer

EPOCHS = 2
TOLERANCE = 1e-6
"""Largest difference of features."""
TIMEOUT_SECONDS = 600.0
SPEC = FeatureSpec(DEPTHS, "last_token", "per_layer")


@dataclass(frozen=True)
class Grid:
    """The work of all trials."""

    settings: Settings
    trials: int = 9
    steps: int = 3
    """Batches of an epoch, of `settings.batch_size` sequences."""
    shared_completions: float = 0.25

    def batches(self) -> list[Inputs]:
        """Batches of an epoch, and a further one to warm up; new objects every time."""
        size = self.settings.batch_size
        return list(random_inputs(replace(self.settings, batch_size=size * (self.steps + 1))).parts(size))

    def completions(self, epoch: int, trial: int, step: int, inputs: Inputs) -> Tensor:
        """[S, B, n, G], drawn anew in each epoch."""
        seed = (epoch * (self.steps + 1) + step) * (self.trials + 1)
        common, own = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1 + trial)
        shape, vocabulary = inputs.noise.shape, model_config(self.settings.model).vocab_size
        shared = torch.rand(shape[:3], generator=common) < self.shared_completions
        of_all, of_trial = (torch.randint(0, vocabulary, shape, generator=generator) for generator in (common, own))
        return torch.where(shared[..., None], of_all, of_trial)

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
class Contender:
    """The cost of one way of doing the work, epoch by epoch, and its features in the order epoch, trial, step."""

    cpu_seconds: list[float] = field(default_factory=list)
    """CPU seconds of the processes that have the networks."""
    client_seconds: list[float] = field(default_factory=list)
    """CPU seconds of the trials' own end, where the networks are elsewhere."""
    wall_seconds: list[float] = field(default_factory=list)
    usage: list[dict[str, tuple[float, float]]] = field(default_factory=list)
    """See `FeatureBackend.drain_usage`, summed over trials."""
    network_bytes: int = 0
    resident_bytes: int = 0
    """Memory of the service's process, at the end."""
    features: list[Features] = field(default_factory=list)


def tables(grid: Grid) -> Iterator[Titled]:
    """Both contenders, with a cache folder that is empty before and deleted afterwards.

    Raises:
        ConfigError: settings that no run could have.
        ServiceError: the service has ended, or does not answer.
    """
    prepare(grid.settings)
    names = ("model", "sequence_length", "n_samples", "completion_length", "batch_size")
    sizes = {"trials": grid.trials, "steps": grid.steps, "shared_completions": grid.shared_completions}
    yield "setting", setting_rows(grid.settings, *names, **sizes)
    with network_folder(grid.settings) as folder, empty_cache():
        local = run_local(grid, folder)
        with local_ray():
            service = run_service(grid, folder)
    rows = [*epoch_rows(local, service), *total_rows(local, service), agreement_row(local.features, service.features)]
    yield "features", rows


@contextmanager
def network_folder(settings: Settings) -> Iterator[Path]:
    """A random network on disk, as a hub or a ladder would have it."""
    with tempfile.TemporaryDirectory(prefix="ebft-bench-") as name:
        random_model(settings).save_pretrained(name)
        # Nothing is encoded, but no network is loaded without a tokenizer.
        train_tokenizer(["nothing to read"], 300).save_pretrained(name)
        yield Path(name)


# --- contenders ------------------------------------------------------------------------------------------------


def run_local(grid: Grid, folder: Path) -> Contender:
    """A network of its own for every trial; all are in memory, and used one after another."""
    local = Contender()
    backends = [
        LocalFeatures(load_model(str(folder)).model, depths=SPEC.depths, pooling=SPEC.pooling, normalize=SPEC.normalize)
        for _ in range(grid.trials)
    ]
    local.network_bytes = sum(tensor_bytes(backend.network) for backend in backends)
    grid.warm_up(backends[0])
    for epoch in range(EPOCHS):
        cpu, wall = time.process_time(), time.perf_counter()
        for trial, backend in enumerate(backends):
            local.features += grid.run_trial(backend, epoch, trial)
        local.cpu_seconds.append(time.process_time() - cpu)
        local.wall_seconds.append(time.perf_counter() - wall)
    return local


def run_service(grid: Grid, folder: Path) -> Contender:
    """One network in an actor, called by one thread per trial; Ray runs."""
    import ray

    from ebft_study.features.service import ServiceFeatures, start_service

    options = NetworkOptions.from_config(
        grid.settings.run(), device=torch.device("cpu"), threads=torch.get_num_threads()
    )
    options = replace(options, name=str(folder))
    # The service lives as long as this handle.
    handle = start_service(options)
    backends = [ServiceFeatures(options, SPEC, timeout_seconds=TIMEOUT_SECONDS) for _ in range(grid.trials)]
    process = psutil.Process(ray.get(handle.process_id.remote()))
    service = Contender(network_bytes=tensor_bytes(load_model(str(folder)).model))
    grid.warm_up(backends[0])
    _drain(backends)
    for epoch in range(EPOCHS):
        cpu, client, wall = _cpu_seconds(process), time.process_time(), time.perf_counter()
        with ThreadPoolExecutor(grid.trials) as pool:
            for features in pool.map(grid.run_trial, backends, [epoch] * grid.trials, range(grid.trials)):
                service.features += features
        service.cpu_seconds.append(_cpu_seconds(process) - cpu)
        service.client_seconds.append(time.process_time() - client)
        service.wall_seconds.append(time.perf_counter() - wall)
        service.usage.append(_drain(backends))
    service.resident_bytes = int(process.memory_info().rss)
    ray.kill(handle)
    return service


def _drain(backends: Sequence[FeatureBackend]) -> dict[str, tuple[float, float]]:
    """Sums and counts that all trials measured since the last call."""
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
    """Bytes of all weights and buffers, shared ones once."""
    tensors = [*network.parameters(), *network.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


# --- rows ------------------------------------------------------------------------------------------------------


def epoch_rows(local: Contender, service: Contender) -> Iterator[Row]:
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
            hits, lookups = usage[column]
            yield Row(f"{name}/{column}", hits / lookups, cell=True)
        for column in ("tokens_embedded", "tokens_saved"):
            yield Row(f"{name}/{column}", int(usage[f"feature_{column}"][0]), cell=True)


def total_rows(local: Contender, service: Contender) -> list[Row]:
    """Sums of both epochs, and memory. The service's CPU seconds include those of the trials that wait for it."""
    totals = {
        "cpu": ("s", sum(local.cpu_seconds), sum(service.cpu_seconds) + sum(service.client_seconds)),
        "network_bytes": ("B", local.network_bytes, service.network_bytes),
    }
    rows = []
    for name, (unit, of_local, of_service) in totals.items():
        rows += [
            Row(f"features/{name}/local", of_local, unit),
            Row(f"features/{name}/service", of_service, unit),
            Row(f"features/{name}/saved", of_local / of_service, "x"),
        ]
    return [*rows, Row("features/service/resident_bytes", service.resident_bytes, "B")]


def agreement_row(local: Sequence[Features], service: Sequence[Features]) -> Row:
    """The largest difference of any feature; NaN in any of them is a failure."""
    differences = [
        (first - second).abs().max()
        for ours, theirs in zip(local, service, strict=True)
        for first, second in ((ours.phi, theirs.phi), (ours.psi, theirs.psi))
    ]
    # Unlike Python's, this maximum keeps NaN.
    return judged("agreement/service_features", float(torch.stack(differences).max()), TOLERANCE)
