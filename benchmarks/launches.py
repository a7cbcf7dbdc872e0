"""Kernels of a step on a GPU, counted on any machine.

The code that a GPU would run is run with the micro-batches, parts and tokens of the settings, but one sequence to a
micro-batch and tiny widths, of which the number of kernels does not depend. It is linear in the number of layers, so
two small numbers tell that of the real model. Every operation of PyTorch that computes counts as one kernel, the fused
attention as one forward and three backward; views and allocations launch nothing. Some operations launch a few
(sorting, decompositions), and lists of tensors one per 20 million numbers: `make gpu` counts what a GPU launches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config

from benchmarks import workload
from benchmarks.contenders import Networks, Ours
from benchmarks.settings import MODELS, Settings, ladder
from ebft_study.algorithm import attention, flex_attention
from ebft_study.cost import Limits, MicroBatchPlan
from ebft_study.features import local
from ebft_study.methods import MetricAccumulator
from ebft_study.networks import blocks

TINY = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "vocab_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
LAYERS = 4, 8
"""Two numbers of layers of which every depth of the features is a whole number."""
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}
SYNCHRONISATIONS = {"_local_scalar_dense", "nonzero", "masked_select"}
"""Operations that wait for the GPU; so do boolean indices."""


@dataclass
class Launches(MetricAccumulator):
    """Observes a step and counts its kernels, views and synchronisations, by phase."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)

    @contextmanager
    def seconds(self, name: str, device: torch.device) -> Iterator[None]:
        with Counting(self.counts.setdefault(name, Counter())), super().seconds(name, device):
            yield

    @property
    def total(self) -> Counter[str]:
        return sum(self.counts.values(), Counter[str]())


class Counting(TorchDispatchMode):
    """Counts operations into `counts`."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts, self.host = counts, _ReadsOnHost(counts)

    def __enter__(self) -> Counting:
        self.host.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.host.__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.is_view:
            self.counts["views"] += 1
        elif name in SYNCHRONISATIONS or (name in ("index", "index_put_", "index_put") and _has_mask(args[1])):
            self.counts["synchronisations"] += 1
        elif name not in ALLOCATIONS:
            self.counts["kernels"] += 1
        return func(*args, **(kwargs or {}))


class _ReadsOnHost(TorchFunctionMode):
    """Counts copies to the host, which on a CPU are no operations."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("cpu", "tolist", "numpy"):
            self.counts["synchronisations"] += 1
        return func(*args, **(kwargs or {}))


def _has_mask(indices: list[Tensor | None]) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


class _FusedAttention(torch.autograd.Function):
    """Stands for the compiled attention: as many kernels, and no result."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return torch.zeros_like(query)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(torch.zeros_like(tensor) for tensor in ctx.saved_tensors)


def _fused(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    return _FusedAttention.apply(query, key, value)  # type: ignore[no-any-return,no-untyped-call]


@contextmanager
def as_on_a_gpu(sequences: int, vocabulary_size: int) -> Iterator[None]:
    """Passes inside take the way of a GPU, with the chunks that micro-batches of so many sequences have there."""
    limits = Limits.on("cuda")
    rows = max(1, limits.logits_at_once // vocabulary_size // sequences)
    with ExitStack() as patches:
        for target, name, value in (
            (blocks, "backend_on", lambda device: "flex"),
            (blocks, "logits_at_once", lambda device: rows * TINY["vocab_size"]),
            (local, "TOKENS_PER_PASS", {"cpu": limits.feature_tokens_at_once // sequences}),
            (flex_attention, "flex_attention", _fused),
            (attention, "fused_on", lambda device: False),
            (attention, "CHUNKS", {"cpu": limits.chunks}),
        ):
            patches.enter_context(patch.object(target, name, value))
        yield


def count(settings: Settings, plan: MicroBatchPlan) -> Launches:
    """Kernels, views and synchronisations of a step of the settings' model under a plan."""
    shape, sizes = settings.shape, MODELS.get(settings.model) or ladder()[settings.model]
    alone = replace(
        settings,
        device="cpu",
        batch_size=-(-shape.sequences_per_worker // plan.micro_batch_size),
        micro_batch_size=1,
        anchors_at_once=plan.anchors_at_once,
    )
    counted = []
    for n_layers in LAYERS:
        small = Qwen2Config(**{**sizes, **TINY, "num_hidden_layers": n_layers})
        made = patch.object(workload, "model_config", lambda name, small=small: small)
        with made, as_on_a_gpu(plan.micro_batch_size, sizes["vocab_size"]):
            ours = Ours(alone, Networks.from_settings(alone))
            for parameter in ours.networks.parameters:
                parameter.grad = torch.zeros_like(parameter)
            ours.networks.update()  # makes the optimizer's states
            launches = Launches()
            ours.step(launches)
            counted.append(launches)
    few, many = counted
    more = (sizes["num_hidden_layers"] - LAYERS[0]) / (LAYERS[1] - LAYERS[0])
    return Launches(
        counts={
            phase: Counter(
                {kind: round(n + more * (many.counts[phase][kind] - n)) for kind, n in few.counts[phase].items()}
            )
            for phase in few.counts
        }
    )
