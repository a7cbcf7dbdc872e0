"""Reinforcement learning with verifiable rewards: whole answers to prompts, judged by a verifier.

    for each micro-batch    prompts, no gradient -> n answers each, up to an end token or a limit -> verifier (threads)
    for each micro-batch    sequences, with gradients -> leaves -> answers scored in one pass
                            wait for the judgements -> advantages -> backward into the weights and the leaves
                            sequences, backward, once, with what the leaves collected

All answers of a step are sampled before any of its gradients, so the verifier works while others are sampled and
scored. Nothing of an answer after its end has any part in the loss.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebft_study.algorithm.advantages import feature_matching_advantages, reward_advantages
from ebft_study.algorithm.anchors import Anchors
from ebft_study.algorithm.losses import clipped_policy_loss, importance_weights, kl_penalty, token_weights
from ebft_study.algorithm.metrics import duplicate_fraction
from ebft_study.algorithm.rewards import Rewards, feature_matching_rewards
from ebft_study.config import RunConfig
from ebft_study.data import Batch
from ebft_study.features.local import LocalFeatures
from ebft_study.methods import LossDenominators, MetricAccumulator, cross_entropy_term, differentiate
from ebft_study.methods.judging import Judgements, Judging
from ebft_study.methods.off_policy import OffPolicy, RechunkProbe, record_ratios
from ebft_study.networks.blocks import Prefix, completion_log_probs, run_prefix
from ebft_study.networks.sharding import unsharded
from ebft_study.rollouts import ROLLOUT_STREAM
from ebft_study.rollouts.answers import Answers, AnswerSampler, Sampling, spread_rows


@dataclass(frozen=True)
class _Sampled:
    """Answers to a micro-batch's prompts."""

    answers: Answers
    valid: Tensor
    """[S] bool: the sequences whose prompt leaves room for an answer; the others have answers of no tokens."""
    submitted: Tensor
    """[S, n] bool: the answers that the verifier was given."""
    judgements: Future[Judgements]


class Rewarded(NamedTuple):
    """Rewards of n answers to each of S prompts; all [S, n]."""

    reward: Tensor
    """The verifier's, or the sum of features' and verifier's; of use where it was judged."""
    advantages: Tensor
    """0 where not counted."""
    counted: Tensor
    """bool: the answers in the loss."""
    matching: Rewards | None = None
    """The features' share, if they have one."""


class Rlvr:
    """One update per batch of prompts; the data, the schedule and the evaluation are those of the other methods."""

    def __init__(
        self,
        config: RunConfig,
        *,
        sampler: AnswerSampler,
        judging: Judging,
        base: nn.Module | None,
        end_tokens: Collection[int],
        features: LocalFeatures | None = None,
    ) -> None:
        """
        Args:
            base: the frozen base model, needed only for the KL term.
            features: EBFT's reward in addition to the verifier's, of whole answers.
        """
        self.config, self.reward, self.loss = config, config.reward, config.loss
        self.sampler, self.judging, self.base = sampler, judging, base
        self.sampling = Sampling(
            config.rollout.n_samples, config.max_answer_tokens, config.rollout.temperature, frozenset(end_tokens)
        )
        self.features, self.off_policy, self.probe = features, OffPolicy.from_config(config), RechunkProbe(config)
        self._sampled: deque[_Sampled] = deque()

    def prepare(
        self,
        model: nn.Module,
        parts: Sequence[tuple[Batch, Anchors]],
        *,
        policy_version: int,
        accumulator: MetricAccumulator,
    ) -> None:
        """See `SamplesAhead.prepare`. An engine gets all prompts at once, which it schedules best itself."""
        self._sampled.clear()
        for group in [parts] if self.config.uses_engine else [[part] for part in parts]:
            with accumulator.seconds("rollout_seconds", group[0][0].tokens.device):
                prompts = [prompt for batch, anchors in group for prompt in prompts_of(batch, anchors)]
                rows = [rows_of(batch, anchors) for batch, anchors in group]
                key = (self.config.seed, ROLLOUT_STREAM, policy_version)
                answers = self.sample(model, prompts, list(itertools.chain(*rows)), key=key)
            if answers.policy_version is not None:
                self.off_policy.record(
                    answers.policy_version, policy_version, len(answers.tokens), answers.sync_seconds, accumulator
                )
            first = 0
            for (_, anchors), of_part in zip(group, rows, strict=True):
                valid, own = anchors.valid[:, 0], answers.rows(slice(first, first + len(of_part)))
                submitted, judgements = self.judge("train", of_part, own)
                self._sampled.append(_Sampled(own.spread(valid), valid, spread_rows(submitted, valid), judgements))
                first += len(of_part)

    def sample(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[int],
        *,
        key: Sequence[int],
        sampler: AnswerSampler | None = None,
    ) -> Answers:
        """Answers to the prompts of some rows; `key` and row are the seed (see `AnswerSampler`)."""
        return (sampler or self.sampler).sample(model, prompts, self.sampling, key=key, ids=rows)

    def judge(self, split: str, rows: Sequence[int], answers: Answers) -> tuple[Tensor, Future[Judgements]]:
        """Which of the answers to rows of a split are judged, [S, n] bool, and the judgements, in time."""
        submitted = answers.ended | (self.config.rollout.overlong == "verify")
        return submitted, self.judging.start(split, rows, answers, submitted)

    @torch.no_grad()
    def rewarded(
        self, batch: Batch, anchors: Anchors, answers: Answers, submitted: Tensor, judgements: Judgements
    ) -> Rewarded:
        """Rewards and advantages of the answers to a batch.

        With features they are those of feature matching plus `verifier_weight` times the verifier's, each with its own
        baseline; `group_norm` divides their sum by its standard deviation. An answer that could not be judged keeps its
        share of features.
        """
        verified, judged, baseline = judgements.rewards, judgements.judged, self.reward.baseline
        if self.features is None:
            return Rewarded(verified, reward_advantages(verified, judged, baseline=baseline), judged)
        features = self.features.embed_answers(batch, anchors, answers.tokens, answers.lengths)
        alpha, weight = self.reward.alpha, self.reward.verifier_weight
        matching = feature_matching_rewards(features.phi, features.psi, alpha=alpha, whitening=self.reward.whitening)
        matching = Rewards(*(part[:, 0] for part in matching))
        reward = matching.reward + weight * verified
        if baseline == "group_norm":
            return Rewarded(reward, reward_advantages(reward, judged, baseline=baseline), judged, matching)
        advantages = feature_matching_advantages(matching.alignment, matching.diversity, alpha=alpha, baseline=baseline)
        advantages = advantages + weight * reward_advantages(verified, judged, baseline=baseline)
        return Rewarded(reward, torch.where(submitted, advantages, 0.0), submitted, matching)

    def backward(
        self,
        model: nn.Module,
        batch: Batch,
        anchors: Anchors,
        *,
        noise: Tensor,
        denominators: LossDenominators,
        accumulator: MetricAccumulator,
    ) -> float:
        """See `Method.backward`: `policy_loss + gamma * CE + kl_coefficient * KL`. Draws have no use for `noise`."""
        if not self._sampled:
            self.prepare(model, [(batch, anchors)], policy_version=denominators.policy_version, accumulator=accumulator)
        device, sampled = batch.tokens.device, self._sampled.popleft()
        answers, base = sampled.answers, None
        with accumulator.seconds("scoring_seconds", device):
            prefix = run_prefix(model, batch.tokens, batch.document_ids)
            leaves = prefix.leaves()
            loss = cross_entropy_term(model, leaves, batch, self.loss, denominators, accumulator)
            if self.base is not None:
                with torch.no_grad(), unsharded(self.base):
                    base_prefix = run_prefix(self.base, batch.tokens, batch.document_ids)
                    base = self._score(self.base, base_prefix, anchors, answers)
            log_probs = self._score(model, leaves, anchors, answers)
            if answers.policy_version is not None:
                self.probe.record(
                    model,
                    batch,
                    anchors,
                    answers.tokens[:, None],
                    log_probs[:, None],
                    policy_version=denominators.policy_version,
                    accumulator=accumulator,
                    mask=answers.mask[:, None],
                )
        with accumulator.seconds("verifier_seconds", device):
            judgements = Judgements(
                *(spread_rows(part.to(device), sampled.valid) for part in sampled.judgements.result())
            )
        with accumulator.seconds("feature_seconds", device):
            rewarded = self.rewarded(batch, anchors, answers, sampled.submitted, judgements)
        _tally(accumulator, sampled, judgements, rewarded)
        with accumulator.seconds("scoring_seconds", device):
            counted = answers.mask & rewarded.counted[..., None]
            loss += self._policy(log_probs, base, answers, rewarded.advantages, counted, denominators, accumulator)
            prefix.backward(leaves)
        return loss

    def _policy(
        self,
        log_probs: Tensor,
        base: Tensor | None,
        answers: Answers,
        advantages: Tensor,
        counted: Tensor,
        denominators: LossDenominators,
        accumulator: MetricAccumulator,
    ) -> float:
        """Policy gradient (and KL) of the `counted` tokens [S, n, L]: those of answers that are not left out."""
        # Answers that are left out still count here, so that no worker's gradient depends on the others' verifiers.
        n_pairs = max(denominators.contexts, 1.0) * self.sampling.n_samples
        weights = token_weights(counted, aggregation=self.loss.aggregation, max_tokens=self.sampling.max_tokens)
        sampled = log_probs.detach()
        if answers.policy_version is not None:
            sampled = answers.log_probs
            same_weights = answers.policy_version == denominators.policy_version
            record_ratios(log_probs, sampled, answers.mask, same_weights=same_weights, accumulator=accumulator)
            if self.features is not None:  # EBFT's correction: one truncated ratio per answer
                ours, theirs = (torch.where(answers.mask, values, 0.0) for values in (log_probs, sampled))
                advantages = advantages * importance_weights(ours, theirs, clip=self.off_policy.clip)[0]
                sampled = log_probs.detach()
        loss, clipped = clipped_policy_loss(
            log_probs, sampled, advantages, weights, clip_range=self.loss.clip_range, denominator=n_pairs
        )
        if answers.policy_version is not None:
            accumulator.add_valid("importance_clipped_fraction", clipped.double(), counted)
        accumulator.add("policy_loss", loss.detach(), float(len(advantages)))
        if base is not None:
            ours, theirs = (torch.where(counted, values, 0.0)[:, None] for values in (log_probs, base))
            everywhere = counted.new_ones(len(counted), 1)
            penalty = kl_penalty(ours, theirs, everywhere, estimator=self.loss.kl_estimator)[:, 0]
            loss = loss + self.loss.kl_coefficient * (weights * penalty).sum() / n_pairs
            accumulator.add_valid("kl", penalty.detach(), counted)
        return differentiate(loss)

    def _score(self, model: nn.Module, prefix: Prefix, anchors: Anchors, answers: Answers) -> Tensor:
        """Log-probabilities [S, n, L] of the answers' tokens."""
        temperature, backend = self.sampling.temperature, self.config.training.attention
        length = answers.tokens.shape[2]
        # At least two tokens: workers with sharded weights must make the same passes, and one token needs none.
        tokens = F.pad(answers.tokens[:, None], (0, max(2 - length, 0)))
        scored = completion_log_probs(model, prefix, anchors, tokens, temperature=temperature, backend=backend)
        return scored[:, 0, :, :length]


def prompts_of(batch: Batch, anchors: Anchors) -> list[list[int]]:
    """The tokens before the one anchor of each sequence that has one."""
    tokens, positions = batch.tokens.cpu(), anchors.positions[:, 0].tolist()
    return [tokens[s, : positions[s]].tolist() for s in anchors.valid[:, 0].nonzero()[:, 0].tolist()]


def rows_of(batch: Batch, anchors: Anchors) -> list[int]:
    """The rows in the data of the sequences with an anchor."""
    return batch.indices[anchors.valid[:, 0]].tolist()  # type: ignore[no-any-return]


def _tally(accumulator: MetricAccumulator, sampled: _Sampled, judgements: Judgements, rewarded: Rewarded) -> None:
    answers, (rewards, judged, parsed), valid = sampled.answers, judgements, sampled.valid
    accumulator.add_valid("verifier_reward", rewards, judged)
    accumulator.add_valid("unparsed_rate", (~parsed).double(), judged)
    accumulator.add_valid("verifier_failure_rate", (~judged).double(), sampled.submitted)
    accumulator.add_valid("advantage", rewarded.advantages, rewarded.counted)
    if rewarded.matching is not None:
        accumulator.add_valid("reward", rewarded.reward, judged)
        accumulator.add_valid("alignment", rewarded.matching.alignment, valid)
        accumulator.add_valid("diversity", rewarded.matching.diversity, valid)
    accumulator.add_valid("answer_tokens", answers.lengths, valid)
    accumulator.add_valid("truncated_rate", (~answers.ended).double(), valid)
    accumulator.add_valid("duplicate_rate", duplicate_fraction(answers.tokens), valid)
    # Minus the log-probability of a drawn token is an unbiased estimate of the entropy of its distribution.
    accumulator.add_valid("policy_entropy", -answers.log_probs, answers.mask)
    highest, lowest = (torch.where(judged, rewarded.reward, bound) for bound in (-torch.inf, torch.inf))
    spread = highest.amax(dim=-1) - lowest.amin(dim=-1)
    accumulator.add_valid("zero_variance_fraction", (spread < 1e-8).double(), judged.any(dim=-1))
