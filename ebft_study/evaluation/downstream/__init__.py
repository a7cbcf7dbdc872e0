"""Evaluate a model on benchmarks: sample answers to their problems, judge these, and score each problem.

    greedy       the most probable answer
    pass@k       the chance that one of k samples passes all tests; best of k: the best BLEU or COMET among k samples

The draws of a problem depend on `evaluation_seed`, the benchmark and the problem alone: models are compared on common
random numbers, and a resumed study repeats them.
"""

from __future__ import annotations

import contextlib
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ebft_study.data.tokens import encode_prompts
from ebft_study.errors import ConfigError
from ebft_study.evaluation import Measured, Scores, rows_of, score_rows, spread_rows
from ebft_study.evaluation.downstream.benchmarks import Benchmark
from ebft_study.evaluation.downstream.items import Item
from ebft_study.evaluation.downstream.metrics import (
    BLEU_COUNTS,
    bleu_counts,
    corpus_bleu,
    jackknife,
)
from ebft_study.evaluation.downstream.protocol import Judges, Protocol, judged
from ebft_study.progress import Progress
from ebft_study.rollouts.answers import AnswerSampler, Sampling
from ebft_study.verifiers import Judgement, Problem
from ebft_study.verifiers.parsing import until_stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHOWN_PROBLEMS, SHOWN_SAMPLES = 4, 4
"""Problems, and samples of each besides the greedy answer, whose texts are kept."""
GREEDY = -1
"""Number of the greedy answer among the samples of a problem."""


@dataclass
class Answers:
    """What became of the answers to the problems of a benchmark: the greedy one first, then the samples.

    All are [P, 1 + n], NaN for problems of other workers; rewards also where the verifier failed.
    """

    rewards: Tensor
    parsed: Tensor
    comet: Tensor
    distinct: Tensor
    """[P] share of the samples that differ from all before them."""
    counts: Tensor
    """[P, 1 + n, 10] counts of corpus BLEU."""
    work: Tensor
    """[3] tokens that the model ran, keys that they met, and tokens that it drew."""

    @classmethod
    def empty(cls, problems: int, samples: int) -> Answers:
        unknown = torch.full((problems, 1 + samples), math.nan, dtype=torch.float64)
        counts = torch.zeros(problems, 1 + samples, BLEU_COUNTS, dtype=torch.float64)
        work = torch.zeros(3, dtype=torch.float64)
        return cls(unknown, unknown.clone(), unknown.clone(), unknown[:, 0].clone(), counts, work)


def answer_work(prompts: Sequence[int], lengths: Tensor) -> Tensor:
    """Work of the passes of prompts, by their numbers of tokens [S], and of their answers, of `lengths` [S, n].

    Returns:
        [3] tokens that the model runs, keys that they meet, and tokens that it draws.
    """
    P, L = torch.tensor(prompts, dtype=torch.float64)[:, None], lengths.double().cpu()
    pairs = (P * (P + 1) / 2).sum() + (L * P + L * (L + 1) / 2).sum()
    return torch.stack([P.sum() + L.sum(), pairs, L.sum()])


@dataclass
class Result:
    """Scores of a model on a benchmark.

    `bleu_counts`: k (None: greedy answers) -> [P, 10], of the chosen translation of each problem.
    """

    benchmark: str
    measured: Measured
    work: Tensor
    """[3] tokens that the model ran, keys that they met, and tokens that it drew."""
    bleu_counts: dict[int | None, Tensor] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def tensors(self) -> list[Tensor]:
        """All sums, which add up over workers."""
        return [
            *(part for scores in self.measured.values() for part in (scores.sums, scores.counts)),
            *self.bleu_counts.values(),
            self.work,
        ]

    def evaluations(self) -> list[dict[str, Any]]:
        """Rows of the table `evaluations`; a metric without any value has none."""
        rows = rows_of({key: scores for key, scores in self.measured.items() if scores.count}, self.benchmark)
        for k, counts in self.bleu_counts.items():
            sentences = counts.numpy()
            value, error = corpus_bleu(sentences.sum(axis=0)), jackknife(sentences, corpus_bleu)
            row = {"benchmark": self.benchmark, "metric": "corpus_bleu", "position": k, "value": value}
            rows.append({**row, "standard_error": error, "count": len(sentences)})
        return rows

    def scores(self) -> list[dict[str, Any]]:
        """Rows of the table `scores`: a value per problem."""
        return score_rows({key: scores for key, scores in self.measured.items() if scores.count}, self.benchmark)


def check_room(
    benchmarks: Sequence[Benchmark], tokenizer: PreTrainedTokenizerFast, *, max_tokens: int, positions: int | None
) -> None:
    """Refuse benchmarks whose longest prompt and answer exceed the model's positions; None: it has no limit."""
    if positions is None:
        return
    for benchmark in benchmarks:
        length, item = _longest_prompt(benchmark, tokenizer)
        room = positions - length
        if max_tokens > room:
            remedy = f"benchmark_max_tokens <= {room}, or " if room > 0 else ""
            raise ConfigError(
                f"evaluation.benchmark_max_tokens={max_tokens}: problem {item.id} of {benchmark.name} has a prompt of "
                f"{length} tokens, and the model {positions} positions. Use {remedy}a model with a longer context"
            )


def check_engine_room(
    benchmarks: Sequence[Benchmark], tokenizer: PreTrainedTokenizerFast, *, max_tokens: int, request_tokens: int
) -> None:
    """Refuse benchmarks whose longest prompt and answer exceed what the engine takes."""
    for benchmark in benchmarks:
        length, item = _longest_prompt(benchmark, tokenizer)
        if length + max_tokens > request_tokens:
            raise ConfigError(
                f"evaluation.benchmark_max_tokens={max_tokens}: problem {item.id} of {benchmark.name} has a prompt of "
                f"{length} tokens, and the engine takes {request_tokens} tokens of prompt and answer. "
                f"Use vllm.longest_request_tokens={length + max_tokens}"
            )


def _longest_prompt(benchmark: Benchmark, tokenizer: PreTrainedTokenizerFast) -> tuple[int, Item]:
    """Tokens of the longest prompt, and its problem."""
    prompts = encode_prompts(tokenizer, [item.problem.prompt for item in benchmark.items])
    return max(zip(map(len, prompts), benchmark.items, strict=True), key=lambda pair: pair[0])


@dataclass(frozen=True)
class BenchmarkEvaluator:
    """Evaluates models on one benchmark. Problems are divided among workers, and the sums of all make the result."""

    benchmark: Benchmark
    judges: Judges
    protocol: Protocol
    sampler: AnswerSampler
    tokenizer: PreTrainedTokenizerFast

    def measure(self, model: nn.Module, *, rank: int = 0, world_size: int = 1, shown: bool = False) -> Result:
        """Scores of this worker's share of the problems.

        Args:
            shown: show progress.
        """
        prompts = encode_prompts(self.tokenizer, [item.problem.prompt for item in self.benchmark.items])
        answers, samples = Answers.empty(len(prompts), self.protocol.samples), list[dict[str, Any]]()
        mine = range(len(prompts))[rank::world_size]
        kept = {mine[int(k)] for k in spread_rows(len(mine), SHOWN_PROBLEMS)} if rank == 0 else set()
        training = model.training
        model.eval()
        with Progress(self.benchmark.name, len(mine)) if shown else contextlib.nullcontext() as progress:
            for batch in self._batches(mine, prompts):
                texts = self._sample(model, batch, prompts, answers)
                self._judge(batch, texts, answers)
                for k, of_problem in zip(batch, texts, strict=True):
                    samples += self._sample_rows(k, of_problem, answers, len(prompts[k])) if k in kept else []
                    if progress:
                        progress.advance("problems")
        model.train(training)
        return self._result(answers, samples)

    def _batches(self, problems: Sequence[int], prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Problems with prompts of similar lengths together, so that little is padding."""
        ordered = sorted(problems, key=lambda k: (len(prompts[k]), k))
        size = max(1, self.sampler.tokens_at_once // (self.protocol.max_tokens * self.protocol.samples))
        for begin in range(0, len(ordered), size):
            yield ordered[begin : begin + size]

    def _sample(
        self, model: nn.Module, batch: Sequence[int], prompts: Sequence[Sequence[int]], answers: Answers
    ) -> list[list[str]]:
        """The answers to some problems, cut at their stops: the greedy one, then the samples."""
        chosen, ids = [prompts[k] for k in batch], [self.benchmark.numbers[k] for k in batch]
        key = (self.protocol.seed, zlib.crc32(self.benchmark.name.encode()))
        texts = list[list[list[str]]]()
        for sampling in (replace(self._sampling, n_samples=1, temperature=0.0), self._sampling):
            sampled = self.sampler.sample(model, chosen, sampling, key=key, ids=ids)
            answers.work += answer_work([len(prompt) for prompt in chosen], sampled.lengths)
            texts.append(sampled.texts(self.tokenizer))
        items = [self.benchmark.items[k] for k in batch]
        return [
            [until_stop(text, item.stops) for text in (*greedy, *others)]
            for item, greedy, others in zip(items, *texts, strict=True)
        ]

    @functools.cached_property
    def _sampling(self) -> Sampling:
        """How the answers besides the greedy one are sampled."""
        protocol, ends = self.protocol, end_tokens(self.tokenizer, self.benchmark.items)
        return Sampling(protocol.samples, protocol.max_tokens, protocol.temperature, ends, protocol.top_p)

    def _judge(self, batch: Sequence[int], texts: Sequence[Sequence[str]], answers: Answers) -> None:
        items = [self.benchmark.items[k] for k in batch]
        flat = [(item, text) for item, row in zip(items, texts, strict=True) for text in row]
        verdicts = judged(self.judges.verifier, [(item.problem, text) for item, text in flat])
        shape = (len(batch), -1)
        answers.rewards[batch] = _rewards(verdicts).view(shape)
        answers.parsed[batch] = torch.tensor([float(verdict.parsed) for verdict in verdicts], dtype=torch.float64).view(
            shape
        )
        answers.distinct[batch] = torch.tensor([len(set(row[1:])) / len(row[1:]) for row in texts]).double()
        if self.benchmark.kind == "translation":
            tokenizer = self.benchmark.bleu_tokenizer
            rows = [bleu_counts(text.strip(), item.problem.reference, tokenizer) for item, text in flat]
            answers.counts[batch] = torch.tensor(rows, dtype=torch.float64).view(len(batch), -1, BLEU_COUNTS)
        if self.judges.comet is not None:
            sources = [(Problem(item.own_text[0], item.problem.reference), text) for item, text in flat]
            answers.comet[batch] = _rewards(judged(self.judges.comet, sources)).view(shape)

    def _sample_rows(self, k: int, texts: Sequence[str], answers: Answers, length: int) -> list[dict[str, Any]]:
        """Rows of the table `samples`, of one problem."""
        item, rewards = self.benchmark.items[k], answers.rewards[k].tolist()
        common = {"benchmark": self.benchmark.name, "sequence": self.benchmark.numbers[k], "anchor": length}
        shown = list(zip(range(GREEDY, self.protocol.samples), texts, rewards, strict=True))[: 1 + SHOWN_SAMPLES]
        return [
            {
                **common,
                "sample": sample,
                "context": item.problem.prompt,
                "completion": text,
                "ground_truth": item.problem.reference,
                "reward": None if math.isnan(reward) else reward,
            }
            for sample, text, reward in shown
        ]

    def _result(self, answers: Answers, samples: list[dict[str, Any]]) -> Result:
        protocol, numbers = self.protocol, torch.tensor(self.benchmark.numbers)
        is_translation = self.benchmark.kind == "translation"
        greedy, best = ("greedy_bleu", "best_of_k_bleu") if is_translation else ("greedy_pass_rate", "pass_at_k")
        values: dict[tuple[str, int | None], Tensor] = {(greedy, None): answers.rewards[:, 0]}
        values |= {(best, k): _each(answers.rewards[:, 1:], k, protocol.best) for k in protocol.ks}
        if self.judges.comet is not None:
            values["greedy_comet", None] = answers.comet[:, 0]
            values |= {("best_of_k_comet", k): _each(answers.comet[:, 1:], k, protocol.best) for k in protocol.ks}
        unjudged = torch.where(answers.parsed.isnan(), math.nan, answers.rewards.isnan().double())
        values |= {
            ("unparsed_answers", None): 1.0 - answers.parsed[:, 1:].mean(dim=1),
            ("unjudged_answers", None): unjudged[:, 1:].mean(dim=1),
            ("distinct_answers", None): answers.distinct,
        }
        measured: Measured = {}
        for key, of_problems in values.items():
            measured[key] = Scores.zeros(numbers)
            measured[key].add(torch.arange(len(numbers)), of_problems[:, None], ~of_problems[:, None].isnan())
        result = Result(self.benchmark.name, measured, answers.work, samples=samples)
        if is_translation:
            result.bleu_counts[None] = answers.counts[:, 0]
            if protocol.is_authors:
                result.bleu_counts |= {k: _chosen(answers, k) for k in protocol.ks}
        return result


def end_tokens(tokenizer: PreTrainedTokenizerFast, items: Sequence[Item]) -> frozenset[int]:
    """Tokens after which nothing of an answer counts: the end token and, where answers are one line, line breaks."""
    ends = {tokenizer.eos_token_id} - {None}
    if all(item.stops == ("\n",) for item in items):
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        ends |= {token for token, text in enumerate(texts) if "\n" in text}
    return frozenset(ends)


def _rewards(judged: Sequence[Judgement]) -> Tensor:
    values = [math.nan if judgement.reward is None else judgement.reward for judgement in judged]
    return torch.tensor(values, dtype=torch.float64)


def _each(rewards: Tensor, k: int, best: Callable[[Sequence[float], int], float]) -> Tensor:
    """The best of k of each problem [P, n] -> [P], of the samples that were judged; NaN where fewer than k were."""
    rows = [[reward for reward in row if not math.isnan(reward)] for row in rewards.tolist()]
    return torch.tensor([best(row, k) for row in rows], dtype=torch.float64)


def _chosen(answers: Answers, k: int) -> Tensor:
    """BLEU counts [P, 10] of the sample that COMET prefers among the first k."""
    choice = answers.comet[:, 1 : 1 + k].nan_to_num(-math.inf).argmax(dim=1)
    return answers.counts[torch.arange(len(choice)), 1 + choice]
