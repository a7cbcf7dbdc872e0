"""What `plan` says of a study, against counting by hand and against what earlier trials took."""

from __future__ import annotations

import datetime
import json
import math
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from ebft_study import config
from ebft_study.cli import app
from ebft_study.cost import ModelShape, StepShape, step_cost
from ebft_study.errors import DataError
from ebft_study.networks.loading import read_config
from ebft_study.results import StudyRecorder, TrialRecorder
from ebft_study.study.cluster.capacity import ClusterCapacity, Node
from ebft_study.study.forecast import benchmarks, prediction, throughput
from ebft_study.study.forecast import plan as planning
from ebft_study.study.spec.study_spec import StudySpec
from ebft_study.training import engine_memory
from ebft_study.training.memory import fit_memory, plan_micro_batches, shapes
from tests.evaluation.downstream import files
from tests.studies import resolved
from tests.tiny_run import tiny_config, write_model
from tests.training.test_spent import MATRICES, H, L, attention

STARTED = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    settings = tiny_config(tmp_path_factory.mktemp("run"), steps=20, warm_start_steps=4, eval_every_steps=5)
    return settings.model_dump(mode="json", exclude={"name", "seed"})


def spec(run: dict[str, Any], **changes: Any) -> StudySpec:
    given = {"axes": {"reward.alpha": [0.0, 1.0], "rollout.n_samples": [2, 4]}, "seeds": [0, 1, 2]} | changes
    free = {section: {**run[section]} for section in ("reward", "rollout", "evaluation")}
    for path in given["axes"]:
        section, _, leaf = path.partition(".")
        free[section].pop(leaf, None)
    return StudySpec(study="s", question="How long?", run={**run, **free}, **given)


def planned(run: dict[str, Any], storage: Path, *, memory_gib: float = 4.0, **changes: Any) -> planning.StudyPlan:
    return planning.plan(resolved(spec(run, **changes)), storage=storage, memory_gib=memory_gib)


def test_trials_of_one_cost_are_counted_together(run: dict[str, Any], tmp_path: Path) -> None:
    found = planned(run, tmp_path, baselines={"sft": {"method": "sft"}})
    # alpha costs nothing; n_samples and the method do.
    assert sorted(row.group.number for row in found.groups) == [3, 6, 6]
    assert found.n_trials == 15
    assert {row.group.example.run.total_steps for row in found.groups} == {24}
    assert {row.tokens for row in found.groups} == {24.0 * 4 * 24}
    # At steps 0, 5, 10, 15, 20 and 4, where the warm start ends; on the held-out split at 0, 4 and 24.
    assert {throughput.evaluations(row.group.example.run) for row in found.groups} == {9}
    assert found.hours is None


def test_of_levels_of_seeds_those_trials_count_that_run(run: dict[str, Any], tmp_path: Path) -> None:
    alphas = [0.1 * i for i in range(9)]
    found = planned(run, tmp_path, axes={"reward.alpha": alphas}, seeds={"start": 1, "promote": [3, 5]})
    assert [row.group.number for row in found.groups] == [9 + 3 * 2 + 2 * 2]
    assert [len(row.group.trial_ids) for row in found.groups] == [45]
    assert found.n_trials == 19
    assert planning.summary(found)[:2] == [
        f"19 trials, {found.concurrency} at a time, 1 worker of 1 CPU each",
        "9 configurations x 1 seed, 3 x 3, 2 x 5: 19 of 45 trials on the axes; 2 seeds score claims",
    ]


def test_those_that_may_be_promoted_count_as_the_most_expensive(run: dict[str, Any], tmp_path: Path) -> None:
    axes, seeds = {"rollout.n_samples": [2, 4, 8]}, {"start": 1, "promote": [3]}
    found = planned(run, tmp_path, axes=axes, seeds=seeds, baselines={"sft": {"method": "sft"}})
    numbers = {row.group.label: row.group.number for row in found.groups}
    assert numbers == {"sft": 3, "n_samples=2": 1, "n_samples=4": 3, "n_samples=8": 3}


def test_work_is_that_of_the_cost_model_with_the_warm_start(run: dict[str, Any]) -> None:
    settings = config.build_run(run, source="test")
    model, network = shapes(settings)
    own, warm = (
        step_cost(model, network, StepShape.from_config(settings, method=method)).total.flops
        for method in ("ebft", "sft")
    )
    assert throughput.flops(settings) == pytest.approx(20 * own + 4 * warm)
    assert own > 2 * warm


@pytest.mark.parametrize("length", [2, 3])
def test_the_judge_is_part_of_the_cost_of_evaluations_and_of_memory(
    run: dict[str, Any], tmp_path: Path, length: int
) -> None:
    """Features of its completions, and sampling them unless they are the longest that are sampled anyway."""
    network = str(write_model(tmp_path / "judge", head_dim=16))
    own = {"judge": network, "judge_completion_length": length, "judge_depths": (1.0,), "judge_pooling": "mean"}
    settings = config.build_run(run, source="test")
    model, judge = shapes(settings)[0], ModelShape.from_config(read_config(network))
    judged = settings.model_copy(update={"evaluation": settings.evaluation.model_copy(update=own)})
    step = StepShape.from_config(settings, method="ebft", batch_size=1, n_samples=settings.evaluation.cfm_samples)
    step = replace(step, completion_length=length, depths=(1.0,), pooling="mean")
    cost = step_cost(model, judge, step)
    validation, heldout = settings.evaluation.validation_sequences, settings.evaluation.heldout_sequences
    n_sequences = 6 * validation + 3 * heldout  # as many evaluations as above
    more = throughput.evaluation_flops(judged) - throughput.evaluation_flops(settings)
    sampling = cost.rollouts.flops if length == 2 else 0
    assert more == pytest.approx(n_sequences * (cost.features.flops + sampling))
    memory, without = (fit_memory(r, "cpu", world_size=1, budget_bytes=2**32).peak_bytes for r in (judged, settings))
    assert memory - without == 4 * judge.body_parameters


def test_a_plan_is_the_one_that_a_run_makes(
    run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this CPU, on a GPU of "80 GB", on parts of it, and with a budget in the settings."""
    card = SimpleNamespace(total_memory=79.3 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    axes = {"reward.alpha": [0.0]}
    gpus = ClusterCapacity((Node(64, 8),))
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({}, {"gpus_per_worker": 1}),
        ({}, {"gpus_per_worker": 0.000012}),
        ({"training": {"memory_budget_gib": 0.0009}}, {"gpus_per_worker": 1}),
    ]
    budgets = set()
    for settings, resources in cases:
        given = config.merge(config.merge(run, {"training": {"device": "auto"}}), settings)
        study = replace(resolved(spec(given, axes=axes, resources=resources)), capacity=gpus)
        (row,) = planning.plan(study, storage=tmp_path).groups
        device = torch.device("cuda" if resources else "cpu")
        fraction = study.spec.resources.gpu_fraction
        made = plan_micro_batches(row.group.example.run, device, world_size=1, gpu_fraction=fraction)
        assert row.memory_gib == made.peak_bytes / 2**30, resources
        budgets.add(made.budget_bytes)
    assert len(budgets) == 4


def test_workers_at_a_time_share_the_machine(
    run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = resolved(spec(run, axes={"reward.alpha": [0.0]}))
    (row,) = planning.plan(study, storage=tmp_path).groups
    monkeypatch.setattr(planning, "total_memory", lambda _: 1.5 * row.memory_gib * 2**30)
    crowded = replace(study, capacity=ClusterCapacity((Node(2),)))
    assert crowded.concurrency == 2
    (refused,) = planning.plan(crowded, storage=tmp_path).groups
    assert re.search(r"2 workers at a time need .* GiB each.*max_concurrent_trials", refused.problem)
    apart = replace(study, capacity=ClusterCapacity((Node(1), Node(1))))
    assert planning.plan(apart, storage=tmp_path).fits


def test_engines_beside_the_workers_count_on_a_cpu(
    run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = config.merge(run, {"rollout": {"backend": "vllm"}, "vllm": {"kv_cache_gib": 0.25}})
    study = resolved(spec(served, axes={"reward.alpha": [0.0]}))
    crowded = replace(study, capacity=ClusterCapacity((Node(2),)))
    (row,) = planning.plan(crowded, storage=tmp_path).groups
    assert row.fits
    assert row.engine.process_bytes > 0.25 * 2**30
    lines = "\n".join(planning.summary(planning.plan(crowded, storage=tmp_path)))
    assert f"{row.engine.process_bytes / 2**30:.2f} GiB besides the workers for each trial" in lines
    needed = 2 * (row.memory_gib * 2**30 + row.engine.total_bytes) / 0.9
    for total, problem in ((1.001 * needed, ""), (0.99 * needed, "2 workers at a time need .*, and their engines")):
        monkeypatch.setattr(planning, "total_memory", lambda _, total=total: total)
        (found,) = planning.plan(crowded, storage=tmp_path).groups
        assert re.search(problem, found.problem), found.problem
        assert bool(found.problem) == bool(problem)
    monkeypatch.setattr(
        engine_memory.os, "statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=4096, f_blocks=1, f_bfree=1)
    )
    monkeypatch.setattr(planning, "total_memory", lambda _: 2 * needed)
    (found,) = planning.plan(crowded, storage=tmp_path).groups
    assert "/dev/shm" in found.problem


def test_a_plan_says_how_many_trials_share_a_gpu(run: dict[str, Any], tmp_path: Path) -> None:
    """By the memory that a run would plan with on such a part of it."""
    gpus, axes = ClusterCapacity((Node(64, 8),)), {"reward.alpha": [0.0]}

    def shared(memory_gib: float, **changes: Any) -> tuple[planning.PlannedGroup, str]:
        given = config.merge(run, {"training": {"device": "auto"}} | changes.pop("run", {}))
        resources = {"gpus_per_worker": 1} | changes
        study = replace(resolved(spec(given, axes=axes, resources=resources)), capacity=gpus)
        found = planning.plan(study, storage=tmp_path, memory_gib=memory_gib)
        lines = [line for line in planning.summary(found) if "by memory" in line]
        return found.groups[0], "\n".join(lines)

    alone, _ = shared(1.0)
    peak = alone.memory_gib / 0.9
    row, line = shared(3.5 * peak, gpus_per_worker=0.5)
    assert row.trials_per_gpu[1] == 3  # as they run alone
    assert 3 < row.trials_per_gpu[0] <= 8  # smaller passes need less
    assert "(gpus_per_worker: 0." in line
    assert "3 without smaller passes; the study's 0.5 allows 2" in line
    _, line = shared(1000.0)
    assert "by memory 8 or more trials fit one GPU (gpus_per_worker: 0.125); the study's 1 allows 1" in line
    engine = {"rollout": {"backend": "vllm"}, "vllm": {"placement": "colocated", "gpu_memory_utilization": 0.3}}
    row, _ = shared(1000.0, run=engine)
    assert row.trials_per_gpu == (3, 3)  # a quarter would be the engine's alone
    for several in ({"workers_per_trial": 2}, {"gpus_per_worker": 0}):
        assert shared(1000.0, **several)[0].trials_per_gpu == (0, 0)


def finish(storage: Path, run: dict[str, Any], *, step_seconds: float, train: float, total: float, host: str) -> None:
    """A finished trial on record."""
    folder = storage / "earlier"
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text("study: earlier\nquestion: '?'\n")
    settings = config.build_run(run, source="test")
    recorder = TrialRecorder(folder, study="earlier", trial_id="t0", attempt=1)
    for step in (5, 10):
        recorder.metrics(step, {"step_seconds": step_seconds})
    StudyRecorder(folder, study="earlier").trial(
        {
            "trial_id": "t0", "attempt": 1, "status": "finished", "hyperparameters": config.flatten(settings),
            "train_seconds": train, "total_seconds": total, "started_at": STARTED, "host": host,
        }
    )  # fmt: skip


def test_hours_follow_from_what_finished_trials_took(run: dict[str, Any], tmp_path: Path) -> None:
    # 24 steps of half a second, 8 evaluations of a quarter of one, and 3 s to start.
    finish(tmp_path, run, step_seconds=0.5, train=14.0, total=17.0, host=socket.gethostname())
    found = planned(run, tmp_path, axes={"reward.alpha": [0.0, 1.0]}, budget={"max_concurrent_trials": 1})
    assert found.prediction is not None
    (only,) = found.prediction.groups
    rate = only.throughput.evaluation_flops_per_second
    assert only.group.work.evaluation_flops / rate == pytest.approx(8 * 0.25)
    assert only.seconds == pytest.approx(17.0)
    assert found.hours == pytest.approx(6 * 17.0 / 3600)
    # The cost model scales to other settings.
    other = planned(run, tmp_path, budget={"max_concurrent_trials": 1})
    rate = throughput.flops(config.build_run(run, source="test")) / 12.0
    assert other.prediction is not None
    for row in other.prediction.groups:
        assert row.seconds == pytest.approx(3 + 8 * 0.25 + row.group.work.flops / rate)


def test_the_time_of_a_model_that_has_not_run_here_is_unknown(run: dict[str, Any], tmp_path: Path) -> None:
    """Between what it would be at the speeds of the slowest and of the fastest trial of others."""
    one_at_a_time = {"axes": {"reward.alpha": [0.0, 1.0]}, "budget": {"max_concurrent_trials": 1}}
    finish(tmp_path, run, step_seconds=0.5, train=14.0, total=17.0, host=socket.gethostname())
    assert planned(run, tmp_path, **one_at_a_time).hours is not None
    other = write_model(tmp_path / "other", seed=1)
    found = planned({**run, "model": str(other)}, tmp_path, **one_at_a_time)
    assert found.hours is None
    assert found.prediction is not None
    low, high = found.prediction.seconds_between
    assert low == high == pytest.approx(6 * 17.0)  # one trial has measured one speed, and the models are equal in size
    finish(tmp_path / "fast", run, step_seconds=0.05, train=1.4, total=4.4, host=socket.gethostname())
    shutil.copytree(tmp_path / "fast" / "earlier", tmp_path / "again")
    found = planned({**run, "model": str(other)}, tmp_path, **one_at_a_time)
    assert found.prediction is not None
    low, high = found.prediction.seconds_between
    assert high > 3 * low
    [line] = [line for line in planning.summary(found) if "unknown" in line]
    assert f"no trial of {other} has finished here" in line
    assert found.prediction.between in line
    assert found.prediction.message.startswith(found.prediction.between)


def test_what_is_planned_at_the_start_is_what_the_report_compares(run: dict[str, Any], tmp_path: Path) -> None:
    asked = spec(run, axes={"reward.alpha": [0.0, 1.0]}, baselines={"sft": {"method": "sft"}})
    study = resolved(asked, ClusterCapacity((Node(2),)))
    assert prediction.predict(study, storage=tmp_path) is None
    finish(tmp_path, run, step_seconds=0.5, train=14.0, total=17.0, host=socket.gethostname())
    predicted = prediction.predict(study, storage=tmp_path)
    assert predicted is not None
    planned = predicted.details
    sft, ebft = planned["kinds"]
    assert sft["trials"] == ["t0000", "t0003", "t0006"]
    assert (ebft["number"], ebft["steps"]) == (6, 24)
    assert ebft["seconds"] == pytest.approx(17.0, abs=1e-3)
    assert ebft["startup_seconds"] == pytest.approx(3.0)
    assert planned["seconds"] == pytest.approx((3 * sft["seconds"] + 6 * ebft["seconds"]) / 2)
    assert "9 trials, 2 at a time" in predicted.message
    assert json.loads(json.dumps(planned)) == planned


# --- benchmarks ------------------------------------------------------------------------------------------------


@pytest.fixture
def answering(run: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Two programs and two translations."""
    named = {"benchmarks": [files.humaneval(tmp_path), files.parallel(tmp_path)]}
    short = {"benchmark_samples": 3, "benchmark_max_tokens": 10}
    return {**run, "evaluation": {**run["evaluation"], **named, **short}}


def test_the_work_of_benchmarks_is_that_of_all_tokens_of_all_answers(answering: dict[str, Any], tmp_path: Path) -> None:
    """Counted one by one: a token for 4 bytes of prompts and translations, programs of 10 tokens."""
    settings = config.build_run(answering, source="test")
    head = 2 * read_config(settings.model).vocab_size * H
    sources, references = ((tmp_path / f"test.de-en.{side}").read_text().splitlines() for side in ("de", "en"))
    instruction = len("Translate this from German to English:\nGerman: \nEnglish:")
    expected = [(math.ceil(len(item["prompt"]) / 4), 10) for item in files.HUMANEVAL]
    expected += [
        (math.ceil((instruction + len(source.encode())) / 4), min(10, math.ceil(len(reference.encode()) / 4)))
        for source, reference in zip(sources, references, strict=True)
    ]
    assert min(length for _, length in expected) < 10
    flops = 0.0
    for prompt, length in expected:
        for n_answers in (1, 3):  # the greedy one, the samples
            meets = [position + 1 for position in range(prompt)]
            meets += [prompt + k + 1 for k in range(length)] * n_answers
            flops += sum(L * (2 * MATRICES + attention(keys)) for keys in meets) + n_answers * length * head
    work = benchmarks.benchmark_work(settings)
    assert (work.problems, work.answers) == (4, 16)
    assert work.flops == pytest.approx(flops)
    assert work.judging_seconds == pytest.approx(2 * 4 * 0.008)  # of programs alone


def test_benchmarks_are_part_of_a_trial_as_often_as_it_evaluates_them(answering: dict[str, Any]) -> None:
    settings = config.build_run(answering, source="test")
    losses, once = throughput.evaluation_flops(settings), benchmarks.benchmark_work(settings)
    often = config.merge(answering, {"evaluation": {"benchmark_every_steps": 10}})
    # After the warm start of 4 steps and at the end, 24; every 10 steps too. Workers of a group repeat the base model.
    for given, workers, n_times in ((answering, 0, 2), (often, 1, 4), (often, 2, 5)):
        work = throughput.Work.from_run(config.build_run(given, source="test"), workers)
        assert work.evaluation_flops == pytest.approx(losses + n_times * once.flops)
        assert work.judging_seconds == pytest.approx(n_times * once.judging_seconds / max(workers, 1))


def test_hours_count_benchmarks_of_trials_and_once_those_of_a_base_model(
    run: dict[str, Any], answering: dict[str, Any], tmp_path: Path
) -> None:
    finish(tmp_path, run, step_seconds=0.5, train=14.0, total=17.0, host=socket.gethostname())
    one_at_a_time = {"axes": {"rollout.n_samples": [2, 4]}, "budget": {"max_concurrent_trials": 1}}
    without, found = (planned(given, tmp_path, **one_at_a_time) for given in (run, answering))
    assert found.prediction is not None
    assert found.hours is not None
    assert without.hours is not None
    once = benchmarks.benchmark_work(config.build_run(answering, source="test"))
    seconds = once.flops / found.prediction.groups[0].throughput.evaluation_flops_per_second + once.judging_seconds
    assert found.prediction.base_seconds == pytest.approx(seconds)
    # Six trials, each after its warm start and at its end.
    assert 3600 * (found.hours - without.hours) == pytest.approx((6 * 2 + 1) * seconds)
    assert f"{once.problems} problems, {once.answers} answers of up to 10 tokens" in "\n".join(planning.summary(found))
    assert "benchmark" not in "\n".join(planning.summary(without))


@pytest.mark.parametrize(
    "change",
    [
        {"benchmarks": ["mini_translation"]},
        {"benchmark_samples": 4},
        {"benchmark_max_tokens": 11},
        {"benchmark_problems": 1},
        {"benchmark_every_steps": 10},
    ],
)
def test_no_setting_of_benchmarks_is_left_out_of_the_plan(
    answering: dict[str, Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    finish(tmp_path, answering, step_seconds=0.5, train=14.0, total=17.0, host=socket.gethostname())
    changed = config.merge(answering, {"evaluation": change})
    before, after = (planned(given, tmp_path, axes={"reward.alpha": [0.0, 1.0]}) for given in (answering, changed))
    assert before.hours != after.hours
    ((name, value),) = change.items()
    values = [value, answering["evaluation"][name]]
    grouped = planned(answering, tmp_path, axes={"reward.alpha": [0.0, 1.0], f"evaluation.{name}": values})
    assert [row.group.number for row in grouped.groups] == [6, 6]


def test_a_trial_with_benchmarks_takes_as_long_as_the_one_that_measured_it(
    answering: dict[str, Any], tmp_path: Path
) -> None:
    """Judging is no part of the speed of evaluations."""
    finish(tmp_path, answering, step_seconds=0.5, train=14.0, total=17.0, host=socket.gethostname())
    found = planned(answering, tmp_path, axes={"reward.alpha": [0.0, 1.0]}, budget={"max_concurrent_trials": 1})
    assert found.prediction is not None
    (only,) = found.prediction.groups
    assert only.seconds == pytest.approx(17.0)
    assert only.group.work.judging_seconds > 0
    rate = only.throughput.evaluation_flops_per_second
    assert only.group.work.evaluation_flops / rate == pytest.approx(2.0 - only.group.work.judging_seconds)


def test_a_plan_refuses_a_benchmark_that_is_not_there(answering: dict[str, Any], tmp_path: Path) -> None:
    gone = config.merge(answering, {"evaluation": {"benchmarks": [f"humaneval:{tmp_path / 'gone.jsonl'}"]}})
    with pytest.raises(DataError, match="no such file"):
        planned(gone, tmp_path)


def row(method: str, concurrency: int, rate: float, **changes: Any) -> dict[str, Any]:
    alike = {"model": "m", "method": method, "workers": 1, "served": False, "concurrency": concurrency}
    alike["has_benchmarks"] = False
    return {**alike, "rate": rate, "evaluation_rate": 10.0, "startup": 1.0, **changes}


def test_the_trials_most_alike_decide() -> None:
    rows = [row("sft", 2, 100.0), row("ebft", 1, 50.0), row("ebft", 2, 30.0), row("ebft", 2, 40.0)]
    known = throughput.Measurements([*rows, row("ebft", 2, 1.0, served=True), row("ebft", 2, 7.0, model="other")])

    def rate(method: str, concurrency: int, model: str = "m", served: bool = False) -> float:
        work = throughput.Work(model, method, 1, served, flops=1.0, evaluation_flops=1.0)
        return known.throughput(work, concurrency=concurrency).flops_per_second

    assert rate("ebft", 2) == 35.0
    assert rate("ebft", 1) == 50.0
    assert rate("ebft", 4) == 40.0  # of any number side by side
    assert rate("sft", 1) == 100.0
    assert rate("ebft", 2, served=True) == 1.0
    assert rate("ebft", 2, model="other") == 7.0
    assert rate("ebft", 2, model="new") == 35.0  # the median of all six
    rows.append(row("ebft", 2, 3.0, has_benchmarks=True))
    answering = throughput.Work("m", "ebft", 1, False, flops=1.0, evaluation_flops=1.0, has_benchmarks=True)
    assert throughput.Measurements(rows).throughput(answering, concurrency=2).flops_per_second == 3.0


def test_groups_of_workers_start_later_than_trials_in_their_own_process() -> None:
    known = throughput.Measurements(
        [row("ebft", 2, 10.0, workers=0, startup=4.0), row("ebft", 2, 10.0, workers=1, startup=13.0)]
    )
    for workers, startup in ((0, 4.0), (1, 13.0)):
        work = throughput.Work("m", "ebft", workers, False, flops=1.0, evaluation_flops=1.0)
        assert known.throughput(work, concurrency=2).startup_seconds == startup


def test_a_trial_takes_its_start_its_updates_and_its_evaluations() -> None:
    speed = throughput.Throughput(1, flops_per_second=10.0, evaluation_flops_per_second=5.0, startup_seconds=3.0)
    work = throughput.Work("m", "ebft", 1, False, flops=100.0, evaluation_flops=20.0)
    assert speed.seconds(work) == 17.0


def test_trials_side_by_side_are_counted_while_any_runs() -> None:
    at = lambda *seconds: pd.to_datetime(list(seconds), unit="s", utc=True)  # noqa: E731
    table = pd.DataFrame({"started_at": at(0, 0, 10, 1000, 1000), "finished_at": at(10, 20, 20, 1010, 1010)})
    assert throughput.concurrency(table) == 2
    assert throughput.concurrency(table.iloc[:1]) == 1
    assert throughput.concurrency(table.iloc[:0]) == 1


def test_trials_of_other_machines_measure_nothing_here(run: dict[str, Any], tmp_path: Path) -> None:
    finish(tmp_path, run, step_seconds=0.5, train=14.0, total=17.0, host="another")
    assert planned(run, tmp_path).hours is None


def test_trials_of_a_model_that_is_gone_measure_nothing(run: dict[str, Any], tmp_path: Path) -> None:
    gone = {**run, "model": str(tmp_path / "gone")}
    finish(tmp_path, gone, step_seconds=0.5, train=14.0, total=17.0, host=socket.gethostname())
    assert planned(run, tmp_path).hours is None


def test_what_does_not_fit_is_said_with_the_reason(run: dict[str, Any], tmp_path: Path) -> None:
    found = planned(run, tmp_path, memory_gib=1e-5)
    assert not found.fits
    assert all(math.isnan(row.memory_gib) for row in found.groups)
    lines = planning.summary(found)
    assert "12 trials" in lines[0]
    assert "GiB" in lines[1]
    assert planned(run, tmp_path).fits


def test_trials_that_a_search_has_yet_to_choose_count_as_the_most_expensive(
    run: dict[str, Any], tmp_path: Path
) -> None:
    axes = {"rollout.n_samples": {"distribution": "integer", "low": 2, "high": 6}}
    found = planned(run, tmp_path, axes=axes, search={"algorithm": "optuna", "num_configurations": 5})
    (kind,) = [row.group for row in found.groups]
    assert (kind.number, kind.label) == (15, "chosen by the search (at most)")
    six = config.build_run(config.merge(run, {"rollout": {"n_samples": 6}}), source="test")
    assert kind.work.flops == pytest.approx(throughput.flops(six))


def test_the_command_starts_nothing_and_says_whether_all_fits(run: dict[str, Any], tmp_path: Path) -> None:
    import yaml

    file = tmp_path / "s.yaml"
    content = {"study": "s", "question": "?", "run": run, "seeds": [0, 1]}
    file.write_text(yaml.safe_dump(content))
    given = ["plan", str(file), "--storage", str(tmp_path / "studies")]
    said = CliRunner().invoke(app, given)
    assert said.exit_code == 0, said.output
    assert "2 trials" in said.output
    assert CliRunner().invoke(app, [*given, "--memory-gib", "0.00001"]).exit_code == 1
    assert not (tmp_path / "studies").exists()
