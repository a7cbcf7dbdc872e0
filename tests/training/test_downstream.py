"""Benchmarks during a run: when they are evaluated, what is recorded, and exact repetition after a kill."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import multiprocessing, nn

from ebft_study.config import RunConfig
from ebft_study.errors import ConfigError
from ebft_study.evaluation import base
from ebft_study.evaluation.downstream import BenchmarkEvaluator
from ebft_study.networks.loading import fingerprint
from ebft_study.rollouts.answers import AnswerSampler, InProcessAnswers
from ebft_study.study.forecast.benchmarks import benchmark_evaluations
from ebft_study.training import downstream, validation
from ebft_study.training.prepare import prepare
from ebft_study.training.setup import build_parts
from ebft_study.training.update import Run
from tests.evaluation.downstream import files
from tests.tiny_run import MemoryRecorder, keep_checkpoints, run_tiny, tiny_config
from tests.training.test_engine import Engine, Pretended

SHORT = {"benchmark_samples": 4, "benchmark_max_tokens": 6}


def config_of(folder: Path, **changes: Any) -> RunConfig:
    name = files.parallel(folder)
    return tiny_config(folder, **{"benchmarks": [name], "learning_rate": 0.05, **SHORT, **changes})


def scores(recorder: MemoryRecorder) -> dict[int, dict[tuple[str, int | None], float]]:
    return {
        step: {(r["metric"], r["position"]): r["value"] for r in rows if r["benchmark"] == "wmt22_de-en"}
        for step, rows in recorder.evaluated.items()
    }


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, {0, 4}),
        ({"benchmark_every_steps": 3}, {0, 3, 4}),
        ({"warm_start_steps": 2, "steps": 2}, {0, 2, 4}),
        ({"steps": 0}, {0}),
    ],
)
def test_benchmarks_are_evaluated_when_they_are_due(tmp_path: Path, changes: dict[str, Any], steps: set[int]) -> None:
    config = config_of(tmp_path, **changes)
    _, recorder = run_tiny(config)
    found = {step: rows for step, rows in scores(recorder).items() if rows}
    assert found.keys() == steps
    assert benchmark_evaluations(config) == len(steps - {0})  # as the plan counts them
    assert found[0].keys() - found[max(steps)].keys() <= {("contaminated_fraction", None)}
    assert {("greedy_bleu", None), ("best_of_k_bleu", 4), ("corpus_bleu", None)} <= found[max(steps)].keys()
    kept = {row["benchmark"] for row in recorder.sampled[max(steps)] if "benchmark" in row}
    assert kept == {"wmt22_de-en"}
    assert {row["benchmark"] for row in recorder.scored[max(steps)]} >= {"wmt22_de-en"}


def test_trials_report_the_score_of_one_sample_where_it_was_measured(tmp_path: Path) -> None:
    reports: list[dict[str, float]] = []
    _, recorder = run_tiny(
        config_of(tmp_path, warm_start_steps=2, steps=4, eval_every_steps=1, benchmark_every_steps=4),
        on_report=lambda metrics, folder: reports.append(dict(metrics)),
    )
    expected = {step: row["best_of_k_bleu", 1] for step, row in scores(recorder).items() if row}
    assert expected.keys() == {0, 2, 4, 6}
    assert {step: row["benchmark_score"] for step, row in recorder.rows.items() if "benchmark_score" in row} == expected
    reported = {int(report["step"]): report.get("benchmark_score") for report in reports}
    assert reported == {step: expected.get(step) for step in range(7)}, "an old score is not reported again"


def test_a_run_that_is_killed_in_an_evaluation_repeats_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, benchmark_every_steps=1, benchmark_temperature=1.0)
    _, whole = run_tiny(config, on_report=keep_checkpoints(tmp_path / "whole"))
    judge, calls = BenchmarkEvaluator._judge, []

    def killed(self: BenchmarkEvaluator, *arguments: Any) -> None:
        judge(self, *arguments)
        calls.append(1)
        if len(calls) == 3:  # the base model was evaluated before; this is after step 3
            raise KeyboardInterrupt

    monkeypatch.setattr(BenchmarkEvaluator, "_judge", killed)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(config, on_report=keep_checkpoints(tmp_path / "killed"))
    monkeypatch.undo()
    monkeypatch.setenv("EBFT_STUDY_CACHE", str(tmp_path / "cache"))
    _, rest = run_tiny(config, start_from=tmp_path / "killed" / "step-2")
    for step in (3, 4):
        assert scores(rest)[step] == scores(whole)[step]
        ours = [row for row in rest.sampled[step] if "benchmark" in row]
        assert ours == [row for row in whole.sampled[step] if "benchmark" in row]
    texts = [[r["completion"] for r in whole.sampled[s] if "benchmark" in r] for s in (0, 2, 4)]
    assert texts[0] != texts[2]


def test_the_base_model_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, steps=0)
    _, first = run_tiny(config)
    monkeypatch.setattr(BenchmarkEvaluator, "measure", None)
    _, second = run_tiny(config)
    assert scores(first) == scores(second)
    assert scores(first)[0]["contaminated_fraction", None] == 0.0


def test_the_weights_at_the_end_of_a_warm_start_are_hashed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Any] = []
    fingerprint = validation.fingerprint
    monkeypatch.setattr(validation, "fingerprint", lambda model: hashed.append(model) or fingerprint(model))
    _, recorder = run_tiny(config_of(tmp_path, warm_start_steps=2, steps=2))
    assert scores(recorder)[2]
    assert len(hashed) == 1


def test_only_the_first_worker_stores_what_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EBFT_STUDY_CACHE", str(tmp_path / "cache"))
    run = Run(config_of(tmp_path))
    entries = tmp_path / "cache" / "base_evaluations"
    for rank, stored in ((1, 0), (0, 3)):
        run.rank = rank
        model = validation.shared_model(run)
        validation.evaluate_shared(run, model)
        downstream.measure_shared(run, model)
        assert len(list(entries.glob("*"))) == stored


def key_of(config: RunConfig, engine: str = "") -> str:
    parts = build_parts(config)
    return base.benchmark_key(config, parts.base, parts.benchmarks[0], engine=engine)


def test_what_changes_the_scores_of_the_base_model_changes_their_key(tmp_path: Path) -> None:
    same = key_of(config_of(tmp_path))
    changes: list[dict[str, Any]] = [
        {"benchmark_samples": 5},
        {"benchmark_max_tokens": 5},
        {"benchmark_temperature": 0.5},
        {"benchmark_top_p": 0.5},
        {"benchmark_problems": 1},
        {"benchmark_protocol": "authors"},
        {"evaluation_seed": 1},
        {"precision": "bfloat16"},
        {"test_cpu_seconds": 9},
    ]
    keys = {key_of(config_of(tmp_path, **change)) for change in changes}
    keys |= {key_of(config_of(tmp_path), engine) for engine in ("vLLM 1", "vLLM 2")}
    assert len(keys | {same}) == 1 + len(changes) + 2
    for change in ({"benchmark_every_steps": 2}, {"seed": 1}, {"steps": 9}, {"max_examples": 20}, {"cfm_samples": 5}):
        assert key_of(config_of(tmp_path, **change)) == same, change
    (tmp_path / "test.de-en.en").write_text("Good day.\nThis is a small hut.\n")
    changed = tiny_config(tmp_path, benchmarks=[f"wmt22:{tmp_path / 'test.de-en'}.de"], **SHORT)
    assert key_of(changed) != same


def test_the_base_model_is_measured_once_for_several_data_sets_and_each_is_compared_with_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first = run_tiny(config_of(tmp_path, steps=0))
    monkeypatch.setattr(BenchmarkEvaluator, "measure", None)
    problem = build_parts(config_of(tmp_path)).benchmarks[0].items[1].own_text[1]
    data = tmp_path / "other.jsonl"
    data.write_text("".join(json.dumps({"text": f"{problem} {k}"}) + "\n" for k in range(60)))
    _, second = run_tiny(config_of(tmp_path, steps=0, dataset=str(data)))
    one, other = scores(first)[0], scores(second)[0]
    assert one.pop(("contaminated_fraction", None)) == 0.0 < other.pop(("contaminated_fraction", None))
    assert one == other


def test_benchmarks_do_not_change_the_key_of_the_other_evaluations(tmp_path: Path) -> None:
    keys = set()
    for config in (tiny_config(tmp_path), config_of(tmp_path)):
        parts = build_parts(config)
        keys.add(base.key(config, parts.base, parts.evaluator, parts.text, parts.data))
    assert len(keys) == 1


class AnsweringEngine(Engine):
    """Remembers whose weights were asked for answers."""

    engine = "engine 1"

    def __init__(self) -> None:
        super().__init__(error=0.0, late=0)
        self.answered: list[str] = []
        self.happened: list[str] = []

    @contextlib.contextmanager
    def answers_of(self, model: nn.Module) -> Iterator[AnswerSampler]:
        self.answered.append(fingerprint(model))
        self.happened.append("sent")
        yield InProcessAnswers()
        self.happened.append("forgotten")


def engine_run(folder: Path, **changes: Any) -> tuple[AnsweringEngine, MemoryRecorder]:
    engine = AnsweringEngine()
    config = config_of(
        folder, **{"rollout.backend": "vllm", "longest_request_tokens": 80, "benchmark_every_steps": 3, **changes}
    )
    _, recorder = run_tiny(config, services=Pretended(engine))
    return engine, recorder


def test_answers_come_from_the_engine_and_the_weights_of_the_moment(tmp_path: Path) -> None:
    engine, recorder = engine_run(tmp_path)
    assert engine.followed == [0, 1, 2, 3]
    assert engine.happened == ["sent", "forgotten"] * 3
    assert len(set(engine.answered)) == len(engine.answered) == 3  # of steps 0, 3 and 4
    assert engine.answered[0] == build_parts(config_of(tmp_path)).base.fingerprint
    assert "benchmarks are sampled by engine 1" in recorder.events[0][1]
    averaged, _ = engine_run(tmp_path, ema_decay=0.999)
    assert averaged.answered[0] not in engine.answered[1:]
    assert not set(averaged.answered[1:]) & set(engine.answered[1:])


def test_workers_wait_for_each_other_around_their_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None asks before the first one has sent the weights, and the engine forgets them when all have asked."""
    engine = AnsweringEngine()
    run = Run(config_of(tmp_path, **{"rollout.backend": "vllm", "longest_request_tokens": 80}))
    run.parts.rollouts = engine
    measured, summed = BenchmarkEvaluator.measure, run.sum_over_workers

    def measure(*arguments: Any, **keywords: Any) -> Any:
        engine.happened.append("asked")
        return measured(*arguments, **keywords)

    def sum_over_workers(values: Iterable[float]) -> list[float]:
        engine.happened.append("met")
        return summed(values)

    monkeypatch.setattr(BenchmarkEvaluator, "measure", measure)
    monkeypatch.setattr(run, "sum_over_workers", sum_over_workers)
    downstream.measure(run)
    assert engine.happened[:5] == ["sent", "met", "asked", "met", "forgotten"]


def test_the_base_model_is_measured_once_by_an_engine_and_once_in_process(tmp_path: Path) -> None:
    run_tiny(config_of(tmp_path, steps=0))
    first, _ = engine_run(tmp_path)
    second, _ = engine_run(tmp_path)
    assert len(first.answered) == 3
    assert second.answered == first.answered[1:]


def test_a_study_with_an_engine_leaves_the_base_model_to_its_trials(tmp_path: Path) -> None:
    """All runs without an engine find it measured."""
    served = config_of(tmp_path, **{"rollout.backend": "vllm", "longest_request_tokens": 80})
    prepare([served])
    assert base.get_rows(key_of(served)) is None
    prepare([served, config_of(tmp_path, method="sft")])
    assert base.get_rows(key_of(served)) is not None


def test_benchmarks_that_do_not_fit_into_the_engine_are_refused(tmp_path: Path) -> None:
    served = {"rollout.backend": "vllm"}
    build_parts(config_of(tmp_path, **served, sequence_length=68))  # and an answer; the longest prompt has 68 tokens
    build_parts(config_of(tmp_path, longest_request_tokens=8))  # there is no engine
    with pytest.raises(ConfigError, match=r"the engine takes 8 tokens .* Use vllm.longest_request_tokens="):
        build_parts(config_of(tmp_path, **served, longest_request_tokens=8))


def test_evaluations_cost_what_they_run(tmp_path: Path) -> None:
    run = Run(config_of(tmp_path))
    before = run.spent.evaluation_flops
    downstream.measure(run)
    parameters = sum(p.numel() for p in run.model.parameters())
    # 2 problems x 2 passes of at least 50 tokens each, at two operations per weight and token.
    assert run.spent.evaluation_flops - before > 2 * parameters * 2 * 2 * 50


def test_averaged_weights_are_evaluated(tmp_path: Path) -> None:
    last = [scores(run_tiny(config_of(tmp_path, learning_rate=0.3, **c))[1])[4] for c in ({}, {"ema_decay": 0.999})]
    assert last[0] != last[1]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"benchmarks": [], "benchmark_samples": 2}, ["benchmark_samples=2", "no benchmark is named"]),
        ({"benchmarks": [], "benchmark_protocol": "authors"}, ["benchmark_protocol='authors'", "no benchmark"]),
        ({"benchmarks": ["mini"], "benchmark_temperature": 0}, ["benchmark_temperature"]),
        (
            {"benchmarks": ["mini"], "benchmark_temperature": 3, "rollout.backend": "vllm"},
            ["benchmark_temperature=3.0", "temperatures from 0.01 to 2", "backend=strided"],
        ),
        ({"benchmarks": [], "test_cpu_seconds": 9}, ["test_cpu_seconds", "only the verifier unit_tests reads it"]),
    ],
)
def test_settings_that_nothing_reads_are_refused(tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        tiny_config(tmp_path, **changes)
    for part in parts:
        assert part in str(refused.value)


def test_names_may_be_one_text_with_commas(tmp_path: Path) -> None:
    assert tiny_config(tmp_path, benchmarks="mini, mbpp:/x").evaluation.benchmarks == ("mini", "mbpp:/x")


def two_workers(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    run = Run(config_of(Path(folder)), rank=rank, world_size=2)
    rows = downstream.measure(run)
    if rank == 0:
        base.put_rows("two", rows)
    dist.destroy_process_group()


def test_two_workers_find_the_scores_of_one(tmp_path: Path) -> None:
    alone = downstream.measure(Run(config_of(tmp_path)))
    multiprocessing.spawn(two_workers, args=(str(tmp_path),), nprocs=2)
    together = base.get_rows("two")
    assert together is not None
    for table in ("evaluations", "scores"):
        for one, two in zip(alone[table], together[table], strict=True):
            assert one.keys() == two.keys()
            for name, value in one.items():
                assert two[name] == pytest.approx(value) if not isinstance(value, str) else two[name] == value
