"""Scores of scripted answers by hand; every setting of the protocol matters; problems are divided among workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from statistics import mean, pstdev
from typing import Any

import pytest
import torch
from sacrebleu.metrics.bleu import BLEU
from torch import nn

from ebft_study.config import EvaluationConfig, VerifierConfig
from ebft_study.data.tokens import encode_prompts
from ebft_study.errors import ConfigError
from ebft_study.evaluation.downstream import (
    BenchmarkEvaluator,
    Result,
    check_engine_room,
    check_room,
    end_tokens,
)
from ebft_study.evaluation.downstream.benchmarks import Benchmark
from ebft_study.evaluation.downstream.items import Item
from ebft_study.evaluation.downstream.protocol import Judges, Protocol, judges_of
from ebft_study.networks.loading import LoadedModel, load_model
from ebft_study.rollouts.answers import Answers, InProcessAnswers, Sampling
from ebft_study.verifiers import Judgement, Problem
from tests.tiny_run import write_model

REWARDS = {"good": 1.0, "bad": 0.0, "broken": None, "": 0.0}
GREEDY = ["good", "bad", "broken", "bad"]
SAMPLES = [
    ["good", "bad", "bad", "bad"],
    ["bad", "bad", "bad", ""],
    ["good", "broken", "good", "bad"],
    ["good", "good", "good", "good"],
]


class Scripted:
    """A sampler whose answers are written down, by the problem's number."""

    tokens_at_once = 2**16

    def __init__(self, greedy: Sequence[str], samples: Sequence[Sequence[str]]) -> None:
        self.greedy, self.samples = greedy, samples
        self.calls: list[tuple[Sampling, Sequence[int]]] = []

    def sample(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        key: Sequence[int],
        ids: Sequence[int],
    ) -> Answers:
        self.calls.append((sampling, key))
        rows = [[self.greedy[k]] if sampling.is_greedy else list(self.samples[k])[: sampling.n_samples] for k in ids]
        lengths = torch.tensor([[max(len(text), 1) for text in row] for row in rows])
        return Said(lengths[..., None], lengths[..., None].float(), lengths, lengths > 0, rows)


class Said(Answers):
    """Answers with their texts."""

    def __init__(self, *tensors: Any) -> None:
        *parts, self_rows = tensors
        super().__init__(*parts)
        object.__setattr__(self, "rows_of_text", self_rows)

    def texts(self, tokenizer: object) -> list[list[str]]:
        return self.rows_of_text  # type: ignore[attr-defined, no-any-return]


class ByWord:
    """A verifier that knows the words of `REWARDS`."""

    name, lowest, highest = "by word", 0.0, 1.0

    def __init__(self, rewards: dict[str, float | None]) -> None:
        self.rewards = rewards

    def judge(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Judgement]:
        return [Judgement(self.rewards[text], bool(text), "") for text in completions]

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(write_model(tmp_path_factory.mktemp("model"))))


def benchmark(kind: Any = "code", stops: tuple[str, ...] = ()) -> Benchmark:
    prompts = ["def", "return value index", "self list", "none true"]
    items = tuple(Item(f"p{k}", Problem(prompt, "good"), stops, (prompt,)) for k, prompt in enumerate(prompts))
    return Benchmark("b", kind, items, (0, 1, 2, 3), "here")


def protocol(**changes: Any) -> Protocol:
    return Protocol.from_config(EvaluationConfig(benchmark_samples=4, benchmark_max_tokens=8, **changes))


def measure(base: LoadedModel, judged: Judges, rules: Protocol, kind: Any = "code", **ranks: int) -> Result:
    evaluator = BenchmarkEvaluator(benchmark(kind), judged, rules, Scripted(GREEDY, SAMPLES), base.tokenizer)
    return evaluator.measure(base.model, **ranks)


def values(result: Result) -> dict[tuple[str, int | None], tuple[float, float, int]]:
    return {
        (row["metric"], row["position"]): (row["value"], row["standard_error"], row["count"])
        for row in result.evaluations()
    }


def test_scores_are_as_defined(base: LoadedModel) -> None:
    found = values(measure(base, Judges(ByWord(REWARDS)), protocol()))
    passes = [[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0], [1, 1, 1, 1]]  # of those that were judged
    # The greedy answer of one problem was not judged.
    assert found["greedy_pass_rate", None] == pytest.approx((1 / 3, pstdev([1, 0, 0]) / 3**0.5, 3))
    assert found["pass_at_k", 1] == pytest.approx((mean(map(mean, passes)), pstdev(map(mean, passes)) / 2, 4))
    # Of one problem only three samples were judged.
    full = [mean(max(part) for part in combinations(row, 4)) for row in passes if len(row) == 4]
    assert found["pass_at_k", 4] == pytest.approx((mean(full), pstdev(full) / 3**0.5, 3))
    assert found["unparsed_answers", None][0] == pytest.approx(1 / 16)
    assert found["unjudged_answers", None][0] == pytest.approx(1 / 16)
    assert found["distinct_answers", None][0] == pytest.approx(mean([2 / 4, 2 / 4, 3 / 4, 1 / 4]))
    assert ("pass_at_k", 16) not in found


def test_scores_of_single_problems_are_kept(base: LoadedModel) -> None:
    result = measure(base, Judges(ByWord(REWARDS)), protocol())
    rows = {(row["metric"], row["position"]): row for row in result.scores()}
    assert rows["pass_at_k", 1]["sequences"] == [0, 1, 2, 3]
    assert rows["pass_at_k", 1]["values"] == pytest.approx([0.25, 0.0, 2 / 3, 1.0])
    assert rows["greedy_pass_rate", None]["sequences"] == [0, 1, 3]
    assert set(rows["pass_at_k", 1]["counts"]) == {1}


def test_samples_are_kept_with_their_rewards(base: LoadedModel) -> None:
    rows = measure(base, Judges(ByWord(REWARDS)), protocol()).samples
    of_third = [row for row in rows if row["sequence"] == 2]
    assert [(row["sample"], row["completion"], row["reward"]) for row in of_third] == [
        *[(-1, "broken", None), (0, "good", 1.0), (1, "broken", None), (2, "good", 1.0), (3, "bad", 0.0)]
    ]
    assert {row["benchmark"] for row in rows} == {"b"}
    assert of_third[0]["context"] == "self list"


def test_workers_share_the_problems(base: LoadedModel) -> None:
    whole = measure(base, Judges(ByWord(REWARDS)), protocol())
    parts = [measure(base, Judges(ByWord(REWARDS)), protocol(), rank=rank, world_size=3) for rank in range(3)]
    for total, *shares in zip(whole.tensors(), *(part.tensors() for part in parts), strict=True):
        assert torch.allclose(total, torch.stack(shares).sum(dim=0))
    assert [len(part.samples) for part in parts[1:]] == [0, 0]
    assert {row["sequence"] for row in parts[0].samples} == {0, 3}


def test_the_work_is_that_of_all_passes(base: LoadedModel) -> None:
    result = measure(base, Judges(ByWord(REWARDS)), protocol())
    prompts = [len(tokens) for tokens in encode_prompts(base.tokenizer, [i.problem.prompt for i in benchmark().items])]
    tokens = pairs = drawn = 0.0
    for passes in ([[text] for text in GREEDY], SAMPLES):
        for length, texts in zip(prompts, passes, strict=True):
            lengths = [max(len(text), 1) for text in texts]
            tokens += length + sum(lengths)
            drawn += sum(lengths)
            pairs += sum(range(1, length + 1)) + sum(length + t for own in lengths for t in range(1, own + 1))
    assert result.work.tolist() == [tokens, pairs, drawn]


def test_the_protocol_reaches_the_sampler(base: LoadedModel) -> None:
    def calls(**settings: Any) -> list[tuple[Sampling, Sequence[int]]]:
        sampler = Scripted(GREEDY, SAMPLES)
        rules = Protocol.from_config(EvaluationConfig(**{"benchmark_samples": 4, **settings}))
        BenchmarkEvaluator(benchmark(), Judges(ByWord(REWARDS)), rules, sampler, base.tokenizer).measure(base.model)
        return sampler.calls

    def sampled(**settings: Any) -> Sampling:
        return calls(**settings)[1][0]

    ends = frozenset({base.tokenizer.eos_token_id})
    (greedy, _), (drawn, key) = calls()
    assert greedy == Sampling(1, 512, 0.0, ends)
    assert drawn == Sampling(4, 512, 0.6, ends)
    assert sampled(benchmark_protocol="authors") == replace(drawn, top_p=0.95)
    assert sampled(benchmark_protocol="authors", benchmark_top_p=0.5) == replace(drawn, top_p=0.5)
    assert sampled(benchmark_temperature=0.9) == replace(drawn, temperature=0.9)
    assert sampled(benchmark_samples=3) == replace(drawn, n_samples=3)
    assert {sampling.max_tokens for sampling, _ in calls(benchmark_max_tokens=7)} == {7}
    assert calls(evaluation_seed=1)[1][1] != key


def test_translations_are_scored_by_bleu_and_comet(base: LoadedModel) -> None:
    bleu: dict[str, float | None] = {"good": 1.0, "bad": 0.1, "broken": 0.2, "": 0.0}
    comet: dict[str, float | None] = {"good": 0.3, "bad": 0.9, "broken": 0.5, "": 0.0}
    said = {word: f"this is such a {word} day" if word else "" for word in bleu}
    judges = Judges(*(ByWord({said[word]: score for word, score in each.items()}) for each in (bleu, comet)))
    asked = benchmark("translation")
    items = [replace(item, problem=replace(item.problem, reference=said["good"])) for item in asked.items]
    sampler = Scripted([said[word] for word in GREEDY], [[said[word] for word in row] for row in SAMPLES])

    def scores(rules: Protocol) -> dict[tuple[str, int | None], tuple[float, float, int]]:
        evaluator = BenchmarkEvaluator(replace(asked, items=tuple(items)), judges, rules, sampler, base.tokenizer)
        return values(evaluator.measure(base.model))

    def corpus(words: list[str]) -> float:
        return BLEU().corpus_score([said[word] for word in words], [[said["good"]] * 4]).score / 100

    found = scores(protocol())
    rows = [[bleu[text] or 0.0 for text in row] for row in SAMPLES]
    assert found["best_of_k_bleu", 4][0] == pytest.approx(mean(map(max, rows)))
    assert found["greedy_comet", None][0] == pytest.approx(mean(comet[text] or 0.0 for text in GREEDY))
    assert found["corpus_bleu", None][0] == pytest.approx(corpus(GREEDY))
    assert ("corpus_bleu", 4) not in found
    authors = scores(protocol(benchmark_protocol="authors"))
    assert authors["best_of_k_bleu", 1][0] == pytest.approx(mean(row[0] for row in rows))
    assert authors["best_of_k_comet", 4][0] == pytest.approx(mean([0.9, 0.9, 0.9, 0.3]))
    # COMET prefers "bad" wherever there is one.
    assert authors["corpus_bleu", 4][0] == pytest.approx(corpus(["bad", "bad", "bad", "good"]))
    assert authors["corpus_bleu", 1][0] == pytest.approx(corpus([row[0] for row in SAMPLES]))


def test_the_authors_protocol_needs_comet_for_translations() -> None:
    with pytest.raises(ConfigError, match=r"benchmark_protocol='authors'.*COMET.*verifier.comet_python"):
        judges_of(benchmark("translation"), VerifierConfig(), protocol(benchmark_protocol="authors"))


def test_answers_end_before_a_stop_and_lines_at_their_end(base: LoadedModel) -> None:
    sampler = Scripted(["good\nbad"] * 4, [["good\n", "bad", "bad", "bad"]] * 4)
    evaluator = BenchmarkEvaluator(
        benchmark(stops=("\n",)), Judges(ByWord(REWARDS)), protocol(), sampler, base.tokenizer
    )
    assert values(evaluator.measure(base.model))["greedy_pass_rate", None][0] == 1.0
    ends = end_tokens(base.tokenizer, evaluator.benchmark.items)
    breaks = {token for token in range(len(base.tokenizer)) if "\n" in base.tokenizer.decode([token])}
    assert ends == breaks | {base.tokenizer.eos_token_id}
    assert end_tokens(base.tokenizer, benchmark().items) == {base.tokenizer.eos_token_id}


def test_prompts_that_are_too_long_are_refused(base: LoadedModel) -> None:
    longest = max(map(len, encode_prompts(base.tokenizer, [item.problem.prompt for item in benchmark().items])))
    short = replace(benchmark(), items=benchmark().items[:1], numbers=(0,))
    check_room([benchmark()], base.tokenizer, max_tokens=10, positions=longest + 10)
    check_room([benchmark()], base.tokenizer, max_tokens=10**9, positions=None)
    with pytest.raises(ConfigError, match=r"benchmark_max_tokens=11: problem p1 of b .* benchmark_max_tokens <= 10"):
        check_room([short, benchmark()], base.tokenizer, max_tokens=11, positions=longest + 10)
    with pytest.raises(ConfigError, match="Use a model with a longer context"):
        check_room([benchmark()], base.tokenizer, max_tokens=1, positions=longest)


def test_an_engine_that_is_too_small_is_refused_with_the_size_that_it_needs(base: LoadedModel) -> None:
    longest = max(map(len, encode_prompts(base.tokenizer, [item.problem.prompt for item in benchmark().items])))
    check_engine_room([benchmark()], base.tokenizer, max_tokens=10, request_tokens=longest + 10)
    with pytest.raises(ConfigError, match=rf"problem p1 of b .*Use vllm.longest_request_tokens={longest + 10}$"):
        check_engine_room([benchmark()], base.tokenizer, max_tokens=10, request_tokens=longest + 9)


def test_batches_change_nothing(base: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class ByLength(ByWord):
        def judge(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Judgement]:
            return [Judgement(len(text) / 100, bool(text), "") for text in completions]

    def run() -> Result:
        evaluator = BenchmarkEvaluator(
            benchmark(), Judges(ByLength({})), protocol(), InProcessAnswers(), base.tokenizer
        )
        return evaluator.measure(base.model)

    whole = run()
    monkeypatch.setattr(InProcessAnswers, "tokens_at_once", 1)
    single = run()
    assert values(whole) == values(single)
    assert sorted(whole.samples, key=str) == sorted(single.samples, key=str)
