"""Rules between the settings of a run: combinations that no single setting forbids."""

from __future__ import annotations

import difflib
import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ebft_study.config.keys import all_keys, short_name
from ebft_study.config.sections import VERIFIERS, EvaluationConfig, RunConfig
from ebft_study.errors import rule_broken


@dataclass(frozen=True)
class Rule:
    """A combination that is refused, and the setting that the message names.

    `rule` and `remedy` are format strings over the run's sections (`{rollout.context_length}`) and `_derived`.
    """

    key: str
    is_broken: Callable[[RunConfig], bool]
    rule: str
    remedy: str


_NEVER_READ = {
    "sft": (
        *("reward.", "vllm.", "loss.gamma", "loss.aggregation", "loss.kl_coefficient", "loss.kl_estimator"),
        *("rollout.n_samples", "rollout.backend", "rollout.sync_every_steps", "rollout.max_policy_lag"),
        *("rollout.importance_ratio_clip", "rollout.parity_threshold", "verifier."),
        *("loss.clip_range", "rollout.max_answer_tokens", "rollout.overlong"),
    ),
    "ebft": ("loss.clip_range",),
    "rlvr": ("reward.alpha", "reward.whitening", "reward.verifier_weight", "rollout.importance_ratio_clip"),
}
"""Method -> settings, or whole sections, that neither its training nor its evaluation reads."""


@functools.cache
def unread_settings(method: str) -> frozenset[str]:
    """Short names of the settings that change nothing that `method` learns or is measured by.

    Settings of the evaluation count as read: SFT has a completion length and a feature network, by which its
    feature-matching loss is measured.
    """
    return frozenset(short_name(path) for path in all_keys() if path.startswith(_NEVER_READ.get(method, ())))


def check_rules(run: RunConfig, *, source: str) -> None:
    """Raise `ConfigError` for the first rule that `run` breaks."""
    for rule in RULES:
        if rule.is_broken(run):
            value = operator.attrgetter(rule.key)(run)
            names = dict(run) | _derived(run)
            raise rule_broken(
                source=source,
                key=rule.key,
                given=list(value) if isinstance(value, tuple) else value,
                rule=rule.rule.format(**names),
                remedy=rule.remedy.format(**names),
            )


def _room(run: RunConfig) -> int:
    """Tokens that are left for completions after the first context."""
    return run.data.sequence_length - run.rollout.context_length


def _derived(run: RunConfig) -> dict[str, int | str]:
    name = run.verifier.verifier or ""
    return {
        "nearest_verifiers": ", ".join(difflib.get_close_matches(name, VERIFIERS, n=1, cutoff=0.5) or VERIFIERS),
        "room": _room(run),
        "longest_profile": max(run.evaluation.profile_lengths),
        "answer_tokens": run.max_answer_tokens,
        "oldest_weights": run.rollout.sync_every_steps - 1,
        "most_sync_steps": run.rollout.max_policy_lag + 1,
    }


def _samples_once(run: RunConfig) -> bool:
    return run.method != "sft" and run.rollout.n_samples == 1


def _is_raw_text(run: RunConfig) -> bool:
    return run.data.dataset in ("stdlib", "unstructured") or run.data.text_column is not None


_CONTEXT_AND_COMPLETION = (
    "a sequence of {data.sequence_length} tokens must hold the first context ({rollout.context_length}) "
    "and one completion"
)
_NO_ANSWERS = "data set {data.dataset!r} is raw text without answers"


COMET_REMEDY = (
    "Make its environment with 'python3 -m venv ENV && ENV/bin/pip install unbabel-comet==2.2.7', and use "
    "comet_python=ENV/bin/python with the absolute path of ENV"
)
_READ_BY_ONE = {
    "unit_tests": ("partial_reward", "verifier_workers", "test_cpu_seconds", "test_memory_mib"),
    "bleu": ("bleu_tokenizer",),
    "comet": ("comet_python", "comet_model", "comet_timeout_seconds"),
}
"""Verifier -> settings that no other verifier reads."""
_READ_BY_BENCHMARKS = (
    *("verifier_workers", "test_cpu_seconds", "test_memory_mib"),
    *("comet_python", "comet_model", "comet_timeout_seconds"),
)
"""Settings of verifiers that benchmarks, which bring their own, read."""


def _without_reader(key: str, is_read: Callable[[RunConfig], bool], rule: str, remedy: str) -> Rule:
    """The rule that a setting keeps its default in a run in which nothing reads it."""
    section, name = key.split(".")

    def is_broken(run: RunConfig) -> bool:
        settings = getattr(run, section)
        return not is_read(run) and bool(getattr(settings, name) != type(settings).model_fields[name].default)

    return Rule(key, is_broken, rule, remedy)


def _is_read_by(reader: str, name: str, run: RunConfig) -> bool:
    """Whether the run has the verifier `reader`, or benchmarks that read a setting of it, too."""
    return run.verifier.verifier == reader or (bool(run.evaluation.benchmarks) and name in _READ_BY_BENCHMARKS)


def _has_no_environment(run: RunConfig) -> bool:
    python = run.verifier.comet_python
    return run.verifier.verifier == "comet" and (python is None or not Path(python).expanduser().is_absolute())


RULES = (
    Rule(
        "rollout.completion_length",
        lambda run: _room(run) <= 0,
        _CONTEXT_AND_COMPLETION,
        "Use a longer sequence_length",
    ),
    Rule(
        "rollout.completion_length",
        lambda run: run.rollout.completion_length > _room(run),
        _CONTEXT_AND_COMPLETION,
        "Use completion_length <= {room} or a longer sequence_length",
    ),
    Rule(
        "evaluation.profile_lengths",
        lambda run: max(run.evaluation.profile_lengths) > _room(run),
        "a sequence of {data.sequence_length} tokens has no room for completions of {longest_profile}",
        "Use lengths <= {room} or a longer sequence_length",
    ),
    Rule(
        "evaluation.judge_completion_length",
        lambda run: run.evaluation.judge is not None and run.evaluation.judge_completion_length > _room(run),
        _CONTEXT_AND_COMPLETION,
        "Use judge_completion_length <= {room} or a longer sequence_length",
    ),
    Rule(
        "evaluation.judge",
        lambda run: run.evaluation.judge == "base",
        "the judge is one network for all trials, and 'base' is the model of each",
        "Name the network, for example judge={model}",
    ),
    *(
        _without_reader(
            f"evaluation.{name}",
            lambda run: run.evaluation.judge is not None,
            "no judge is named, so nothing reads it",
            "Name one, for example judge={model}, or drop it",
        )
        for name in EvaluationConfig.model_fields
        if name.startswith("judge_")
    ),
    *(
        _without_reader(
            f"evaluation.{name}",
            lambda run: bool(run.evaluation.benchmarks),
            "no benchmark is named, so nothing reads it",
            "Name one, for example benchmarks=mini, or drop it",
        )
        for name in EvaluationConfig.model_fields
        if name.startswith("benchmark_")
    ),
    Rule(
        "verifier.verifier",
        lambda run: (
            run.verifier.verifier is not None
            and run.verifier.verifier not in VERIFIERS
            and ":" not in run.verifier.verifier
        ),
        "there is no such verifier",
        "Use {nearest_verifiers}, or package.module:name for one of your own",
    ),
    *(
        _without_reader(
            f"verifier.{name}",
            lambda run: run.verifier.verifier is not None,
            "no verifier is named, so nothing reads it",
            "Name one, for example verifier=unit_tests, or drop it",
        )
        for name in ("parse_rule", "stop_strings")
    ),
    *(
        _without_reader(
            f"verifier.{name}",
            functools.partial(_is_read_by, reader, name),
            f"only the verifier {reader} reads it",
            f"Use verifier={reader}, or drop it",
        )
        for reader, names in _READ_BY_ONE.items()
        for name in names
    ),
    Rule(
        "verifier.comet_python",
        _has_no_environment,
        "COMET needs transformers < 5 and numpy < 2, so it runs in an environment of its own",
        COMET_REMEDY,
    ),
    Rule(
        "checkpoint.keep_every_steps",
        lambda run: (run.checkpoint.keep_every_steps or 0) % run.checkpoint.checkpoint_every_steps != 0,
        "there is a checkpoint every {checkpoint.checkpoint_every_steps} steps only",
        "Use a multiple of {checkpoint.checkpoint_every_steps}, or another checkpoint_every_steps",
    ),
    Rule(
        "rollout.sync_every_steps",
        lambda run: run.rollout.sync_every_steps > run.rollout.max_policy_lag + 1,
        "the sampling weights would be {oldest_weights} updates old before the next transfer, "
        "but max_policy_lag={rollout.max_policy_lag}",
        "Use max_policy_lag >= {oldest_weights}, or sync_every_steps <= {most_sync_steps}",
    ),
    Rule(
        "rollout.max_policy_lag",
        lambda run: run.rollout.backend != "vllm" and run.rollout.max_policy_lag > 0,
        "backend={rollout.backend} samples from the trained weights themselves",
        "Use max_policy_lag=0, or backend=vllm",
    ),
    Rule(
        "rollout.temperature",
        lambda run: run.rollout.backend != "strided" and not 0.01 <= run.rollout.temperature <= 2.0,
        "vLLM samples at temperatures from 0.01 to 2",
        "Use one of these, or backend=strided",
    ),
    Rule(
        "evaluation.benchmark_temperature",
        lambda run: run.uses_engine and not 0.01 <= run.evaluation.benchmark_temperature <= 2.0,
        "vLLM samples at temperatures from 0.01 to 2",
        "Use one of these, or backend=strided",
    ),
    Rule(
        "vllm.tensor_parallel_size",
        lambda run: run.vllm.placement != "own" and run.vllm.tensor_parallel_size > 1,
        "a colocated engine has the trainer's one GPU",
        "Use placement=own, or tensor_parallel_size=1",
    ),
    Rule(
        "vllm.engine_scope",
        lambda run: run.vllm.placement != "own" and run.vllm.engine_scope != "trial",
        "an engine for all trials cannot be on the GPU of one of them",
        "Use placement=own, or engine_scope=trial",
    ),
    Rule(
        "features.backend",
        lambda run: run.features.backend == "service" and run.lora.lora_rank > 0 and run.features.is_base,
        "with adapters the model's own weights are the feature network already, at no cost",
        "Use backend=local",
    ),
    Rule(
        "training.weight_dtype",
        lambda run: run.training.weight_dtype != "float32" and run.training.precision != "bfloat16",
        "precision={training.precision} computes more exactly than such weights are stored",
        "Use precision=bfloat16 with it, or weight_dtype=float32",
    ),
    _without_reader(
        "optimizer.rounding",
        lambda run: run.training.weight_dtype != "float32",
        "float32 weights have the digits for every step, so nothing reads it",
        "Use weight_dtype=bfloat16 with it, or drop it",
    ),
    Rule(
        "rollout.n_samples",
        lambda run: run.method == "ebft" and _samples_once(run) and run.reward.alpha > 0,
        "the diversity term (alpha={reward.alpha}) compares samples of one context, so it needs two",
        "Use n_samples >= 2, or alpha=0",
    ),
    Rule(
        "reward.baseline",
        lambda run: _samples_once(run) and run.reward.baseline != "none",
        "with n_samples=1 there are no other samples to build a baseline from",
        "Use baseline=none or n_samples >= 2",
    ),
    Rule(
        "verifier.verifier",
        lambda run: run.samples_answers and run.verifier.verifier is None,
        "method={method} with verifier_weight={reward.verifier_weight} learns from the rewards of a verifier",
        "Name one, for example verifier=unit_tests",
    ),
    Rule(
        "rollout.max_answer_tokens",
        lambda run: run.samples_answers and run.max_answer_tokens >= run.data.sequence_length,
        "a sequence of {data.sequence_length} tokens must hold a prompt and an answer of {answer_tokens}",
        "Use a smaller one, or a longer sequence_length",
    ),
    Rule(
        "data.packing",
        lambda run: run.samples_answers and run.data.packing,
        "answers are sampled to one prompt per sequence",
        "Use packing=false",
    ),
    Rule(
        "method",
        lambda run: run.samples_answers and _is_raw_text(run),
        _NO_ANSWERS + ", so there is nothing to verify",
        "Use a data set with prompts and answers, or method=ebft",
    ),
    Rule(
        "features.pooling",
        lambda run: run.method == "ebft" and run.samples_answers and run.features.pooling == "concat",
        "whole answers (verifier_weight={reward.verifier_weight}) differ in length",
        "Use pooling=last_token or mean",
    ),
    Rule(
        "features.backend",
        lambda run: run.method == "ebft" and run.samples_answers and run.features.backend == "service",
        "the service embeds completions of one length, not whole answers (verifier_weight={reward.verifier_weight})",
        "Use backend=local",
    ),
    Rule(
        "reward.baseline",
        lambda run: run.method == "rlvr" and run.reward.baseline == "naive",
        "the rewards of a verifier do not depend on other samples, so naive is rloo",
        "Use baseline=rloo",
    ),
    Rule(
        "loss.aggregation",
        lambda run: run.method == "ebft" and run.loss.aggregation == "constant" and not run.samples_answers,
        "all completions have completion_length={rollout.completion_length} tokens, so constant is token_mean",
        "Use aggregation=token_mean",
    ),
    Rule(
        "rollout.anchor_region",
        lambda run: run.rollout.anchor_region == "answer" and _is_raw_text(run),
        _NO_ANSWERS,
        "Use anchor_region=all or a data set with prompts and answers",
    ),
    Rule(
        "loss.ce_region",
        lambda run: run.loss.ce_region == "answer" and _is_raw_text(run),
        _NO_ANSWERS,
        "Use ce_region=all or a data set with prompts and answers",
    ),
)
