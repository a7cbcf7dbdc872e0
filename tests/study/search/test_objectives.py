"""Several objectives: what a study file says, what Optuna is told, and how well evolution finds the front."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from optuna._hypervolume import compute_hypervolume
from optuna.trial import TrialState

from ebft_study.analysis.pareto import front
from ebft_study.errors import ConfigError
from ebft_study.storage import storage_path
from ebft_study.study.folder.trial_states import TrialResult
from ebft_study.study.search.journal import JOURNAL, directions, is_over
from ebft_study.study.search.optuna_search import OptunaSearch
from ebft_study.study.spec import normalize
from ebft_study.study.spec.study_spec import ObjectiveSpec, StudySpec
from ebft_study.study.spec.trials import Trial
from tests.studies import resolved
from tests.study.search.searches import plain_optuna, run_all

BOTH = [{"metric": "ce_loss", "mode": "min"}, {"metric": "cfm_loss", "mode": "min"}]
REFERENCE = np.array([2.0, 2.0])


def spec(**changes: Any) -> StudySpec:
    content = {
        "study": "s",
        "question": "q",
        "run": {"steps": 10},
        "axes": {name: {"distribution": "uniform", "low": 0.0, "high": 1.0} for name in ("gamma", "kl_coefficient")},
        "objective": BOTH,
        **changes,
        "search": {"algorithm": "optuna", "num_configurations": 12, "sampler": "nsga2", "population_size": 4,
                   **changes.get("search", {})},
    }  # fmt: skip
    return normalize.from_record(content, source="study.yaml")


def rated(trial: Trial) -> TrialResult:
    """The front is kl_coefficient = 0, where the objectives are x and (1 - sqrt(x))^2 or so: Deb's ZDT1 with two."""
    x, distance = trial.run.loss.gamma, 1 + 9 * trial.run.loss.kl_coefficient
    shift = 0.01 if trial.seed else -0.01  # seeds must average out
    return TrialResult("finished", x + shift, 10, (distance * (1 - math.sqrt(x / distance)) - shift,))


# --- the study file --------------------------------------------------------------------------------------------


def test_one_objective_is_a_mapping_as_it_always_was() -> None:
    one = spec(objective=BOTH[0], search={"sampler": "tpe"})
    assert one.objective == ObjectiveSpec(metric="ce_loss")
    assert one.objective.all == (one.objective,)
    assert normalize.dump(one)["objective"] == BOTH[0]


def test_several_are_a_list_and_come_back_from_the_record_as_such() -> None:
    dumped = yaml.safe_load(yaml.safe_dump(normalize.dump(spec())))
    assert dumped["objective"] == BOTH
    assert normalize.from_record(dumped, source="record") == spec()
    assert spec().objective.metric == "ce_loss"  # what schedulers look at
    assert directions(spec(objective=[BOTH[0], {"metric": "reward", "mode": "max"}]).objective) == [
        "minimize",
        "maximize",
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": []}, "lists no objectives"),
        ({"objective": ["ce_loss"]}, "lists no objectives"),
        ({"objective": {**BOTH[0], "further": BOTH[1:]}}, "several objectives are a list"),
        ({"objective": [BOTH[0], BOTH[0]]}, "is listed twice"),
        ({"objective": [BOTH[0], {"metric": "cfm_los"}]}, "Did you mean 'cfm_loss'"),
        ({"objective": [BOTH[0], {"metric": "reward", "mode": "min"}]}, "objective.mode"),
        ({"objective": [BOTH[0], {"metric": "ce_answer_loss"}], "run": {"dataset": "stdlib"}}, "raw text"),
        ({"objective": BOTH[0]}, "search.sampler"),
        ({"search": {"population_size": 12}}, "search.population_size"),
    ],
)
def test_what_cannot_work_is_refused_when_the_file_is_read(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(spec(**changes))
    assert said in str(caught.value)


# --- what Optuna is told ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trial_results", "state", "values"),
    [
        (
            [TrialResult("finished", 1.0, 10, (3.0,)), TrialResult("finished", 2.0, 10, (5.0,))],
            TrialState.COMPLETE,
            [1.5, 4.0],
        ),
        (
            [
                TrialResult("finished", 1.0, 10, (3.0,), {3: (1.0, 3.0), 10: (0.0, 0.0)}),
                TrialResult("early", 4.0, 3, (5.0,), {3: (4.0, 5.0)}),
            ],
            TrialState.PRUNED,
            None,
        ),
        (
            [TrialResult("finished", 1.0, 10, (3.0,)), TrialResult("finished", 2.0, 10, (math.nan,))],
            TrialState.FAIL,
            None,
        ),
        ([TrialResult("finished", 1.0, 10, (3.0,)), TrialResult("failed")], TrialState.FAIL, None),
    ],
)
def test_the_means_over_seeds_are_told_or_that_there_are_none(
    tmp_path: Path, trial_results: list[TrialResult], state: TrialState, values: list[float] | None
) -> None:
    source = OptunaSearch(spec(seeds=[0, 1]), tmp_path / JOURNAL, {})
    for trial_result in trial_results:
        trial = source.next()
        assert trial
        source.ended(trial.trial_id, trial_result)
    told = plain_optuna(tmp_path / JOURNAL).trials[0]
    assert (told.state, told.values) == (state, values)
    early = {"stopped_early": {"step": 3, "values": [2.5, 4.0]}}
    assert told.user_attrs == (early if state is TrialState.PRUNED else {})


@pytest.mark.parametrize("sampler", ["nsga2", "tpe", "gp", "qmc", "random"])
def test_every_sampler_copes_with_several_objectives_early_stops_and_failures(tmp_path: Path, sampler: str) -> None:
    kinds: Any = ("finished", "finished", "finished", "early", "failed")
    study = spec(search={"sampler": sampler, "num_configurations": 15})

    def ended(trial: Trial) -> TrialResult:
        kind = kinds[int(trial.trial_id[1:]) % 5]
        found = rated(trial)
        curve = {step: tuple(value + 10 - step for value in (found.value, *found.further)) for step in (5, 10)}
        return TrialResult(kind) if kind == "failed" else dataclasses.replace(found, kind=kind, step=5, curve=curve)

    assert len(run_all(OptunaSearch(study, tmp_path / JOURNAL, {}), ended)) == 15
    states = [frozen.state for frozen in plain_optuna(tmp_path / JOURNAL).trials]
    estimated = 3 if sampler in ("nsga2", "gp") else 0
    expected = [9 + estimated, 3 - estimated, 3]
    assert [states.count(s) for s in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)] == expected


def test_what_was_stopped_is_never_on_the_front_and_has_the_rank_of_its_gap(tmp_path: Path) -> None:
    """It is worse than every finished configuration before it in every objective, however well it began."""
    study = spec(search={"num_configurations": 4})
    results = [
        TrialResult("finished", 1.0, 10, (3.0,), {5: (2.0, 4.0), 10: (1.0, 3.0)}),
        TrialResult("finished", 2.0, 10, (1.0,), {5: (3.0, 2.0), 10: (2.0, 1.0)}),
        TrialResult("early", 2.0, 5, (2.0,), {5: (2.0, 2.0)}),
        TrialResult("early", 9.0, 5, (9.0,), {5: (9.0, 9.0)}),
    ]
    run_all(OptunaSearch(study, tmp_path / JOURNAL, {}), lambda trial: results[int(trial.trial_id[1:])])
    told = plain_optuna(tmp_path / JOURNAL)
    assert [frozen.number for frozen in told.best_trials] == [0, 1]
    begun_well, behind = (frozen.values for frozen in told.trials[2:])
    assert begun_well == pytest.approx([2.0, 3.0])
    assert begun_well > [2.0, 3.0]
    assert behind == pytest.approx([1.5 + 6.5, 2.0 + 6.0]), "the mean of the final values plus the mean of the gaps"


def test_the_journal_shows_the_front_to_plain_optuna(tmp_path: Path) -> None:
    run_all(OptunaSearch(spec(), tmp_path / JOURNAL, {}), rated)
    study = plain_optuna(tmp_path / JOURNAL)
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MINIMIZE"]
    values = [frozen.values for frozen in study.trials]
    on_front = [value for value, best in zip(values, front(values, ["min", "min"]), strict=True) if best]
    assert sorted(frozen.values for frozen in study.best_trials) == sorted(on_front)


# --- how well the front is found -------------------------------------------------------------------------------


def volume(journal: Path) -> float:
    """Of what the found front dominates, below the reference point; the true front's is 2 * 2 - 1/3 (for x <= 1)."""
    values = np.array([frozen.values for frozen in plain_optuna(journal).best_trials])
    inside = values[(values < REFERENCE).all(axis=1)]
    return float(compute_hypervolume(inside, REFERENCE))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    folder, volumes = tmp_path_factory.mktemp("fronts"), {}
    for sampler in ("nsga2", "random"):
        study = spec(search={"sampler": sampler, "num_configurations": 96, "population_size": 8, "search_seed": 1})
        run_all(OptunaSearch(study, folder / sampler, {}), rated)
        volumes[sampler] = volume(folder / sampler)
    return volumes


def test_evolution_finds_more_of_the_front_than_chance(found: dict[str, float]) -> None:
    assert found["nsga2"] > found["random"] + 0.1


def test_evolution_comes_near_the_true_front(found: dict[str, float]) -> None:
    x = np.linspace(0, 1, 2001)
    true = float(compute_hypervolume(np.stack([x, 1 - np.sqrt(x)], axis=1), REFERENCE))
    assert true == pytest.approx(4 - 1 / 3, abs=1e-3)  # closed form: area above 1 - sqrt(x) on [0, 1], and right of it
    assert found["nsga2"] > 0.9 * true


@pytest.mark.parametrize("killed_after", [1, 5, 9])
def test_a_killed_evolution_goes_on_and_ends_with_as_many_trials(tmp_path: Path, killed_after: int) -> None:
    journal, trial_results = tmp_path / JOURNAL, dict[str, TrialResult]()
    source = OptunaSearch(spec(), journal, trial_results)
    drawn: list[Any] = []
    for number in range(killed_after):
        trial = source.next()
        assert trial
        drawn.append(trial.configuration.settings)
        if number < killed_after - 1:  # the last one was running
            trial_results[trial.trial_id] = rated(trial)
            source.ended(trial.trial_id, rated(trial))
    del source
    after = run_all(OptunaSearch(spec(), journal, trial_results), rated)
    assert after[0].configuration.settings == drawn.pop()
    assert sorted([*trial_results, *(trial.trial_id for trial in after)]) == [f"t{number:04d}" for number in range(12)]
    assert is_over(spec(), storage_path(tmp_path))
    assert all(trial.configuration.settings not in drawn for trial in after)  # the seed does not repeat itself
    generations = [f.system_attrs for f in plain_optuna(journal).trials]
    assert max(value for attrs in generations for key, value in attrs.items() if "generation" in key) == 2
