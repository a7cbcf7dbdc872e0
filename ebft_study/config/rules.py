"""Rules between the settings of a run, which no single one of them breaks."""

from __future__ import annotations

from typing import Any

from ebft_study.config.sections import RunConfig

Rule = tuple[bool, str, Any, str, str]
"""Whether it holds, key, given, rule, remedy."""


def broken_rules(config: RunConfig) -> list[tuple[str, Any, str, str]]:
    """Rules between settings: (key, given, rule, remedy) for each that `config` breaks."""
    rules = [
        *_rules_of_lengths(config),
        *_rules_of_checkpoints(config),
        *_rules_of_engines(config),
        *_rules_of_networks(config),
    ]
    if config.method == "ebft":
        rules += _rules_of_samples(config)
    rules += _rules_of_answers(config)
    return [(key, given, rule, remedy) for holds, key, given, rule, remedy in rules if not holds]


def _rules_of_lengths(config: RunConfig) -> list[Rule]:
    rollout, T, lengths = config.rollout, config.data.sequence_length, config.evaluation.profile_lengths
    room = T - rollout.context_length
    return [
        (
            rollout.completion_length <= room,
            "rollout.completion_length",
            rollout.completion_length,
            f"a sequence of {T} tokens must hold the first context ({rollout.context_length}) and one completion",
            _shorter("completion_length", room),
        ),
        (
            max(lengths) <= room,
            "evaluation.profile_lengths",
            list(lengths),
            f"a sequence of {T} tokens has no room for completions of {max(lengths)}",
            _shorter("lengths", room),
        ),
    ]


def _shorter(what: str, room: int) -> str:
    return f"Use {what} <= {room} or a longer sequence_length" if room > 0 else "Use a longer sequence_length"


def _rules_of_checkpoints(config: RunConfig) -> list[Rule]:
    every, keep = config.checkpoint.checkpoint_every_steps, config.checkpoint.keep_every_steps
    return [
        (
            keep is None or keep % every == 0,
            "checkpoint.keep_every_steps",
            keep,
            f"there is a checkpoint every {every} steps only",
            f"Use a multiple of {every}, or another checkpoint_every_steps",
        )
    ]


def _rules_of_engines(config: RunConfig) -> list[Rule]:
    rollout, vllm = config.rollout, config.vllm
    lag, every = rollout.max_policy_lag, rollout.sync_every_steps
    return [
        (
            every <= lag + 1,
            "rollout.sync_every_steps",
            every,
            f"the sampling weights would be {every - 1} updates old before the next transfer, but max_policy_lag={lag}",
            f"Use max_policy_lag >= {every - 1}, or sync_every_steps <= {lag + 1}",
        ),
        (
            rollout.backend == "vllm" or lag == 0,
            "rollout.max_policy_lag",
            lag,
            f"backend={rollout.backend} samples from the trained weights themselves",
            "Use max_policy_lag=0, or backend=vllm",
        ),
        (
            rollout.backend == "strided" or 0.01 <= rollout.temperature <= 2.0,
            "rollout.temperature",
            rollout.temperature,
            "vLLM samples at temperatures from 0.01 to 2",
            "Use one of these, or backend=strided",
        ),
        (
            vllm.placement == "own" or vllm.tensor_parallel_size == 1,
            "vllm.tensor_parallel_size",
            vllm.tensor_parallel_size,
            "a colocated engine has the trainer's one GPU",
            "Use placement=own, or tensor_parallel_size=1",
        ),
        (
            vllm.placement == "own" or vllm.engine_scope == "trial",
            "vllm.engine_scope",
            vllm.engine_scope,
            "an engine for all trials cannot be on the GPU of one of them",
            "Use placement=own, or engine_scope=trial",
        ),
    ]


def _rules_of_networks(config: RunConfig) -> list[Rule]:
    training, features = config.training, config.features
    return [
        (
            features.backend != "service" or config.lora.lora_rank == 0 or not features.is_base,
            "features.backend",
            "service",
            "with adapters the model's own weights are the feature network already, at no cost",
            "Use backend=local",
        ),
        (
            training.weight_dtype == "float32" or training.precision == "bfloat16",
            "training.weight_dtype",
            "bfloat16",
            f"precision={training.precision} computes more exactly than such weights are stored",
            "Use precision=bfloat16 with it, or weight_dtype=float32",
        ),
    ]


def _rules_of_samples(config: RunConfig) -> list[Rule]:
    reward, single = config.reward, config.rollout.n_samples == 1
    return [
        (
            not (single and reward.alpha > 0),
            "rollout.n_samples",
            1,
            f"the diversity term (alpha={reward.alpha}) compares samples of one context, so it needs two",
            "Use n_samples >= 2, or alpha=0",
        ),
        (
            not (single and reward.baseline != "none"),
            "reward.baseline",
            reward.baseline,
            "with n_samples=1 there are no other samples to build a baseline from",
            "Use baseline=none or n_samples >= 2",
        ),
    ]


def _rules_of_answers(config: RunConfig) -> list[Rule]:
    data = config.data
    regions = {"rollout.anchor_region": config.rollout.anchor_region, "loss.ce_region": config.loss.ce_region}
    has_answers = data.dataset not in ("stdlib", "unstructured") and data.text_column is None
    return [
        (
            region != "answer" or has_answers,
            key,
            "answer",
            f"data set {data.dataset!r} is raw text without answers",
            f"Use {key.split('.')[1]}=all or a data set with prompts and answers",
        )
        for key, region in regions.items()
    ]
