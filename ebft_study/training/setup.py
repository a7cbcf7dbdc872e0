"""Load and check everything that a run needs before its first step: data first, then models, method, evaluator."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ebft_study.config import RunConfig
from ebft_study.data import TextDataset, TokenDataset
from ebft_study.errors import ConfigError, ModelError
from ebft_study.evaluation import Evaluator
from ebft_study.evaluation.downstream.benchmarks import Benchmark
from ebft_study.evaluation.extra_metrics import load_metrics
from ebft_study.features import FeatureBackend
from ebft_study.features.local import LocalFeatures, load_networks
from ebft_study.methods import Method
from ebft_study.methods.ebft import Ebft
from ebft_study.methods.judging import Judging
from ebft_study.methods.rlvr import Rlvr
from ebft_study.methods.sft import Sft
from ebft_study.networks.loading import LoadedModel, frozen_base, load_generator, trained_parameters
from ebft_study.rollouts import RolloutBackend
from ebft_study.rollouts.answers import AnswerSampler, InProcessAnswers
from ebft_study.rollouts.strided import StridedRollouts
from ebft_study.training.distributed import shard, shard_frozen
from ebft_study.training.inputs import Inputs, read_inputs
from ebft_study.training.memory import MemoryPlan, own_fraction, plan_micro_batches

if TYPE_CHECKING:
    from ebft_study.training.recorded import Services


@dataclass
class Parts:
    """Everything that a run is made of."""

    device: torch.device
    memory_plan: MemoryPlan
    text: TextDataset
    data: dict[str, TokenDataset]
    base: LoadedModel
    features: FeatureBackend
    rollouts: RolloutBackend
    method: Method
    warm_start: Method
    evaluator: Evaluator
    benchmarks: tuple[Benchmark, ...]
    remarks: list[str]
    """Remarks for the user about choices that were made."""
    judging: Judging | None = None
    """The verifier that training learns from."""

    @property
    def networks(self) -> list[nn.Module]:
        """The networks of an evaluation: generator, and feature network and judge of this process."""
        return [self.base.model, *_networks(self.features, self.evaluator.judge)]

    def close(self) -> None:
        """Stop everything that was started for the run."""
        self.rollouts.close()
        if self.judging is not None:
            self.judging.close()


def autocast(config: RunConfig, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Context in which forward passes have the configured precision."""
    if config.training.precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def choose_device(config: RunConfig) -> torch.device:
    """The configured device.

    Raises:
        ConfigError: `device: cuda`, `attention: flex` or a colocated engine on a machine without a GPU.
    """
    wanted = config.training.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("training.device='cuda': this machine has no usable GPU. Use device=cpu or device=auto")
    device = torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
    if config.training.attention == "flex" and device.type == "cpu":
        raise ConfigError(
            "training.attention='flex': FlexAttention needs a GPU. Use attention=auto or attention=chunked"
        )
    if config.uses_engine and config.vllm.placement == "colocated" and device.type == "cpu":
        raise ConfigError("vllm.placement='colocated': there is no GPU to share. Use placement=own")
    return device


def build_parts(config: RunConfig, *, rank: int = 0, world_size: int = 1, services: Services | None = None) -> Parts:
    """Load and check everything; raises `EbftError` for problems that a user can repair.

    Args:
        rank: the first worker verifies and hashes the models for all.
        services: backends that the run may share with others; None: everything is done in process.
    """
    device, memory_plan = planned(config, world_size=world_size, services=services)
    if services and device.type == "cuda":
        _limit_memory(own_fraction(config, services.gpu_fraction))
    inputs = read_inputs(config)
    try:
        return _with_networks(config, inputs, device, memory_plan, rank=rank, world_size=world_size, services=services)
    except BaseException:
        inputs.close()
        raise


def _limit_memory(fraction: float) -> None:
    """Give this process a part of its GPU: who takes more fails, not its neighbours."""
    if fraction < 1:
        torch.cuda.set_per_process_memory_fraction(fraction)


def _with_networks(
    config: RunConfig,
    inputs: Inputs,
    device: torch.device,
    memory_plan: MemoryPlan,
    *,
    rank: int,
    world_size: int,
    services: Services | None,
) -> Parts:
    """The parts of a run, with weights."""
    base = load_generator(config, device=device, tokenizer=inputs.tokenizer, is_first=rank == 0)
    features, judge = services.networks(config, base) if services else load_networks(config, base)
    sharded = config.training.sharding == "fsdp" and world_size > 1
    if sharded:
        shard_frozen(*(network for network in _networks(features, judge) if network is not base.model))
    rollouts = services.rollouts(config, device) if services else StridedRollouts(config.training.attention)
    sft: Method = Sft(config.loss)
    method = sft
    frozen = frozen_base(config, base) if config.method != "sft" and config.loss.kl_coefficient > 0 else None
    if sharded and frozen is not None and config.lora.lora_rank == 0:
        shard_frozen(frozen)
    if inputs.judging is not None:
        method = Rlvr(
            config,
            sampler=answer_sampler(rollouts),
            judging=inputs.judging,
            base=frozen,
            end_tokens=end_tokens(base),
            features=features if config.method == "ebft" and isinstance(features, LocalFeatures) else None,
        )
    elif config.method != "sft":
        method = Ebft(
            config, rollouts=rollouts, features=features, base=frozen, anchors_at_once=memory_plan.anchors_at_once
        )
    extra = load_metrics(config.evaluation.extra_metrics, base.tokenizer)
    evaluator = Evaluator(config, StridedRollouts(config.training.attention), features, judge, extra)
    remarks = [f"base model {base.fingerprint}", *inputs.remarks]
    if inputs.benchmarks and rollouts.engine:
        remarks.append(f"benchmarks are sampled by {rollouts.engine}")
    # Last: frozen copies of the generator were made before its weights are sharded.
    remarks += [*_save_memory(config, base.model, memory_plan, world_size=world_size), memory_plan.describe()]
    base.model.train()
    return Parts(
        *(device, memory_plan, inputs.text, inputs.data, base, features, rollouts, method, sft, evaluator),
        benchmarks=inputs.benchmarks,
        remarks=remarks,
        judging=inputs.judging,
    )


def planned(
    config: RunConfig, *, world_size: int = 1, services: Services | None = None
) -> tuple[torch.device, MemoryPlan]:
    """The device of a run, and its micro-batches.

    Raises:
        ConfigError: there is no such device, or what cannot fit.
    """
    device = choose_device(config)
    fraction = services.gpu_fraction if services else 1.0
    return device, plan_micro_batches(config, device, world_size=world_size, gpu_fraction=fraction)


def _networks(*backends: FeatureBackend | None) -> list[nn.Module]:
    return [backend.network for backend in backends if isinstance(backend, LocalFeatures)]


def answer_sampler(rollouts: RolloutBackend) -> AnswerSampler:
    """The sampler of whole answers of a backend."""
    if isinstance(rollouts, StridedRollouts):
        return InProcessAnswers()
    from ebft_study.rollouts.vllm import VllmAnswers, VllmRollouts  # needs Ray

    assert isinstance(rollouts, VllmRollouts)
    return VllmAnswers(rollouts)


def end_tokens(base: LoadedModel) -> list[int]:
    """The token that ends every answer in the data."""
    end = base.tokenizer.eos_token_id
    return [] if end is None else [end]


def _save_memory(config: RunConfig, model: nn.Module, plan: MemoryPlan, *, world_size: int) -> list[str]:
    """Prepare the generator, in place, for checkpointing of activations and sharding; returns remarks for the user.

    Raises:
        ModelError: an architecture that cannot compute activations again.
    """
    training, trained = config.training, sum(p.numel() for p in trained_parameters(model).values())
    remarks = [f"{trained} trained weights"]
    if plan.activation_checkpointing:
        checkpoint_activations(model, name=config.model)
    if training.sharding == "fsdp":
        if world_size > 1:
            shard(model, world_size=world_size, precision=training.precision)
        else:
            remarks.append("sharding=fsdp changes nothing with one worker")
    return remarks


def checkpoint_activations(model: nn.Module, *, name: str) -> None:
    """Keep a layer's input only, and run the layer again when its gradient is due; in evaluation mode nothing changes.

    Raises:
        ModelError: the architecture does not support it.
    """
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    except ValueError as error:
        raise ModelError(
            f"training.activation_checkpointing: model {name!r} does not support it ({error}). Use false"
        ) from error
    # Only reentrant checkpointing needs inputs that require gradients; frozen embeddings have no use for them.
    model.disable_input_require_grads()  # type: ignore[operator]
