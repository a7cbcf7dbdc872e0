"""Models, inputs and costs of the settings that are measured.

Weights and tokens are random: what a step costs does not depend on their values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from benchmarks.settings import MODELS, Settings, ladder
from ebft_study.algorithm.anchors import Anchors, find_anchors
from ebft_study.algorithm.losses import next_token_mask
from ebft_study.cost import Limits, MicroBatchPlan, ModelShape, StepCost, StepShape, largest_plan, step_cost
from ebft_study.data import Batch
from ebft_study.methods import LossDenominators
from ebft_study.networks.blocks import ATTENTION

CPU_TOKENS = 512
"""Tokens of a decoding pass that fill a CPU's matrix products and still fit into its cache."""
FEW_TOKENS = 128
"""Tokens of a decoding pass where memory matters more: a tenth slower on two threads, no slower on one."""
MEMORY_SHARE = 0.75
"""Of a GPU, for our step; the rest is for the naive feature network and for fragmentation."""


def device_type(settings: Settings) -> str:
    """`cpu` or `cuda`."""
    return torch.device(settings.device).type


def autocast(settings: Settings) -> AbstractContextManager[Any]:
    """Activations in the settings' precision; weights stay float32, as in training."""
    return torch.autocast(device_type(settings), torch.bfloat16, enabled=settings.precision == "bfloat16")


def compute_dtype(settings: Settings) -> torch.dtype:
    """Type that matrix products compute in."""
    return torch.float32 if settings.precision == "float32" else torch.bfloat16


def model_config(name: str) -> Qwen2Config:
    """The shape called `name`."""
    return Qwen2Config(**(MODELS.get(name) or ladder()[name]))


def random_model(settings: Settings) -> PreTrainedModel:
    """The settings' model with random weights, made on its device, in training mode."""
    torch.manual_seed(0)
    with torch.device(settings.device):
        config = model_config(settings.model)
        model: PreTrainedModel = Qwen2ForCausalLM._from_config(config, attn_implementation=ATTENTION)
    return model.train()


# --- what a step costs -----------------------------------------------------------------------------------------


def split_of(settings: Settings) -> MicroBatchPlan:
    """How our step is cut: as asked for; else to fill a CPU's matrix products, or a GPU's memory."""
    step, shape = StepShape.from_config(settings.run()), ModelShape.from_config(model_config(settings.model))
    split = MicroBatchPlan.whole(step)
    if device_type(settings) == "cuda":
        memory = torch.cuda.get_device_properties(settings.device).total_memory
        split = largest_plan(shape, shape, step, budget_bytes=MEMORY_SHARE * memory)
    else:
        fitting = max(CPU_TOKENS // (settings.batch_size * settings.n_samples), 1)
        split = replace(split, anchors_at_once=min(fitting, split.anchors_at_once))
    return MicroBatchPlan(
        settings.micro_batch_size or split.micro_batch_size, settings.anchors_at_once or split.anchors_at_once
    )


def cost_of(settings: Settings, *, counting: Literal["needed", "executed"]) -> StepCost:
    """The cost model's account of our step."""
    shape, step = ModelShape.from_config(model_config(settings.model)), StepShape.from_config(settings.run())
    limits = Limits.on(device_type(settings))
    return step_cost(shape, shape, step, split=split_of(settings), limits=limits, counting=counting)


# --- inputs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """Sequences, where they are cut, and the noise [S, B, n, G] that draws their completions."""

    batch: Batch
    anchors: Anchors
    noise: Tensor

    def __len__(self) -> int:
        return len(self.batch.tokens)

    def parts(self, size: int) -> Iterator[Inputs]:
        """At most `size` sequences at a time, every time as a new batch: nothing can be known of it from before."""
        for rows in torch.arange(len(self), device=self.batch.tokens.device).split(size):
            yield Inputs(self.batch.select(rows), Anchors(*(t[rows] for t in self.anchors)), self.noise[rows])

    @property
    def denominators(self) -> LossDenominators:
        ce_tokens = next_token_mask(self.batch.document_ids).sum()
        return LossDenominators(contexts=float(self.anchors.valid.sum()), ce_tokens=float(ce_tokens))


def random_inputs(settings: Settings) -> Inputs:
    """Sequences of one document each, full of random tokens."""
    S, T, vocabulary = settings.batch_size, settings.sequence_length, model_config(settings.model).vocab_size
    tokens = torch.randint(0, vocabulary, (S, T), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens, torch.zeros_like(tokens), tokens >= 0, torch.arange(S)).to(settings.device)
    G, stride = settings.completion_length, settings.stride
    anchors = find_anchors(batch.document_ids, completion_length=G, stride=stride, first_context_length=stride)
    shape = (*anchors.positions.shape, settings.n_samples, G)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    return Inputs(batch, anchors, noise.to(settings.device))
