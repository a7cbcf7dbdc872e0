"""A policy's weights in shared memory: written by its trainer after updates, read by its engine.

The file in /dev/shm is private to the user, and is unlinked as soon as the engine has mapped it. So nothing is left
behind, whichever process is killed.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ebft_study.errors import ConfigError

SHARED_MEMORY = Path("/dev/shm")
_ALIGNMENT = 64


@dataclass(frozen=True)
class Layout:
    """Names, shapes and types of a segment's tensors, as plain values."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]

    @staticmethod
    def from_weights(weights: dict[str, Tensor], dtype: torch.dtype | None = None) -> Layout:
        """`dtype`: the type of all tensors in the segment; default: their types in the model."""
        dtypes = [dtype or tensor.dtype for tensor in weights.values()]
        return Layout(
            tuple(weights),
            tuple(tuple(tensor.shape) for tensor in weights.values()),
            tuple(str(dtype).removeprefix("torch.") for dtype in dtypes),
        )

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype, int, int]]:
        """Yield name, shape, type, first byte and number of bytes of every tensor."""
        offset = 0
        for name, shape, dtype_name in zip(self.names, self.shapes, self.dtypes, strict=True):
            dtype: torch.dtype = getattr(torch, dtype_name)
            size = math.prod(shape) * dtype.itemsize
            yield name, shape, dtype, offset, size
            offset += -(-size // _ALIGNMENT) * _ALIGNMENT

    @property
    def n_bytes(self) -> int:
        return max((offset + size for *_, offset, size in self.tensors()), default=0)


def views(path: str, layout: Layout) -> dict[str, Tensor]:
    """Map the tensors of a segment: writes of one process are seen by the others."""
    # Unlike torch.from_file, this never creates a missing file.
    with open(path, "r+b") as file:
        flat = torch.frombuffer(mmap.mmap(file.fileno(), layout.n_bytes), dtype=torch.uint8)
    return {
        name: flat[offset : offset + size].view(dtype).view(shape)
        for name, shape, dtype, offset, size in layout.tensors()
    }


class SharedWeights:
    """The trainer's end of a segment."""

    def __init__(
        self, weights: dict[str, Tensor], *, dtype: torch.dtype | None = None, folder: Path = SHARED_MEMORY
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
            self._views = views(self.path, self.layout)
        except OSError as error:
            self.unlink()
            raise ConfigError(
                f"rollout.backend='vllm': {folder} has no room for {self.layout.n_bytes / 2**20:.0f} MiB of weights "
                f"({error.strerror}). Give it more (docker: --shm-size), or use backend=strided"
            ) from None
        finally:
            os.close(descriptor)

    @torch.no_grad()
    def write(self, weights: dict[str, Tensor]) -> None:
        """Overwrite all tensors; no process may be reading them."""
        for name, view in self._views.items():
            view.copy_(weights[name])

    def unlink(self) -> None:
        """Remove the file's name; processes that have mapped it can use it until they end."""
        Path(self.path).unlink(missing_ok=True)


@torch.no_grad()
def policy_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's weights under the names of its checkpoint, tied ones once and adapters merged.

    Sharded weights must be unsharded first. Only the weights that adapters change are copied.
    """
    adapters = _adapters(model)
    weights = {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if ".lora_" in name:
            continue
        base = owner.removesuffix(".base_layer")
        merged = leaf == "weight" and base in adapters
        value = parameter.detach()
        weights[f"{base}.{leaf}"] = value + adapters[base].get_delta_weight("default").to(value) if merged else value
    return weights


def _adapters(model: nn.Module) -> dict[str, Any]:
    if not any(".lora_" in name for name, _ in model.named_parameters()):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
