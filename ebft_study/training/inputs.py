"""Everything that a run reads besides weights: data, tokens, benchmarks, the verifier. All mistakes in them show here.

Weights of the sizes that the platform is for take minutes to read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from ebft_study.config import RunConfig
from ebft_study.data import TextDataset, TokenDataset, load_text, tokenize
from ebft_study.errors import ConfigError, DataError, ModelError
from ebft_study.evaluation.downstream import check_engine_room, check_room
from ebft_study.evaluation.downstream.benchmarks import Benchmark, load_benchmarks
from ebft_study.methods.judging import Judging, judging_of
from ebft_study.networks.loading import load_tokenizer, read_config
from ebft_study.rollouts import anchors_of


@dataclass(frozen=True)
class Inputs:
    """What a run reads besides weights."""

    text: TextDataset
    tokenizer: PreTrainedTokenizerFast
    data: dict[str, TokenDataset]
    benchmarks: tuple[Benchmark, ...]
    judging: Judging | None
    """The verifier that training learns from."""
    remarks: tuple[str, ...]
    """Remarks for the user: prompts and benchmarks that are left out."""

    def close(self) -> None:
        """Stop what was started for the run."""
        if self.judging is not None:
            self.judging.close()


def read_inputs(config: RunConfig) -> Inputs:
    """Read and check everything but weights.

    Raises:
        EbftError: the first thing that a user must repair.
    """
    text = load_text(config.data)
    tokenizer = load_tokenizer(config.model, revision=config.model_revision)
    model = read_config(config.model, revision=config.model_revision)
    positions = getattr(model, "max_position_embeddings", None)
    data = _tokenized(config, text, tokenizer, positions)
    _check_vocabulary(config.model, getattr(model, "vocab_size", None), data)
    benchmarks, skipped = _benchmarks(config, tokenizer, positions)
    judging, without_room = judging_of(config, text, data, tokenizer) if config.samples_answers else (None, [])
    return Inputs(text, tokenizer, data, benchmarks, judging, (*without_room, *skipped))


def _tokenized(
    config: RunConfig, text: TextDataset, tokenizer: PreTrainedTokenizerFast, positions: int | None
) -> dict[str, TokenDataset]:
    """All splits as rows of tokens.

    Raises:
        ConfigError: a sequence length beyond the model's positions, or a need for answers that the data lack.
        DataError: no sequence of a split is long enough for a single anchor.
    """
    longest = config.data.sequence_length + config.longest_completion
    if positions is not None and longest > positions:
        raise ConfigError(
            f"data.sequence_length={config.data.sequence_length}: with completions it reaches position {longest}, but "
            f"model {config.model!r} has {positions}. Use a shorter sequence_length"
        )
    regions = {"rollout.anchor_region": config.rollout.anchor_region, "loss.ce_region": config.loss.ce_region}
    for key, region in regions.items():
        if region == "answer" and not text.has_answers:
            raise ConfigError(f"{key}='answer': data set {text.name!r} is raw text without answers. Use {key}=all")
    splits = {
        split: tokenize(
            examples,
            tokenizer,
            sequence_length=config.data.sequence_length,
            packing=config.data.packing,
            has_answers=text.has_answers,
        )
        for split, examples in text.splits.items()
    }
    for split, data in splits.items():
        _check_anchors(config, split, data)
    return splits


def _check_vocabulary(name: str, vocabulary: int | None, data: Mapping[str, TokenDataset]) -> None:
    """Refuse tokens for which the model has no embedding; a tokenizer may have more than the data use."""
    largest = max(int(rows.tokens.max()) for rows in data.values())
    if vocabulary is not None and largest >= vocabulary:
        raise ModelError(
            f"model {name!r}: has a vocabulary of {vocabulary} tokens, and its tokenizer gives the data number "
            f"{largest}. Use the tokenizer that the model was trained with"
        )


def _check_anchors(config: RunConfig, split: str, data: TokenDataset) -> None:
    rollout, evaluation = config.rollout, config.evaluation
    sample = data.rows(torch.arange(min(len(data), 2048)))
    lengths = {"completion_length": rollout.completion_length}
    if evaluation.judge is not None:
        lengths["judge_completion_length"] = evaluation.judge_completion_length
    for key, length in lengths.items():
        if not bool(anchors_of(sample, rollout, completion_length=length).valid.any()):
            raise DataError(
                f"data.dataset={config.data.dataset!r}: no sequence of split {split!r} has room for one anchor "
                f"(context {rollout.context_length} + completion {length} tokens, region {rollout.anchor_region}). "
                f"Use a shorter {key} or first_context_length, or longer texts"
            )


def _benchmarks(
    config: RunConfig, tokenizer: PreTrainedTokenizerFast, positions: int | None
) -> tuple[tuple[Benchmark, ...], tuple[str, ...]]:
    """The benchmarks of a run, and remarks on those that are skipped.

    Raises:
        EbftError: a benchmark cannot be read, or has prompts that are too long for the model.
    """
    settings = config.evaluation
    benchmarks, skipped = load_benchmarks(settings.benchmarks, problems=settings.benchmark_problems)
    longest = settings.benchmark_max_tokens
    check_room(benchmarks, tokenizer, max_tokens=longest, positions=positions)
    if config.uses_engine:
        room = config.vllm.longest_request_tokens or config.longest_request
        check_engine_room(benchmarks, tokenizer, max_tokens=longest, request_tokens=room)
    return benchmarks, skipped
