"""The measured work: models, inputs, and the cost of a step by the cost model.

Weights and tokens are random: the cost of a step does not depend on their values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from benchmarks.rows import Row
from benchmarks.settings import MODELS, Settings, ladder
from ebft_study.algorithm.anchors import Anchors, find_anchors
from ebft_study.algorithm.losses import next_token_mask
from ebft_study.cost import Limits, Memory, MicroBatchPlan, ModelShape, StepCost, largest_plan, memory, step_cost
from ebft_study.data import Batch
from ebft_study.errors import ConfigError
from ebft_study.methods import LossDenominators
from ebft_study.networks.blocks import ATTENTION
from ebft_study.networks.lora import add_adapters

if TYPE_CHECKING:
    from ebft_study.config import LoraConfig

CPU_TOKENS = 512
"""Tokens of a decoding pass that fill a CPU's matrix products and still fit into its cache."""
MEMORY_SHARE = 0.75
"""Share of a GPU for our step; the rest is for the naive feature network and for fragmentation."""


def prepare(settings: Settings) -> None:
    """Check that the settings can be measured on this machine, and set the number of threads.

    Raises:
        ConfigError: naming the setting that cannot.
    """
    for length in settings.sequence_lengths:
        settings.at(length).run()
    if settings.device_type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"bench: device={settings.device!r}: this machine has no usable GPU. Use --device cpu")
    if settings.threads:
        torch.set_num_threads(settings.threads)


def setting_rows(settings: Settings, *names: str, **more: float | str) -> list[Row]:
    """Rows that describe a measurement: the version of PyTorch, threads, the settings called `names`, and `more`."""
    facts = {name: getattr(settings, name) for name in names}
    facts |= {"torch": str(torch.__version__), "threads": torch.get_num_threads(), **more}
    return [Row(f"setting/{name}", value) for name, value in facts.items()]


def autocast(settings: Settings) -> AbstractContextManager[Any]:
    """Activations in the settings' precision; weights stay float32, as in training."""
    return torch.autocast(settings.device_type, torch.bfloat16, enabled=settings.precision == "bfloat16")


def compute_dtype(settings: Settings) -> torch.dtype:
    """Type that matrix products compute in."""
    return torch.float32 if settings.precision == "float32" else torch.bfloat16


def model_config(name: str) -> Qwen2Config:
    """The configuration of the model called `name`."""
    return Qwen2Config(**(MODELS.get(name) or ladder()[name]))


def random_model(settings: Settings) -> PreTrainedModel:
    """The settings' model with random weights, made on its device, in training mode."""
    torch.manual_seed(0)
    trained: torch.dtype = getattr(torch, settings.weight_dtype)
    dtype = compute_dtype(settings) if settings.lora_rank else trained  # frozen weights, as in training
    with torch.device(settings.device):
        config = model_config(settings.model)
        model: PreTrainedModel = Qwen2ForCausalLM._from_config(config, attn_implementation=ATTENTION, dtype=dtype)
    if settings.lora_rank:
        adapters = cast("LoraConfig", settings.config.lora)
        add_adapters(model, adapters, seed=0, dtype=trained, name=settings.model)
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    return model.train()


# --- cost ------------------------------------------------------------------------------------------------------


def shapes(settings: Settings) -> tuple[ModelShape, ModelShape]:
    """Shapes of the generator, adapters included, and of the whole feature network."""
    base = ModelShape.from_config(model_config(settings.model))
    return (base.with_adapters(settings.lora_rank) if settings.lora_rank else base), base


def micro_batch_plan(settings: Settings) -> MicroBatchPlan:
    """The micro-batch plan of our step: the settings' own; else one that fills a CPU's products, or a GPU's memory.

    Raises:
        ConfigError: a GPU has not enough memory for any.
    """
    plan = MicroBatchPlan.whole(settings.shape)
    if settings.device_type == "cuda":
        budget = MEMORY_SHARE * torch.cuda.get_device_properties(settings.device).total_memory
        plan = largest_plan(*shapes(settings), settings.shape, budget_bytes=budget)
    else:
        fitting = max(CPU_TOKENS // (settings.batch_size * settings.n_samples), 1)
        plan = replace(plan, anchors_at_once=min(fitting, plan.anchors_at_once))
    return MicroBatchPlan(
        settings.micro_batch_size or plan.micro_batch_size, settings.anchors_at_once or plan.anchors_at_once
    )


def n_parts(settings: Settings, plan: MicroBatchPlan) -> int:
    """Passes over blocks in a step: micro-batches times parts of their anchors."""
    micro_batches = math.ceil(settings.batch_size / plan.micro_batch_size)
    return micro_batches * math.ceil(len(settings.shape.anchors) / plan.anchors_at_once)


def cost_of(settings: Settings, *, counting: Literal["needed", "executed"]) -> StepCost:
    """The cost of our step by the cost model."""
    limits, plan = Limits.on(settings.device_type), micro_batch_plan(settings)
    return step_cost(*shapes(settings), settings.shape, plan=plan, limits=limits, counting=counting)


def memory_of(settings: Settings) -> Memory:
    """The memory of our step by the cost model."""
    limits, plan = Limits.on(settings.device_type), micro_batch_plan(settings)
    return memory(*shapes(settings), settings.shape, plan, limits=limits)


# --- inputs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """Sequences, their anchors, and the noise [S, B, n, G] that draws their completions."""

    batch: Batch
    anchors: Anchors
    noise: Tensor

    def __len__(self) -> int:
        return len(self.batch.tokens)

    def parts(self, size: int) -> Iterator[Inputs]:
        """At most `size` sequences at a time, every time as a new batch, which no cache has."""
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
