"""Rules that stop a single trial: on curves whose verdict is plain, and on how reports reach them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ebft_study import results
from ebft_study.algorithm.metrics import duplicate_fraction
from ebft_study.errors import ConfigError
from ebft_study.methods import MetricAccumulator
from ebft_study.study.driver.tune_hooks import StudyStopper
from ebft_study.study.folder import history
from ebft_study.study.folder.trial_states import Evaluation
from ebft_study.study.spec.study_spec import CollapseRule, ObjectiveSpec, StoppingSpec
from ebft_study.study.stopping.rules import RuleMonitor, collapsed, diverged, hacked, reason_to_stop, stagnated
from tests.studies import resolved, task
from tests.synthetic_study import PAPER_LIKE, write_study

CFM = ObjectiveSpec()


def curve(**metrics: list[float]) -> list[Evaluation]:
    """Evaluations at steps 0, 10, 20, ..."""
    length = len(next(iter(metrics.values())))
    return [Evaluation(10 * i, {name: values[i] for name, values in metrics.items()}) for i in range(length)]


@pytest.mark.parametrize(
    ("ce", "stops"),
    [
        ([4.0, 4.2, 4.3, 4.4], True),
        ([4.0, 4.2, 4.05, 4.4], False),
        ([4.0, 4.2, 4.3], False),
        ([4.0, 4.1, 4.1, 4.1], False),
        ([4.0, 3.0, 3.5, 3.9], False),
        ([4.0, 4.2, math.nan, 4.4], False),
    ],
    ids=["three in a row", "one below", "too few", "exactly the margin", "rises below the base", "one unknown"],
)
def test_a_trial_diverges_when_it_stays_above_the_base_model(ce: list[float], stops: bool) -> None:
    said = diverged(curve(ce_loss=ce), margin=0.1, evaluations=3)
    assert bool(said) is stops
    if stops:
        assert said == "diverged: ce_loss 4.4 is above the base model's 4 by more than 0.1 for 3 evaluations"


def test_without_the_base_model_nothing_diverges() -> None:
    assert diverged(curve(ce_loss=[4.0, 9.0, 9.0, 9.0])[1:], margin=0.1, evaluations=3) == ""


COLLAPSE = CollapseRule().model_dump()


@pytest.mark.parametrize("n", [2, 3, 4, 7, 10, 11, 16])
@pytest.mark.parametrize("threshold", [0.5, 0.9, 1.0])
def test_samples_that_are_all_alike_are_a_collapse_whatever_their_number(n: int, threshold: float) -> None:
    """By the metric itself, averaged over contexts as a row of metrics is."""
    alike, varied = torch.zeros(1, 7, n, 5), torch.arange(7.0 * n * 5).view(1, 7, n, 5)
    rates = []
    for completions in (varied, alike, alike):
        accumulator = MetricAccumulator()
        accumulator.add_valid("duplicate_rate", duplicate_fraction(completions), torch.ones(1, 7, dtype=torch.bool))
        rates.append(accumulator.row()["duplicate_rate"])
    said = collapsed(curve(duplicate_rate=rates), **COLLAPSE | {"duplicate_rate": threshold}, n_samples=n)
    assert said.startswith(f"collapsed: duplicate_rate {1 - 1 / n:.3g} is at least {threshold * (1 - 1 / n):.3g}")
    assert collapsed(curve(duplicate_rate=rates[:2]), **COLLAPSE, n_samples=n) == ""
    pairs = [0.0, *2 * [threshold * (1 - 1 / n) - 0.01]]
    assert collapsed(curve(duplicate_rate=pairs), **COLLAPSE | {"duplicate_rate": threshold}, n_samples=n) == ""


def test_a_policy_without_entropy_is_a_collapse_and_one_sample_is_none() -> None:
    certain = curve(duplicate_rate=[0.0, 0.1, 0.1], policy_entropy=[1.0, 0.05, 0.04])
    said = collapsed(certain, **COLLAPSE | {"entropy": 0.06}, n_samples=4)
    assert said == "collapsed: policy_entropy 0.04 is below 0.06 for 2 evaluations"
    alone = curve(duplicate_rate=[0.0, 0.0, 0.0], policy_entropy=[1.0, 1.0, 1.0])
    assert collapsed(alone, **COLLAPSE, n_samples=1) == ""
    assert collapsed(curve(ce_loss=[1.0, 1.0, 1.0]), **COLLAPSE, n_samples=4) == ""


def test_a_threshold_that_no_rate_can_reach_is_refused() -> None:
    content = {"study": "s", "question": "?", "stopping": {"collapse": {"duplicate_rate": 1.1}}}
    with pytest.raises(ConfigError, match=r"stopping\.collapse\.duplicate_rate=1\.1.*less than or equal to 1"):
        resolved(content)


@pytest.mark.parametrize(
    ("values", "mode", "stops"),
    [
        ([2.0, 1.5, 1.6, 1.7], "min", True),
        ([2.0, 1.5, 1.6, 1.4], "min", False),
        ([2.0, 1.5, 1.6], "min", False),
        ([2.0, 1.5, 1.49, 1.495], "min", True),
        ([0.1, 0.5, 0.4, 0.3], "max", True),
        ([0.1, 0.5, 0.4, 0.7], "max", False),
    ],
)
def test_no_progress_is_judged_against_the_best_so_far(values: list[float], mode: Any, stops: bool) -> None:
    objective = ObjectiveSpec(metric="cfm_loss", mode=mode)
    trained = [9.0 if mode == "min" else 0.0, *values]
    assert bool(stagnated(curve(cfm_loss=trained), objective, improvement=0.05, evaluations=2)) is stops


@pytest.mark.parametrize("start", [0, 20])
def test_a_trial_that_lost_to_its_start_and_improves_since_has_not_stagnated(start: int) -> None:
    """The start is the base model, or the end of a warm start."""
    values = [1.0] * (start // 10 + 1) + [2.0, 1.9, 1.8, 1.7, 1.6]
    stagnation = StoppingSpec.model_validate({"stagnation": {"evaluations": 2}})
    losses, watch = curve(cfm_loss=values), RuleMonitor(stagnation, CFM)
    for evaluation in losses:
        report = {"step": evaluation.step, "evaluated_step": evaluation.step, **evaluation.metrics}
        assert not watch.should_stop("t0", report, total_steps=100, n_samples=4, warm_start_steps=start)
    worse = [Evaluation(evaluation.step, {"cfm_loss": -evaluation.get("cfm_loss")}) for evaluation in losses]
    assert reason_to_stop(worse, stagnation, CFM, n_samples=4, warm_start_steps=start).startswith("no progress")


def test_reward_that_rises_with_the_loss_it_should_lower_is_hacking() -> None:
    up, down = [0.0, 0.1, 0.2, 0.3], [2.5, 2.4, 2.3, 2.2]
    worse = [2.0, 2.1, 2.2, 2.3]
    assert hacked(curve(reward=up, cfm_loss=worse), evaluations=2).startswith("reward hacking: reward rose to 0.3")
    assert hacked(curve(reward=up, cfm_loss=down), evaluations=2) == ""
    assert hacked(curve(reward=down, cfm_loss=worse), evaluations=2) == ""
    assert hacked(curve(reward=up, cfm_loss=worse), evaluations=3) == ""


def test_no_rule_applies_unless_it_is_named() -> None:
    bad = curve(ce_loss=[1.0, 9.0, 9.0, 9.0], cfm_loss=[1.0, 2.0, 3.0, 4.0], reward=[0.0, 1.0, 2.0, 3.0])
    assert reason_to_stop(bad, StoppingSpec(), CFM, n_samples=4) == ""
    assert reason_to_stop(bad, StoppingSpec.model_validate({"divergence": {}}), CFM, n_samples=4).startswith("diverged")
    assert reason_to_stop(bad, StoppingSpec.model_validate({"reward_hacking": {"evaluations": 2}}), CFM, n_samples=4)


CONFIG = task(trial_id="t0", total_steps=100).to_config()


def report(step: int, ce: float, *, evaluated: int | None = None, **more: Any) -> dict[str, Any]:
    seen = step if evaluated is None else evaluated
    return {"step": step, "evaluated_step": float(seen), "ce_loss": ce, "config": {**CONFIG}, **more}


def test_the_rule_knows_the_number_of_samples_of_a_trial() -> None:
    monitor = RuleMonitor(StoppingSpec.model_validate({"collapse": {"evaluations": 1}}), CFM)
    stopper, n = StudyStopper(None, rules=monitor), CONFIG["run"]["rollout"]["n_samples"]
    assert n < 10, "the rate is below 0.9 even where all samples are equal"
    assert not stopper("tune-id", report(10, 4.0, duplicate_rate=0.5 * (1 - 1 / n)))
    assert stopper("tune-id", report(20, 4.0, duplicate_rate=1 - 1 / n))


def build_stopper(past: dict[str, list[Evaluation]] | None = None) -> StudyStopper:
    rules = StoppingSpec.model_validate({"divergence": {"margin": 0.1, "evaluations": 2}})
    return StudyStopper(None, rules=RuleMonitor(rules, CFM, past))


def test_only_new_evaluations_count() -> None:
    stopper = build_stopper()
    reports = [report(0, 4.0), report(10, 5.0), report(15, 5.0, evaluated=10), report(10, 5.0)]
    assert [stopper("tune-id", one) for one in reports] == [False] * 4
    assert stopper("tune-id", report(20, 5.0))
    assert stopper.rule_reasons["t0"].endswith("for 2 evaluations; 80 of 100 steps saved")


def test_baselines_ends_and_last_steps_are_left_alone() -> None:
    for last in (report(20, 5.0, outcome={}), report(100, 5.0), report(20, 5.0)):
        stopper = build_stopper()
        stopper("tune-id", report(0, 4.0))
        stopper("tune-id", report(10, 5.0))
        last["config"]["is_baseline"] = last["step"] == 20 and "outcome" not in last
        assert not stopper("tune-id", last)


def test_a_resumed_study_remembers_earlier_evaluations(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", effects={key: PAPER_LIKE[key] for key in ((1.0, 0.0), None)})
    past = history.read(folder, "cfm_loss").evaluations
    trial_id = min(past)
    measured = results.read_table(folder, "metrics")
    own = measured[(measured["trial_id"] == trial_id) & measured["ce_loss"].notna()]
    assert [evaluation.step for evaluation in past[trial_id]] == own["step"].tolist()
    assert [evaluation.get("ce_loss") for evaluation in past[trial_id]] == own["ce_loss"].tolist()
    stopper = build_stopper({"t0": [Evaluation(0, {"ce_loss": 4.0}), Evaluation(10, {"ce_loss": 5.0})]})
    assert stopper("tune-id", report(20, 5.0))
