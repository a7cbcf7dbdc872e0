"""A policy's weights in shared memory: written by its trainer after updates, read by its engine.

    trainer   parameters, adapters merged -> bucket on the trainer's device -> segment, one copy per bucket
    engine    segment -> bucket on the engine's device, one copy per bucket -> its loader, tensor by tensor

Besides the segment a transfer takes the memory of a bucket or two, whatever the size of the model. On a CPU a bucket
stays in its cache: merging whole matrices touches fresh pages for each of them, which takes most of the time there.

The file in /dev/shm is private to the user, and is unlinked as soon as the engine has mapped it. So nothing is left
behind, whichever process is killed.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ebft_study.errors import ConfigError
from ebft_study.networks.lora import adapted_layers, copy_merged_rows

SHARED_MEMORY = Path("/dev/shm")  # whose room is checked before (`training.engine_memory`)
_ALIGNMENT = 64
_BUCKET_BYTES = {"cpu": 2**21}
_DEVICE_BUCKET_BYTES = 2**26
_POPULATE = getattr(mmap, "MAP_POPULATE", 0)  # pages mapped at once; one by one they take ten times as long


class Part(NamedTuple):
    """Some rows of a tensor in a segment: all axes but the last are counted as one."""

    name: str
    dtype: torch.dtype
    rows: slice
    shape: tuple[int, ...]
    """Of these rows; of a whole tensor, its own."""
    start: int
    """First byte in the segment."""
    stop: int

    def view(self, flat: Tensor, origin: int = 0) -> Tensor:
        """The part in bytes of the segment of which the first is number `origin`."""
        return flat[self.start - origin : self.stop - origin].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Layout:
    """Names, shapes and types of a segment's tensors, as plain values."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]

    @staticmethod
    def from_weights(weights: Mapping[str, Weight], dtype: torch.dtype | None = None) -> Layout:
        """`dtype`: the type of all tensors in the segment; default: their types in the model."""
        dtypes = [dtype or weight.value.dtype for weight in weights.values()]
        return Layout(
            tuple(weights),
            tuple(tuple(weight.value.shape) for weight in weights.values()),
            tuple(str(dtype).removeprefix("torch.") for dtype in dtypes),
        )

    def tensors(self) -> Iterator[Part]:
        """Yield every tensor."""
        offset = 0
        for name, shape, dtype_name in zip(self.names, self.shapes, self.dtypes, strict=True):
            dtype: torch.dtype = getattr(torch, dtype_name)
            size = math.prod(shape) * dtype.itemsize
            yield Part(name, dtype, slice(0, math.prod(shape[:-1])), shape, offset, offset + size)
            offset += -(-size // _ALIGNMENT) * _ALIGNMENT

    def pieces(self, limit: int) -> Iterator[Part]:
        """Yield every tensor, cut into rows where it has more than `limit` bytes; a piece has at least 64 rows."""
        for name, dtype, rows, shape, start, stop in self.tensors():
            n_rows, row_bytes = rows.stop, (stop - start) // max(rows.stop, 1)
            # Pieces of a multiple of 64 rows are as aligned as tensors are.
            step = max(limit // max(row_bytes, 1) // _ALIGNMENT, 1) * _ALIGNMENT
            for first in range(0, n_rows, step):
                last = min(first + step, n_rows)
                bounds = start + first * row_bytes, start + last * row_bytes
                yield Part(name, dtype, slice(first, last), (last - first, shape[-1] if shape else 1), *bounds)

    @property
    def n_bytes(self) -> int:
        return max((part.stop for part in self.tensors()), default=0)


def buckets(parts: Iterable[Part], limit: int) -> Iterator[list[Part]]:
    """Group consecutive parts that lie within `limit` bytes; a larger one is alone."""
    bucket: list[Part] = []
    for part in parts:
        if bucket and part.stop - bucket[0].start > limit:
            yield bucket
            bucket = []
        bucket.append(part)
    if bucket:
        yield bucket


def _bucket_bytes(device: torch.device) -> int:
    return _BUCKET_BYTES.get(device.type, _DEVICE_BUCKET_BYTES)


class Segment:
    """A mapped segment: writes of one process are seen by the others."""

    def __init__(self, path: str, layout: Layout) -> None:
        self.layout = layout
        # Unlike torch.from_file, this never creates a missing file.
        with open(path, "r+b") as file:
            mapped = mmap.mmap(file.fileno(), layout.n_bytes, flags=mmap.MAP_SHARED | _POPULATE)
        self.flat = torch.frombuffer(mapped, dtype=torch.uint8)

    @torch.no_grad()
    def write(self, weights: Mapping[str, Weight]) -> None:
        """Overwrite all tensors; no process may be reading them."""
        device = next((weight.value.device for weight in weights.values()), torch.device("cpu"))
        parts = [*buckets(self.layout.pieces(_bucket_bytes(device)), _bucket_bytes(device))]
        # Both are kept for all buckets: memory that is freed and taken again has to be mapped again, page by page.
        room = torch.empty(max(each[-1].stop - each[0].start for each in parts), dtype=torch.uint8, device=device)
        scratch = torch.empty(max(math.prod(part.shape) for each in parts for part in each), device=device)
        for bucket in parts:
            start, stop = bucket[0].start, bucket[-1].stop
            for part in bucket:
                weights[part.name].copy_rows(part.rows, part.view(room, start), scratch)
            self.flat[start:stop].copy_(room[: stop - start])

    def read(self, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors: on a CPU those of the segment itself, else copies, of which a bucket is made at a time."""
        for bucket in buckets(self.layout.tensors(), _bucket_bytes(device)):
            start = bucket[0].start
            copied = self.flat[start : bucket[-1].stop].to(device)
            for part in bucket:
                yield part.name, part.view(copied, start)


class SharedWeights:
    """The trainer's end of a segment."""

    def __init__(
        self, weights: Mapping[str, Weight], *, dtype: torch.dtype | None = None, folder: Path = SHARED_MEMORY
    ) -> None:
        """Allocate tensors of these names, shapes and types, or of type `dtype`; `write` fills them.

        Raises:
            ConfigError: not enough shared memory.
        """
        self.layout = Layout.from_weights(weights, dtype)
        descriptor, self.path = tempfile.mkstemp(prefix="ebft-weights-", dir=folder)
        try:
            # Without reserved room, a full tmpfs would kill the process at some later write.
            os.posix_fallocate(descriptor, 0, self.layout.n_bytes)
            self._segment = Segment(self.path, self.layout)
        except OSError as error:
            self.unlink()
            raise ConfigError(
                f"rollout.backend='vllm': {folder} has no room for {self.layout.n_bytes / 2**20:.0f} MiB of weights "
                f"({error.strerror}). Give it more (docker: --shm-size), or use backend=strided"
            ) from None
        finally:
            os.close(descriptor)

    def write(self, weights: Mapping[str, Weight]) -> None:
        """Overwrite all tensors; no process may be reading them."""
        self._segment.write(weights)

    def unlink(self) -> None:
        """Remove the file's name; processes that have mapped it can use it until they end."""
        Path(self.path).unlink(missing_ok=True)


class Weight(NamedTuple):
    """A weight of a policy: a parameter, with the adapters of its layer merged where it has any."""

    value: Tensor
    adapted: Any = None
    """The adapted layer whose weight it is."""

    def copy_rows(self, rows: slice, target: Tensor, scratch: Tensor) -> None:
        """Write rows into `target` [rows, columns], in its type; `scratch` is float32, and as large."""
        value = self.value.detach().reshape(-1, target.shape[-1])[rows]
        if self.adapted is None:
            target.copy_(value)
        else:
            copy_merged_rows(self.adapted, value, rows, target, scratch)


def policy_weights(model: nn.Module) -> dict[str, Weight]:
    """Return the model's weights under the names of its checkpoint, tied ones once; adapters are merged when copied.

    Sharded weights must be unsharded first.
    """
    adapted, weights = adapted_layers(model), {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if ".lora_" in name:
            continue
        base = owner.removesuffix(".base_layer")
        weights[f"{base}.{leaf}"] = Weight(parameter, adapted.get(base) if leaf == "weight" else None)
    return weights
