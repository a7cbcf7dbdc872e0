"""Study files: what is read, and what is refused with which line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ebft_study.errors import ConfigError
from ebft_study.study.cluster.capacity import ClusterCapacity, Node
from ebft_study.study.resolving import checks, study_file
from ebft_study.study.resolving.study_file import load_study
from ebft_study.study.spec import normalize
from ebft_study.study.spec.study_spec import key_matches
from tests.studies import resolved

BASE: dict[str, Any] = {
    "study": "probe",
    "question": "Is this file read correctly?",
    "run": {"steps": 20, "n_samples": 4},
    "axes": {"alpha": [0.0, 1.0], "gamma": [0.0, 0.1]},
    "seeds": [0, 1],
    "baselines": {"sft": {"method": "sft"}},
    "profiles": {
        "cpu": {"run": {"model": "tiny-1m"}},
        "gpu": {"run": {"model": "big"}, "resources": {"gpus_per_worker": 1}},
    },
}

RACE = {"kind": "race", "grace_period_steps": 5}
EXTRAPOLATION = {"kind": "extrapolation", "grace_period_steps": 5}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "file.yaml"
    content = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def refusal(folder: Path, profile: str | None = "cpu", overrides: tuple[str, ...] = (), **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_study(write(folder, **changes), profile, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def test_a_profile_is_laid_over_the_file(tmp_path: Path) -> None:
    spec = load_study(write(tmp_path), "gpu").spec
    assert spec.run["model"] == "big"
    assert spec.run["training"]["steps"] == 20
    assert spec.resources.gpus_per_worker == 1
    assert spec.profiles == {}


def test_overrides_change_fixed_settings(tmp_path: Path) -> None:
    spec = load_study(write(tmp_path), "cpu", ["steps=7", "data.sequence_length=64", "learning_rate=1e-3"]).spec
    assert spec.run["training"]["steps"] == 7
    assert spec.run["data"]["sequence_length"] == 64
    assert spec.run["optimizer"]["learning_rate"] == 1e-3


def test_overrides_change_sections_of_the_file(tmp_path: Path) -> None:
    scheduler = {"kind": "asha", "grace_period_steps": 5, "reduction_factor": 2}
    given = ["scheduler.kind=median", "seeds=[4]", "budget.max_concurrent_trials=1", "resources.workers_per_trial=0"]
    spec = load_study(
        write(tmp_path, scheduler=scheduler), "cpu", [*given, "stopping.divergence={}", "run.steps=9"]
    ).spec
    assert spec.scheduler.given() == {"kind": "median", "grace_period_steps": 5}
    assert spec.seeds.all == (4,)
    assert spec.budget.max_concurrent_trials == 1
    assert not spec.resources.has_workers
    assert spec.stopping.divergence is not None
    assert spec.run["training"]["steps"] == 9


def test_levels_of_seeds_are_read_overridden_and_recorded(tmp_path: Path) -> None:
    path = write(tmp_path, seeds={"start": 1, "promote": [3, 5]})
    spec = load_study(path, "cpu").spec
    assert (spec.seeds.levels, spec.seeds.all) == ((1, 3, 5), (0, 1, 2, 3, 4))
    assert normalize.dump(spec)["seeds"] == {"start": 1, "promote": [3, 5]}
    assert normalize.from_record(normalize.dump(spec), source="study.yaml") == spec
    assert load_study(path, "cpu", ["seeds.start=2"]).spec.seeds.levels == (2, 3, 5)
    plain = load_study(path, "cpu", ["seeds=[4, 0]"]).spec
    assert (plain.seeds.levels, plain.seeds.all, plain.seeds.promotes) == ((2,), (4, 0), False)
    assert normalize.dump(plain)["seeds"] == [4, 0]


def test_another_name_is_only_another_name(tmp_path: Path) -> None:
    path = write(tmp_path)
    renamed = load_study(path, "cpu", name="other").spec
    assert renamed.study == "other"
    assert renamed.model_copy(update={"study": "probe"}) == load_study(path, "cpu").spec


def test_a_spec_survives_its_own_record(tmp_path: Path) -> None:
    axes = {"learning_rate": {"distribution": "log_uniform", "low": "1e-5", "high": 1e-3}, "alpha": [0, 1]}
    search = {"algorithm": "random", "num_configurations": 3}
    spec = load_study(write(tmp_path, axes=axes, search=search), "cpu").spec
    record = yaml.safe_load(yaml.safe_dump({**normalize.dump(spec), "created_at": "now", "provenance": {"x": 1}}))
    assert normalize.from_record(record, source="study.yaml") == spec


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("study: s\nquestion: q\naxes: {learning_rate: [1e-4, 1e-5]}\nrun: {steps: 2}\n")
    assert load_study(path).spec.axes["optimizer.learning_rate"].values == (1e-4, 1e-5)


SCORE = {"metric": "benchmark_score", "mode": "max"}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"sedes": [1]}, ["unknown key 'sedes'", "'seeds'"]),
        ({"run": {"stepz": 3}}, ["unknown key 'stepz'", "'steps'"]),
        ({"axes": {"alhpa": [0, 1]}}, ["axes: unknown key 'alhpa'", "'alpha'"]),
        ({"axes": {"alpha": []}}, ["axes.alpha", "no values"]),
        ({"axes": {"alpha": [0.5, 0.5]}}, ["axes.alpha", "twice"]),
        ({"axes": {"alpha": 0.5}}, ["alpha=0.5", "Fix it under 'run'"]),
        ({"axes": {"alpha": [0, 1], "reward.alpha": [0.5]}}, ["reward.alpha", "twice"]),
        ({"axes": {"alpha": ["much"]}}, ["alpha=much", "reward.alpha='much'"]),
        ({"axes": {"alpha": [0, 2]}}, ["alpha=2", "reward.alpha=2"]),
        ({"axes": {"seed": [0, 1]}}, ["axes.seed", "under 'seeds'"]),
        ({"run": {"seed": 3}}, ["seed=3", "under 'seeds'"]),
        ({"run": {"alpha": 0.3}}, ["run.alpha=0.3", "varied under axes"]),
        ({"seeds": []}, ["seeds"]),
        ({"seeds": [1, 1]}, ["seeds", "twice"]),
        ({"seeds": [-1]}, ["seeds", "not negative"]),
        ({"seeds": 3}, ["seeds=3", "no list of seeds. Write [0, 1, 2], or {start: 1, promote: [3, 5]}"]),
        ({"seeds": {"start": 1}}, ["seeds", "needs both start and promote"]),
        ({"seeds": {"promote": [3]}}, ["seeds", "needs both start and promote"]),
        ({"seeds": {"start": 1, "promote": []}}, ["seeds", "needs both"]),
        ({"seeds": {"start": 0, "promote": [3]}}, ["seeds.start=0", "greater than 0"]),
        ({"seeds": {"start": 3, "promote": [3]}}, ["seeds", "promote: [3] does not rise from start: 3"]),
        ({"seeds": {"start": 1, "promote": [5, 3]}}, ["seeds", "does not rise"]),
        ({"seeds": {"start": 1, "promote": [3, 3]}}, ["seeds", "does not rise"]),
        ({"seeds": {"start": 1, "promot": [3]}}, ["unknown key 'seeds.promot'", "'promote'"]),
        ({"seeds": {"listed": [0, 1], "start": 1}}, ["seeds", "either"]),
        (
            {"seeds": {"start": 1, "promote": [3]}, "search": {"algorithm": "optuna", "num_configurations": 9}},
            ["seeds.promote", "Optuna", "search.algorithm: random"],
        ),
        (
            {
                "seeds": {"start": 1, "promote": [3]},
                "scheduler": {"kind": "pbt", "perturbation_interval_steps": 10},
                "run": {"steps": 20, "checkpoint_every_steps": 10, "eval_every_steps": 10},
            },
            ["seeds.promote", "population", "another scheduler.kind"],
        ),
        (
            {"seeds": {"start": 1, "promote": [3]}, "scheduler": {"kind": "race", "grace_period_steps": 5}},
            ["seeds.promote", "a race compares all seeds", "another scheduler.kind"],
        ),
        (
            {"seeds": {"start": 1, "promote": [3]}, "axes": {"pooling": ["mean", "last_token"], "alpha": [0.0, 1.0]}},
            ["seeds.promote", "no more than 2 can be compared by cfm_loss"],
        ),
        ({"question": None}, ["question", "required"]),
        ({"study": "a/b"}, ["study='a/b'"]),
        ({"baselines": {"a b": {}}}, ["'a b' is not a name"]),
        ({"axes": {"gamma": {"distribution": "uniform", "low": 0, "high": 1}}}, ["axes.gamma='uniform'", "grid"]),
        ({"axes": {"gamma": {"distribution": "uniform", "low": 1, "high": 0}}}, ["low must lie below high"]),
        ({"axes": {"gamma": {"distribution": "log_uniform", "low": 0, "high": 1}}}, ["low > 0"]),
        ({"axes": {"n_samples": {"distribution": "integer", "low": 1.5, "high": 4}}}, ["whole numbers"]),
        ({"axes": {"gamma": {"distribution": "normal", "low": 0, "high": 1}}}, ["axes.gamma.distribution='normal'"]),
        ({"search": {"algorithm": "grid", "num_configurations": 4}}, ["every combination", "num_configurations"]),
        ({"search": {"algorithm": "random"}}, ["needs num_configurations"]),
        ({"search": {"algorithm": "random", "num_configurations": 5}}, ["num_configurations=5", "only 4"]),
        ({"search": {"algorithm": "optuna", "num_configurations": 4, "sampler": "grid"}}, ["cannot be a grid"]),
        ({"search": {"algorithm": "optuna", "num_configurations": 4}, "axes": {}}, ["nothing to choose"]),
        (
            {"search": {"algorithm": "optuna", "num_configurations": 4}, "axes": {"alpha": {"grid": [0, 1]}}},
            ["a grid is a plain list"],
        ),
        ({"objective": {"metric": "cfm_los"}}, ["objective.metric='cfm_los'", "'cfm_loss'"]),
        ({"objective": {"metric": "grad_norm"}}, ["no trial reports"]),
        ({"objective": {"metric": "cfm_loss", "mode": "max"}}, ["objective.mode='max'", "mode: min"]),
        (
            {"objective": {"metric": "ce_answer_loss"}, "run": {"steps": 20, "dataset": "unstructured"}},
            ["ce_answer_loss", "raw text"],
        ),
        (
            {"objective": {"metric": "reward", "mode": "max"}, "axes": {"method": ["ebft", "sft"]}},
            ["method=sft has no reward"],
        ),
        ({"objective": {"metric": "judge_cfm_loss"}}, ["no judge measures it", "evaluation.judge"]),
        ({"objective": SCORE}, ["no benchmark measures it", "evaluation.benchmarks"]),
        (
            {"objective": SCORE, "run": {"steps": 20, "benchmarks": ["mini"]}, "stopping": {"stagnation": {}}},
            ["benchmark_every_steps=None", "need the objective at every evaluation", "Use "],
        ),
        ({"scheduler": {"kind": "asha", "grace_period_steps": 20}}, ["grace_period_steps=20", "only 20 steps"]),
        ({"scheduler": {"kind": "asha", "reduction_factor": 1}}, ["scheduler.reduction_factor=1"]),
        (
            {"scheduler": {"kind": "median", "reduction_factor": 3}},
            ["reduction_factor=3: is a setting of asha and hyperband, and kind is median"],
        ),
        ({"scheduler": {"kind": "hyperband", "brackets": 2}}, ["brackets=2: is a setting of asha"]),
        (
            {"scheduler": {"kind": "asha", "min_samples_required": 2}},
            ["=2: is a setting of median"],
        ),
        (
            {"scheduler": {"kind": "asha", "grace_period_steps": 3, "brackets": 3}},
            ["scheduler.brackets=3", "step 27", "only 20 steps"],
        ),
        (
            {"scheduler": {"kind": "median", "grace_period_steps": 3, "min_samples_required": 8}},
            ["min_samples_required=8", "8 trials on its axes", "at most 7"],
        ),
        ({"scheduler": RACE, "search": {"algorithm": "optuna", "num_configurations": 4}}, ["optuna", "from the start"]),
        ({"scheduler": RACE, "seeds": [1]}, ["seeds=[1]", "varies from seed to seed"]),
        ({"scheduler": RACE, "axes": {"alpha": [1]}}, ["scheduler.kind='race'", "no rival"]),
        ({"scheduler": RACE, "run": {}, "axes": {"steps": [20, 30]}}, ["training.steps='20 and 30'", "at equal steps"]),
        (
            {"scheduler": RACE, "axes": {"eval_every_steps": [5, 10]}},
            ["evaluation.eval_every_steps='5 and 10'", "at equal steps"],
        ),
        (
            {"scheduler": RACE | {"grace_period_steps": 16}, "run": {"steps": 20, "eval_every_steps": 5}},
            ["eval_every_steps=5", "20 steps, and none is evaluated between step 16"],
        ),
        (
            {"scheduler": EXTRAPOLATION, "run": {"steps": 25, "warm_start_steps": 5, "eval_every_steps": 5}},
            ["eval_every_steps=5", "4 evaluations", "5 are needed to extrapolate"],
        ),
        ({"scheduler": EXTRAPOLATION | {"grace_period_steps": 20}}, ["grace_period_steps=20", "only 20 steps"]),
        ({"scheduler": EXTRAPOLATION | {"confidence": 1}}, ["scheduler.confidence=1"]),
        ({"scheduler": {"kind": "median", "confidence": 0.9}}, ["confidence=0.9: is a setting of extrapolation"]),
        ({"scheduler": {"kind": "asha", "error_rate": 0.1}}, ["error_rate=0.1: is a setting of race"]),
        ({"scheduler": {"kind": "race", "error_rate": 0}}, ["scheduler.error_rate=0"]),
        ({"resources": {"workers_per_trial": 3}}, ["training.batch_size=8", "3 workers"]),
        ({"resources": {"workers": 3}}, ["unknown key 'resources.workers'", "'workers_per_trial'"]),
        ({"budget": {"max_hours": 0}}, ["budget.max_hours=0"]),
        ({"profiles": {"cpu": {"run": {"alpha": 0.5}}}}, ["profiles.cpu", "reward.alpha", "an axis of the study"]),
        ({"profiles": {"cpu": {"run": {"method": "sft"}}}}, ["profiles.cpu", "method", "part of what is studied"]),
        ({"profiles": {"cpu": {"seeds": [1]}}}, ["seeds: is part of what is studied"]),
        ({"profiles": {"cpu": {"axes": {"alpha": [1]}}}}, ["axes: is part of what is studied"]),
        ({"profiles": {"cpu": {"baselines": {"stf": {"steps": 3}}}}}, ["baselines.stf", "Its baselines: sft"]),
        ({"profiles": {"cpu": {"run": {"modle": "x"}}}}, ["profiles.cpu.run: unknown key 'modle'", "'model'"]),
        ({"profiles": {"cpu": {"exclude": []}}}, ["exclude: is part of what is studied"]),
        ({"profiles": {"cpu": {"choices": {"alpha": {"x": {}}}}}}, ["choices.alpha: is no axis of choices", "none"]),
        ({"axes": {"gamma": {"values": [0.1], "when": {"alpha": 1}}}}, ["axes.gamma.when: alpha", "List it first"]),
        (
            {
                "axes": {
                    "alpha": {"values": [0, 1], "when": {"gamma": 0}},
                    "gamma": {"values": [0], "when": {"alpha": 1}},
                }
            },
            ["axes.alpha.when: gamma", "above this one"],
        ),
        ({"axes": {"alpha": [0, 1], "gamma": {"values": [0.1], "when": {"alpha": 2}}}}, ["alpha=2", "no value of"]),
        (
            {
                "axes": {
                    "temperature": {"distribution": "uniform", "low": 0.5, "high": 1},
                    "alpha": {"values": [0, 1], "when": {"temperature": 0.5}},
                },
                "search": {"algorithm": "random", "num_configurations": 2},
            },
            ["temperature is drawn from a continuous range", "Give it a step"],
        ),
        ({"exclude": {"alpha": 0}}, ["exclude", "is a list of mappings"]),
        ({"exclude": [{}]}, ["exclude", "is a list of mappings"]),
        ({"exclude": [{"n_samples": 4}]}, ["exclude.0: n_samples: is no axis", "alpha, gamma"]),
        ({"exclude": [{"alpha": [0, 0.5]}]}, ["exclude.0.alpha: alpha=0.5", "no value of this axis"]),
        ({"exclude": [{"alpha": [0, 1]}]}, ["exclude: leaves no configuration"]),
        ({"axes": {"model": {"choices": {"a": {}}}}}, ["axes='model'", "name of its own"]),
        ({"axes": {"size": {"choices": {"a": {"modle": 1}}}}}, ["axes.size.a", "unknown key 'modle'", "'model'"]),
        ({"axes": {"size": {"choices": {"a": {"seed": 1}}}}}, ["axes.size.a: seed", "under 'seeds'"]),
        ({"axes": {"size": {"choices": ["a", "b"]}}}, ["axes.size=['a', 'b']", "the same settings", "choices.size"]),
        (
            {"axes": {"size": {"choices": {"a": {"alpha": 0}, "b": {}}}, "alpha": [1]}},
            ["axes.alpha='reward.alpha'", "also set by axes.size"],
        ),
        (
            {"axes": {"size": {"choices": {"a": {"steps": 3}, "b": {"steps": 4}}}}},
            ["run.steps=20", "varied under axes"],
        ),
        ({"axes": {"sizes": [1, 2]}}, ["axes: unknown key 'sizes'"]),
        ({"linked": {"alpha": {"same_as": "gamma"}}}, ["linked.alpha", "varied under axes"]),
        ({"linked": {"steps": {"product": ["n_samples", 2]}}}, ["run.steps=20", "follows others under linked"]),
        (
            {"linked": {"stride": {"same_as": "completion_length"}}, "profiles": {"cpu": {"run": {"stride": 3}}}},
            ["rollout.stride", "linked to others"],
        ),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    message = refusal(tmp_path, **changes)
    assert message.startswith(str(tmp_path / "file.yaml"))
    for part in parts:
        assert part in message


def test_the_combination_that_breaks_a_rule_is_named(tmp_path: Path) -> None:
    message = refusal(tmp_path, axes={"n_samples": [1, 4], "alpha": [0, 1]}, run={"steps": 5, "baseline": "none"})
    assert "n_samples=1 alpha=1: rollout.n_samples=1" in message


def test_the_corners_of_an_optuna_space_are_checked(tmp_path: Path) -> None:
    axes = {"completion_length": {"distribution": "integer", "low": 1, "high": 500}}
    search = {"algorithm": "optuna", "num_configurations": 4}
    assert "completion_length=500" in refusal(tmp_path, axes=axes, search=search)


@pytest.mark.parametrize(
    ("profile", "overrides", "parts"),
    [
        ("tpu", (), ["profile='tpu'", "cpu, gpu"]),
        (None, (), ["profile", "--profile cpu"]),
        ("cpu", ("alpha=0.3",), ["reward.alpha", "an axis of the study"]),
        ("cpu", ("seed=3",), ["seed", "part of what is studied"]),
        ("cpu", ("method=sft",), ["method", "part of what is studied"]),
        ("cpu", ("stepz=3",), ["'stepz'", "'steps'"]),
        ("cpu", ("steps",), ["'steps' is not an override"]),
        ("cpu", ("steps=many",), ["training.steps='many'"]),
        ("cpu", ("resources.workers=2",), ["command line", "'resources.workers'"]),
        ("cpu", ("seeds=3",), ["command line", "seeds=3"]),
        ("cpu", ("budget=2",), ["'budget=2'", "is a section"]),
        ("cpu", ("scheduler.kind=asha",), ["grace_period_steps=50"]),
    ],
)
def test_bad_choices_on_the_command_line_are_refused(
    tmp_path: Path, profile: str | None, overrides: tuple[str, ...], parts: list[str]
) -> None:
    message = refusal(tmp_path, profile, overrides)
    for part in parts:
        assert part in message


def test_a_file_without_profiles_needs_none(tmp_path: Path) -> None:
    assert load_study(write(tmp_path, profiles=None)).spec.run["training"]["steps"] == 20


def machine(cpus: int, gpus: int) -> ClusterCapacity:
    return ClusterCapacity((Node(cpus, gpus),))


def test_a_trial_must_fit_on_the_machine(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, resources={"workers_per_trial": 2, "cpus_per_worker": 2}), "gpu")
    checks.check_capacity(study.on(machine(4, 2)))
    with pytest.raises(ConfigError, match=r"cpus_per_worker=2: a trial of 2 worker\(s\) needs 4 CPU cores; here are 2"):
        checks.check_capacity(study.on(machine(2, 2)))
    with pytest.raises(ConfigError, match="gpus_per_worker"):
        checks.check_capacity(study.on(machine(4, 0)))
    in_process = load_study(write(tmp_path, resources={"workers_per_trial": 0, "cpus_per_worker": 2}), "cpu")
    checks.check_capacity(in_process.on(machine(2, 0)))
    with pytest.raises(ConfigError, match="needs 2 CPU cores; here are 1"):
        checks.check_capacity(in_process.on(machine(1, 0)))


@pytest.mark.parametrize("kind", ["race", "pbt"])
def test_trials_that_take_turns_need_one_size_and_checkpoints_to_pause_at(tmp_path: Path, kind: str) -> None:
    scheduler = RACE if kind == "race" else {"kind": "pbt", "perturbation_interval_steps": 5}
    run = {"steps": 20, "eval_every_steps": 5, "checkpoint_every_steps": 5}
    axes = {"alpha": [0.0, 1.0], "gamma": [0.0, 0.1]}
    study = load_study(write(tmp_path, scheduler=scheduler, run=run, axes=axes), "cpu")
    checks.check_capacity(study.on(machine(4, 0)))
    cluster = ClusterCapacity((Node(4, 0),), is_existing=True)
    with pytest.raises(ConfigError, match=f"scheduler.kind='{kind}'.*only 4 fit"):
        checks.check_capacity(study.on(cluster))
    sizes = {"alpha": {"0.0": {"cpus_per_worker": 2}}}
    message = refusal(tmp_path, scheduler=scheduler, run=run, axes=axes, resources={"by": sizes})
    assert "slots of one size" in message
    if kind == "race":
        study = load_study(write(tmp_path, scheduler=scheduler, run=run | {"checkpoint_every_steps": 10}), "cpu")
        with pytest.raises(
            ConfigError, match=r"checkpoint_every_steps=10.*10 trials take turns in 4 slots.*divisor of 5"
        ):
            checks.check_capacity(study.on(machine(4, 0)))
        checks.check_capacity(study.on(machine(10, 0)))  # none has to pause


BY_MODEL = {"resources": {"by": {"method": {"sft": {"workers_per_trial": 2}}}}}


def test_trials_of_one_study_may_need_different_resources(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, **BY_MODEL), "cpu")
    assert {trial.run.method: trial.resources.workers_per_trial for trial in study.examples} == {"ebft": 1, "sft": 2}
    assert {request.processes for request in study.requests} == {1, 2}
    assert normalize.from_record(normalize.dump(study.spec), source="record") == study.spec
    checks.check_capacity(study.on(machine(2, 0)))
    with pytest.raises(ConfigError, match=r"a trial of 2 worker\(s\) needs 2 CPU cores; here are 1"):
        checks.check_capacity(study.on(machine(1, 0)))
    assert study.on(machine(8, 0)).concurrency == 8


@pytest.mark.parametrize(
    ("by", "parts"),
    [
        ({"methode": {"sft": {}}}, ["resources.by", "methode", "method"]),
        ({"method": {"stf": {}}}, ["resources.by.method", "stf", "Trials have sft, ebft"]),
        ({"method": {"sft": {"max_failures": 2}}}, ["max_failures"]),
        ({"method": {"sft": {"gpus_per_worker": 1.5}}}, ["1.5", "whole ones"]),
    ],
)
def test_resources_of_trials_that_do_not_exist_are_refused(tmp_path: Path, by: Any, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        load_study(write(tmp_path, resources={"by": by}), "cpu")
    for part in parts:
        assert part in str(refused.value)


def test_values_of_settings_are_found_however_they_are_spelt() -> None:
    assert key_matches("1e-05", 0.00001)
    assert key_matches("0.50", 0.5)
    assert key_matches("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B")
    assert not key_matches("1", "1b")


def test_engines_stay_on_one_machine_with_their_trial(tmp_path: Path) -> None:
    cluster = ClusterCapacity((Node(8, 8), Node(8, 8)))
    served = {"rollout": {"backend": "vllm"}, "model": "tiny-1m"}
    for settings, refused in (
        ({"engine_scope": "study"}, "vllm.engine_scope"),
        ({"placement": "own"}, "vllm.placement"),
        ({"placement": "colocated"}, ""),
    ):
        content = {"run": {**served, "vllm": settings}, "resources": {"gpus_per_worker": 1}}
        study = resolved({"study": "s", "question": "?", **content}, cluster)
        checks.check_capacity(study.on(ClusterCapacity(cluster.nodes[:1])))
        if not refused:
            checks.check_capacity(study)
            continue
        with pytest.raises(ConfigError, match=refused):
            checks.check_capacity(study)


FEATURES = {"depths": [[0.5], [0.25, 0.75]]}
LENGTHS = {"completion_length": [2, 4], "alpha": [0.0, 1.0]}
SIZES = {"size": {"choices": {"small": {"model": "tiny-1m"}, "large": {"model": "tiny-4m"}}}}
TEMPERATURES = {"temperature": [0.6, 1.0]}
ASHA, MEDIAN = {"kind": "asha", "grace_period_steps": 5}, {"kind": "median", "grace_period_steps": 5}
HYPERBAND = {"kind": "hyperband", "grace_period_steps": 5}
OPTUNA = {"algorithm": "optuna", "num_configurations": 4}
RANDOM = {"algorithm": "random", "num_configurations": 3}
JUDGE_CFM, JUDGED = {"metric": "judge_cfm_loss", "mode": "min"}, {"steps": 20, "judge": "tiny-16m"}
CFM, CE = {"metric": "cfm_loss", "mode": "min"}, {"metric": "ce_loss", "mode": "min"}


@pytest.mark.parametrize(
    ("axes", "decides", "setting"),
    [
        (FEATURES, {"scheduler": ASHA}, "depths"),
        (FEATURES, {"scheduler": ASHA, "search": RANDOM, "axes": FEATURES | TEMPERATURES}, "depths and temperature"),
        (LENGTHS, {"scheduler": MEDIAN}, "completion_length"),
        (SIZES, {"scheduler": HYPERBAND}, "model"),
        (SIZES, {"search": OPTUNA}, "model"),
        (FEATURES, {"search": OPTUNA, "objective": [CE, CFM]}, "depths"),
        (TEMPERATURES, {"scheduler": ASHA}, "temperature"),
    ],
)
def test_nothing_is_decided_by_a_cfm_that_each_configuration_measures_in_its_own_way(
    tmp_path: Path, axes: dict[str, Any], decides: dict[str, Any], setting: str
) -> None:
    message = refusal(tmp_path, None, **{"axes": axes, "profiles": None, **decides})
    assert "objective.metric='cfm_loss'" in message
    assert f"at different {setting} measure different things. Use a comparable objective such as ce_loss" in message
    assert ("set evaluation_temperature" in message) == (setting == "temperature")
    assert ("judge_cfm_loss with evaluation.judge" in message) == ("temperature" not in setting)


@pytest.mark.parametrize(
    "changes",
    [
        {"axes": FEATURES},
        {"axes": FEATURES, "search": RANDOM | {"num_configurations": 2}},
        {"axes": FEATURES, "scheduler": ASHA, "objective": CE},
        {"axes": FEATURES, "search": OPTUNA | {"num_configurations": 2}, "objective": CE},
        {"axes": FEATURES, "scheduler": ASHA, "objective": JUDGE_CFM, "run": JUDGED},
        {
            "axes": {**LENGTHS, "pooling": ["last_token", "mean"], "random_weights": [True, False]},
            "search": OPTUNA | {"num_configurations": 2},
            "objective": JUDGE_CFM,
            "run": JUDGED,
        },
        {"axes": FEATURES, "stopping": {"stagnation": {}}},
        {"axes": TEMPERATURES, "scheduler": ASHA, "run": {"steps": 20, "evaluation_temperature": 0.6}},
        {"scheduler": ASHA},
        {"scheduler": ASHA, "baselines": {"deeper": {"depths": [0.25]}}},  # compared with none
    ],
)
def test_a_cfm_that_decides_nothing_or_can_be_compared_is_an_objective(tmp_path: Path, changes: dict[str, Any]) -> None:
    load_study(write(tmp_path, **changes), "cpu")


def test_rewards_are_measured_at_the_temperature_of_training(tmp_path: Path) -> None:
    run = {"steps": 20, "evaluation_temperature": 0.6}
    reward = {"metric": "reward", "mode": "max"}
    message = refusal(tmp_path, None, axes=TEMPERATURES, profiles=None, scheduler=ASHA, run=run, objective=reward)
    assert "objective.metric='reward'" in message
    assert "at different temperature measure different things" in message
    assert "set evaluation_temperature" not in message


def test_a_study_that_an_earlier_version_has_begun_can_be_resumed() -> None:
    content = {"study": "s", "question": "q", "run": {"steps": 20}, "axes": FEATURES, "scheduler": ASHA}
    assert resolved(content).n_trials == 2


def test_objectives_are_metrics_with_a_direction() -> None:
    from ebft_study.results import METRICS

    assert all(entry.direction for entry in METRICS.values() if entry.is_objective)


def test_a_profile_is_laid_over_what_the_file_says_of_its_scheduler_not_over_defaults(tmp_path: Path) -> None:
    given = {"grace_period_steps": 5}
    path = write(tmp_path, scheduler=given, profiles={"cpu": {"scheduler": {"kind": "median"}}})
    found = study_file.load_study(path, "cpu").spec.scheduler
    assert (found.kind, found.grace_period_steps, found.min_samples_required) == ("median", 5, 3)
    unused = {"kind": "asha", **given, "reduction_factor": 2}
    path = write(tmp_path, scheduler=unused, profiles={"cpu": {"scheduler": {"kind": "median"}}})
    with pytest.raises(ConfigError, match=r"profiles.cpu: scheduler: .*reduction_factor=2"):
        study_file.load_study(path, "cpu")


@pytest.mark.parametrize("kind", ["none", "asha", "hyperband", "median", "extrapolation"])
def test_study_yaml_records_what_the_scheduler_looks_at(tmp_path: Path, kind: str) -> None:
    spec = study_file.load_study(
        write(
            tmp_path,
            scheduler={"kind": kind, **({} if kind == "none" else GRACE)},
            run={"steps": 40, "eval_every_steps": 5},
        ),
        "cpu",
    ).spec
    recorded = normalize.dump(spec)["scheduler"]
    assert {"asha": 4, "hyperband": 3, "median": 3, "extrapolation": 3, "none": 1}[kind] == len(recorded)
    again = normalize.from_record(normalize.dump(spec), source="again")
    assert normalize.dump(again) == normalize.dump(spec)


GRACE = {"grace_period_steps": 5}

SIZES: dict[str, Any] = {
    "axes": {"size": {"choices": ["small", "large"]}, "alpha": [0.0, 1.0]},
    "profiles": {
        "cpu": {"choices": {"size": {"small": {"model": "tiny-1m"}, "large": {"model": "tiny-4m"}}}},
        "gpu": {"choices": {"size": {"small": {"model": "1b"}, "large": {"model": "7b", "batch_size": 16}}}},
    },
}


def test_a_profile_says_what_choices_stand_for(tmp_path: Path) -> None:
    for profile, models in (("cpu", ["tiny-1m", "tiny-4m"]), ("gpu", ["1b", "7b"])):
        spec = load_study(write(tmp_path, **SIZES), profile).spec
        assert [settings["model"] for settings in (spec.axes["size"].choices or {}).values()] == models
        assert spec.exclude == ()


@pytest.mark.parametrize(
    ("choices", "overrides", "part"),
    [
        ({"size": {"huge": {"model": "x"}}}, (), "choices.size.huge: is no choice of it. It has: small, large"),
        ({"size": {"small": {"model": "x"}}, "other": {}}, (), "choices.other: is no axis of choices"),
        ({"size": {"small": {"model": "x"}, "large": {"model": "x"}}}, (), "have the same settings"),
        ({"size": {"small": {"alpha": 0}, "large": {"alpha": 1}}}, (), "axes.alpha='reward.alpha': is also set by"),
        (SIZES["profiles"]["cpu"]["choices"], ("model=x",), "model: an override changes what is fixed"),
    ],
)
def test_a_profile_keeps_the_choices_and_an_override_what_they_set(
    tmp_path: Path, choices: dict[str, Any], overrides: tuple[str, ...], part: str
) -> None:
    assert part in refusal(tmp_path, "cpu", overrides, **{**SIZES, "profiles": {"cpu": {"choices": choices}}})


def test_two_axes_may_set_one_thing_if_they_never_exist_together(tmp_path: Path) -> None:
    axes: dict[str, Any] = {
        "layers": {"choices": ["one", "two"]},
        "one": {"choices": {"low": {"depths": [0.25]}, "high": {"depths": [0.75]}}, "when": {"layers": "one"}},
        "two": {"choices": {"low": {"depths": [0.25, 0.5]}}, "when": {"layers": "two"}},
    }
    assert len(load_study(write(tmp_path, axes=axes), "cpu").spec.axes) == 3
    axes["two"].pop("when")
    assert "is also set by axes.one" in refusal(tmp_path, axes=axes)


def test_a_profile_may_say_what_baselines_have_instead_of_an_axis(tmp_path: Path) -> None:
    profiles = {"cpu": {"baselines": {"sft": {"alpha": 0.25}}}}
    assert load_study(write(tmp_path, profiles=profiles), "cpu").spec.baselines["sft"]["reward"] == {"alpha": 0.25}
