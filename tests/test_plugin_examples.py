"""The plug-ins in examples/plugins/: each does what it says where it is called, and one study uses them all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import optuna
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from ebft_study import api, plugins, results
from ebft_study.config import DataConfig, VerifierConfig
from ebft_study.data import SPLITS, load_text
from ebft_study.errors import ConfigError
from ebft_study.evaluation.extra_metrics import Evaluated
from ebft_study.study.driver.callbacks import Callbacks
from ebft_study.study.driver.monitor import Monitor
from ebft_study.study.driver.tune_hooks import StudySearcher, StudyStopper
from ebft_study.study.folder.trial_states import TrialResult
from ebft_study.study.resolving.study_file import load_study, resolve
from ebft_study.study.search import journal
from ebft_study.study.search.optuna_search import OptunaSearch
from ebft_study.study.spec import normalize
from ebft_study.study.spec.study_spec import ObjectiveSpec, StoppingSpec, StudySpec
from ebft_study.study.stopping.rules import RuleMonitor
from ebft_study.training.setup import build_parts
from ebft_study.verifiers import Problem, load_verifier
from tests.contracts.schedulers import SchedulerContract
from tests.plugin_files import EXAMPLES, forgotten
from tests.studies import SOURCE, resolved, task
from tests.study.search.searches import run_all
from tests.tiny_run import run_tiny, tiny_config

__all__ = ["forgotten"]


@pytest.fixture(autouse=True)
def beside_the_examples(forgotten: None) -> Iterator[None]:
    plugins.search_in(EXAMPLES)
    return


def test_the_study_file_loads_with_every_kind(tmp_path: Path) -> None:
    study = load_study(EXAMPLES / "study.yaml")
    assert study.n_trials == 7
    modules = {path.partition(":")[0] for path in study.plugins["expected"]}
    assert modules == {path.stem for path in EXAMPLES.glob("*.py")} - {"my_callback"}
    assert study.plugins["folder"] == str(EXAMPLES)


def test_the_reward_is_the_f1_of_words() -> None:
    verifier = load_verifier(VerifierConfig(verifier="my_reward:word_overlap"))
    problems = [Problem("", reference) for reference in ("a b c d", "a b c d", "a a", "", "x")]
    judged = verifier.judge(problems, ["a b", "d c b a", "a b", "a", "y"])
    assert [each.reward for each in judged] == [pytest.approx(2 / 3), 1.0, 0.5, None, 0.0]


def test_the_metrics_are_means_over_what_they_see(tmp_path: Path) -> None:
    """Against single forward passes of transformers, and sets of tokens."""
    seen: list[Evaluated] = []
    config = tiny_config(tmp_path, steps=2, extra_metrics=["my_metric:distinct_tokens", "my_metric:worst_surprise"])
    parts = build_parts(config)
    for each in parts.evaluator.extra:
        object.__setattr__(each, "function", lambda e, f=each.function: seen.append(e) or f(e))
    measured = parts.evaluator.measure(parts.base.model, parts.data["validation"], sequences=4, lengths=[3])
    shares = [
        len(set(completion.flatten().tolist())) / completion.numel()
        for each in seen[::2]
        for completion in each.completions[each.anchors.valid]
    ]
    assert measured["distinct_tokens", None].value == pytest.approx(sum(shares) / len(shares))
    assert measured["distinct_tokens", None].count == len(shares)

    model = AutoModelForCausalLM.from_pretrained(config.model)
    worst = []
    for row in measured["worst_surprise", None].sequences.tolist():
        batch = parts.data["validation"].rows(torch.tensor([row]))
        tokens = batch.tokens[0, batch.document_ids[0] >= 0]
        log_probs = model(tokens[None]).logits[0, :-1].log_softmax(dim=-1)
        worst.append(-log_probs.gather(1, tokens[1:, None]).min().item())
    assert measured["worst_surprise", None].value == pytest.approx(sum(worst) / len(worst), rel=1e-4)


def test_metrics_are_recorded_like_ours(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=2, extra_metrics=["my_metric:worst_surprise"])
    result, recorder = run_tiny(config)
    assert set(recorder.curve("worst_surprise")) == {0, 2}
    assert result.metrics["worst_surprise"] == recorder.rows[2]["worst_surprise"]
    names = {0: set[str](), 2: set[str]()}
    for step, rows in recorder.evaluated.items():
        names[step] |= {row["metric"] for row in rows}
    assert all("worst_surprise" in of_step for of_step in names.values())
    (validated,) = [
        row for row in recorder.scored[2] if (row["metric"], row["benchmark"]) == ("worst_surprise", "validation")
    ]
    mean = sum(validated["values"]) / len(validated["values"])
    assert mean == pytest.approx(recorder.rows[2]["worst_surprise"])
    other, without = run_tiny(tiny_config(tmp_path, steps=2))
    assert "worst_surprise" not in without.rows[2]
    assert other.metrics["cfm_loss"] == result.metrics["cfm_loss"]


def monitor_of(functions: dict[str, Any]) -> RuleMonitor:
    return RuleMonitor(StoppingSpec(functions=functions), ObjectiveSpec())


def told(monitor: RuleMonitor, values: list[float]) -> list[bool]:
    reports = [{"step": 2.0 * k, "evaluated_step": 2.0 * k, "ce_loss": value} for k, value in enumerate(values)]
    return [monitor.should_stop("t0000", each, total_steps=100, n_samples=4) for each in reports]


def test_the_stopping_rule_stops_after_evaluations_in_a_row() -> None:
    rule = monitor_of({"my_stopping:beyond": {"metric": "ce_loss", "limit": 5.0}})
    assert told(rule, [4.0, 6.0, 4.0, 6.0, 7.0]) == [False, False, False, False, True]
    assert rule.reasons["t0000"].startswith("beyond: ce_loss 7 is beyond 5 for 2 evaluations; 92 of 100 steps saved")
    three = monitor_of({"my_stopping:beyond": {"metric": "ce_loss", "limit": 5.0, "evaluations": 3}})
    assert told(three, [6.0, 6.0, 6.0]) == [False, False, True]


class TestScheduler(SchedulerContract):
    @pytest.fixture
    def section(self) -> dict[str, Any]:
        return {"kind": "my_scheduler:Margin", "grace_period_steps": 4, "options": {"margin": 0.3}}


def spec_of(content: dict[str, Any], folder: Path = EXAMPLES) -> StudySpec:
    return resolve(normalize.from_record(content, source="test"), SOURCE, plugin_folder=str(folder)).spec


SAMPLERS: dict[str, tuple[dict[str, Any], Callable[[int], optuna.samplers.BaseSampler]]] = {
    "my_sampler:joint_tpe": (
        {"n_startup_trials": 5},
        lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=5, constant_liar=True),
    ),
    "optuna.samplers:NSGAIIISampler": (
        {"population_size": 4},
        lambda seed: optuna.samplers.NSGAIIISampler(seed=seed, population_size=4),
    ),
}


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_chooses_what_it_chooses_without_us(name: str, tmp_path: Path) -> None:
    """With the seed of the search, its options, and the results of its configurations."""
    options, made = SAMPLERS[name]
    search = {"algorithm": "optuna", "num_configurations": 20, "search_seed": 3, "sampler": name}
    axis = {"distribution": "uniform", "low": 0.0, "high": 1.0}
    content = {"study": "s", "question": "?", "axes": {"gamma": axis}}
    spec = spec_of({**content, "search": {**search, "sampler_options": options}})
    done = run_all(
        OptunaSearch(spec, tmp_path / "journal", {}),
        lambda trial: TrialResult("finished", value=(trial.run.loss.gamma - 0.3) ** 2),
    )
    alone, expected = optuna.create_study(sampler=made(3)), []
    for _ in range(20):
        asked = alone.ask()
        expected.append(spec.axes["loss.gamma"].readable(asked.suggest_float("loss.gamma", 0.0, 1.0)))
        alone.tell(asked, (expected[-1] - 0.3) ** 2)
    assert [trial.run.loss.gamma for trial in done] == expected


def test_the_data_set_is_complete_and_right() -> None:
    text = load_text(DataConfig(dataset="my_dataset:sums"))
    examples = [example for split in SPLITS for example in text.splits[split]]
    assert len(examples) == 1000
    assert text.has_answers
    by_prompt = {example.prompt: example.answer for example in examples}
    assert by_prompt["nine and nine and eight is "] == "two six ."
    assert min(len(text.splits[split]) for split in SPLITS) > 20


def test_the_callback_writes_what_happens(tmp_path: Path) -> None:
    recorder = results.StudyRecorder(tmp_path, study="s")
    monitor, problems = Monitor(recorder, {}, "cfm_loss"), list[str]()
    monitor.callbacks = Callbacks({"my_callback:Log": {"path": str(tmp_path / "log")}}, problems.append)
    (trial,) = resolved({"study": "s", "question": "?", "run": {"steps": 4}}).trials
    monitor.planned(trial)
    monitor.started(trial.trial_id)
    monitor.reported(trial.trial_id, {"step": 2.0, "ce_loss": 1.5, "attempt": 1})
    monitor.ended(trial.trial_id, {"status": "finished"})
    monitor.callbacks.call("on_study_end", "s", "Ctrl-C")
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "report", "end", "over"]
    assert [line.get("status") for line in lines[:3]] == ["running", "running", "finished"]
    assert lines[1]["ce_loss"] == 1.5
    assert lines[3]["reason"] == "Ctrl-C"

    (tmp_path / "log").unlink()
    (tmp_path / "log").mkdir()  # cannot be appended to
    monitor.started(trial.trial_id)
    monitor.ended(trial.trial_id, {"status": "finished"})
    (problem,) = problems
    assert "on_trial_start has raised IsADirectoryError" in problem


def test_failures_of_plugins_are_told_where_they_decide(tmp_path: Path) -> None:
    """A rule that fails ends the study, rather than being taken for one that says nothing."""
    rules = monitor_of({"my_stopping:beyond": {"metric": "ce_loss", "limit": "x"}})
    with pytest.raises(ConfigError, match="my_stopping:beyond': it has raised TypeError"):
        told(rules, [1.0, 1.0])
    stopper = StudyStopper(None, rules=rules)
    report = {"step": 6.0, "evaluated_step": 6.0, "ce_loss": 1.0, "config": task(total_steps=99).to_config()}
    assert not stopper("tune-id", report)
    assert stopper.reason.startswith("stopping.functions='my_stopping:beyond': it has raised TypeError")
    assert stopper.stop_all()


FAILING = """
from optuna.samplers import RandomSampler

class Failing(RandomSampler):
    def __init__(self, seed, last): super().__init__(seed); self.last = last
    def sample_independent(self, study, trial, name, distribution):
        if trial.number > self.last: raise RuntimeError("no more")
        return super().sample_independent(study, trial, name, distribution)
"""


def test_a_sampler_that_fails_is_found_before_the_start_or_ends_the_session(tmp_path: Path) -> None:
    (tmp_path / "my_failing.py").write_text(FAILING)

    def failing_after(last: int) -> StudySpec:
        search = {"algorithm": "optuna", "num_configurations": 9, "sampler": "my_failing:Failing"}
        axes = {"gamma": {"distribution": "uniform", "low": 0.0, "high": 1.0}}
        content = {"study": "s", "question": "?", "axes": axes, "search": {**search, "sampler_options": {"last": last}}}
        return spec_of(content, tmp_path)

    problem = "search.sampler='my_failing:Failing': it has raised RuntimeError: no more. Repair it"
    with pytest.raises(ConfigError, match=problem):
        journal.check_sampler(failing_after(1))
    spec = failing_after(4)
    journal.check_sampler(spec)
    search, reasons = OptunaSearch(spec, tmp_path / "journal", {}), list[str]()
    launched: Any = lambda trial: SimpleNamespace(to_config=lambda: {"trial": trial.trial_id})  # noqa: E731
    searcher = StudySearcher(search, MagicMock(), launched, give_up=reasons.append)
    given = [searcher.suggest(str(number)) for number in range(6)]
    assert [each is None for each in given] == [False] * 5 + [True]
    assert reasons == [problem]


def test_values_that_are_no_metric_are_refused(tmp_path: Path) -> None:
    (tmp_path / "my_shapes.py").write_text(
        "import torch\nfrom ebft_study.evaluation.extra_metrics import metric\n"
        "@metric(direction='min')\ndef my_shape(e): return torch.zeros(7, 7, 7)\n"
        "@metric(direction='min')\ndef my_number(e): return 3.0\n"
        "@metric(direction='min')\ndef my_holes(e):\n"
        "    return torch.where(torch.arange(len(e.batch.tokens)) == 0, torch.nan, 2.0)\n"
    )
    plugins.search_in(tmp_path)
    for name, problem in (("my_shape", r"shape \(7, 7, 7\)"), ("my_number", "returned float")):
        with pytest.raises(ConfigError, match=f"{problem}. Return a tensor of shape"):
            run_tiny(tiny_config(tmp_path, steps=1, extra_metrics=[f"my_shapes:{name}"]))
    config = tiny_config(tmp_path, extra_metrics=["my_shapes:my_holes"])
    parts = build_parts(config)
    measured = parts.evaluator.measure(parts.base.model, parts.data["train"], sequences=4, lengths=[3])
    assert 1 <= measured["my_holes", None].count <= 3
    assert measured["my_holes", None].value == 2.0


@pytest.mark.integration
def test_one_study_with_all_kinds_runs_and_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_config(tmp_path).model
    changes = {
        "model": model, "steps": 4, "eval_every_steps": 2, "log_every_steps": 1, "checkpoint_every_steps": 2,
        "device": "cpu", "search.num_configurations": 2, "scheduler.grace_period_steps": 2, "sequence_length": 40,
        "resources.workers_per_trial": 0, "validation_sequences": 4, "heldout_sequences": 4,
    }  # fmt: skip
    study = api.load(EXAMPLES / "study.yaml", overrides=[f"{key}={value}" for key, value in changes.items()])
    ended = api.run(study, console=Console())
    assert not ended.reason
    assert {state.status for state in ended.states.values()} == {"finished"}, ended.states
    tables = results.load(ended.folder)
    for name in ("distinct_tokens", "worst_surprise", "ce_loss"):
        last = tables.metrics[tables.metrics["step"] == 4][name]
        assert len(last) == 3
        assert last.notna().all()
    assert set(tables.spec["provenance"]["plugins"]) == {*study.plugins["expected"], "my_callback:Log"}
    assert tables.spec["objective"] == {"metric": "distinct_tokens", "mode": "max"}
    rewards = tables.metrics.query("trial_id == 't0000'")["verifier_reward"].dropna()
    assert all(0 <= reward <= 1 for reward in rewards)
    assert len(rewards)
    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert sum(line["event"] == "end" for line in lines) == 3
    assert lines[-1] == {"event": "over", "study": "plugins", "reason": ""}
    page = Path(str(ended.report)).read_text()
    assert "distinct_tokens" in page
    assert math.isfinite(float(last.iloc[0]))
