"""Which trial comes next, in one session and across sessions that end without warning."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from typing import Any

import pytest
from optuna.samplers._tpe.sampler import _split_trials
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from ebft_study.errors import StorageError
from ebft_study.storage import storage_path
from ebft_study.study.folder import trial_states
from ebft_study.study.folder.trial_states import TrialResult
from ebft_study.study.search.journal import JOURNAL, is_over
from ebft_study.study.search.listed import ListedSearch
from ebft_study.study.search.optuna_search import STOPPED_EARLY, OptunaSearch
from ebft_study.study.spec import normalize, trials
from ebft_study.study.spec.study_spec import StudySpec
from ebft_study.study.spec.trials import Trial
from tests.study.search.searches import plain_optuna, run_all


def spec(**changes: Any) -> StudySpec:
    content = {
        "study": "s",
        "question": "q",
        "run": {"steps": 10},
        "axes": {"learning_rate": {"distribution": "log_uniform", "low": 1e-5, "high": 1e-2}, "alpha": [0.0, 1.0]},
        "seeds": [0, 1],
        "search": {"algorithm": "optuna", "num_configurations": 4},
        **changes,
    }
    return normalize.from_record(content, source="test")


def finished(value: float, curve: dict[int, float]) -> TrialResult:
    return TrialResult("finished", value, max(curve), (), {step: (each,) for step, each in curve.items()})


def stopped(curve: dict[int, float]) -> TrialResult:
    last = max(curve)
    return TrialResult("early", curve[last], last, (), {step: (each,) for step, each in curve.items()})


def asked(journal: Path) -> list[FrozenTrial]:
    return plain_optuna(journal).get_trials()


def rate(trial: Trial) -> TrialResult:
    """Best at a learning rate of 1e-3; the seed adds what must average out."""
    distance = math.log10(trial.run.optimizer.learning_rate / 1e-3) ** 2
    return TrialResult("finished", distance + (0.1 if trial.seed else -0.1), 10)


def test_listed_trials_come_in_order_and_then_no_more() -> None:
    study = spec(axes={"alpha": [0.0, 1.0]}, search={"algorithm": "grid"})
    listed = trials.trials_of(study, trials.enumerated(study))
    assert run_all(ListedSearch(listed), rate) == listed


def test_every_configuration_runs_over_all_seeds(tmp_path: Path) -> None:
    done = run_all(OptunaSearch(spec(), tmp_path / JOURNAL, {}), rate)
    assert [trial.trial_id for trial in done] == [f"t{number:04d}" for number in range(8)]
    for first, second in zip(done[::2], done[1::2], strict=True):
        assert (first.seed, second.seed) == (0, 1)
        assert first.configuration == second.configuration
    assert len({trial.configuration.label for trial in done}) == 4


def test_optuna_is_told_the_mean_over_seeds(tmp_path: Path) -> None:
    done = run_all(OptunaSearch(spec(), tmp_path / JOURNAL, {}), rate)
    for number, frozen in enumerate(asked(tmp_path / JOURNAL)):
        assert frozen.state is TrialState.COMPLETE
        mean = (rate(done[2 * number]).value + rate(done[2 * number + 1]).value) / 2
        assert frozen.value == pytest.approx(mean)


def test_optuna_finds_better_settings_than_it_starts_with(tmp_path: Path) -> None:
    study = spec(search={"algorithm": "optuna", "num_configurations": 40}, seeds=[0])
    values = [rate(trial).value for trial in run_all(OptunaSearch(study, tmp_path / JOURNAL, {}), rate)]
    assert sum(values[-10:]) < 0.5 * sum(values[:10])


def test_baselines_run_first_and_are_none_of_optunas_business(tmp_path: Path) -> None:
    study = spec(baselines={"sft": {"method": "sft"}})
    done = run_all(OptunaSearch(study, tmp_path / JOURNAL, {}), rate)
    assert [trial.label for trial in done[:2]] == ["sft seed=0", "sft seed=1"]
    assert len(done) == 2 + 8
    assert len(asked(tmp_path / JOURNAL)) == 4


@pytest.mark.parametrize(
    ("trial_results", "state", "value"),
    [
        ([TrialResult("finished", 1.0, 10), TrialResult("finished", math.nan, 10)], TrialState.FAIL, None),
        ([finished(0.1, {3: 0.4, 10: 0.1}), TrialResult("failed")], TrialState.FAIL, None),
        ([finished(0.1, {3: 0.4, 10: 0.1}), stopped({3: 0.5})], TrialState.PRUNED, 0.45),
        ([stopped({0: 9.0, 3: 3.0, 5: 0.0}), stopped({2: 0.0, 3: 4.0})], TrialState.PRUNED, 3.5),
        ([stopped({2: 3.0, 5: 0.0}), stopped({2: 0.0, 3: 4.0})], TrialState.PRUNED, 3.5),
        ([stopped({0: 9.0, 3: 3.0}), stopped({0: 1.0})], TrialState.PRUNED, 3.0),
        ([stopped({3: 3.0}), TrialResult("early")], TrialState.PRUNED, 3.0),
        ([stopped({0: 3.0}), TrialResult("early")], TrialState.FAIL, None),
        ([stopped({3: math.nan}), TrialResult("early")], TrialState.FAIL, None),
    ],
)
def test_what_did_not_finish_is_told_as_such(
    tmp_path: Path, trial_results: list[TrialResult], state: TrialState, value: float | None
) -> None:
    """A stopped configuration by its seeds at their last common step, those that were not started left out."""
    source = OptunaSearch(spec(search={"algorithm": "optuna", "num_configurations": 1}), tmp_path / JOURNAL, {})
    run_all(source, lambda trial: trial_results[trial.seed])
    (frozen,) = asked(tmp_path / JOURNAL)
    assert frozen.state is state
    assert frozen.value == value


def test_gp_is_told_an_estimate_of_what_was_stopped(tmp_path: Path) -> None:
    """Final values plus the gap at the same step and seeds; told after all configurations that began before it."""
    search = {"algorithm": "optuna", "num_configurations": 3, "sampler": "gp"}
    source = OptunaSearch(spec(search=search), tmp_path / JOURNAL, {})
    out = [trial for _ in range(6) if (trial := source.next())]
    results = [
        finished(1.0, {5: 3.0, 10: 1.0}), finished(3.0, {5: 5.0, 10: 3.0}),  # seed 1 is harder
        stopped({5: 3.5}), TrialResult("early"),
        finished(1.5, {5: 3.2, 10: 1.5}), finished(3.5, {5: 5.2, 10: 3.5}),
    ]  # fmt: skip
    states = []
    for number in (2, 3, 0, 4, 5, 1):
        source.ended(out[number].trial_id, results[number])
        states.append("".join(frozen.state.name[0] for frozen in asked(tmp_path / JOURNAL)))
    assert states == ["RRR", "RRR", "RRR", "RRR", "RRC", "CCC"]
    first, behind, third = (frozen.value for frozen in asked(tmp_path / JOURNAL))
    assert (first, third) == (2.0, 2.5)
    assert behind == pytest.approx((2.0 + 0.5 + 2.5 + 0.3) / 2), "its seed 0 against seed 0 of the others"
    attributes = [frozen.user_attrs for frozen in asked(tmp_path / JOURNAL)]
    assert attributes == [{}, {STOPPED_EARLY: {"step": 5, "values": [3.5]}}, {}]


def test_an_estimate_for_gp_is_never_the_best(tmp_path: Path) -> None:
    """Far ahead at step 5, of which nothing is known at the end."""
    search = {"algorithm": "optuna", "num_configurations": 3, "sampler": "gp"}
    results = [finished(1.0, {5: 3.0, 10: 1.0}), finished(4.0, {5: 3.0, 10: 4.0}), stopped({5: 0.0})]
    source = OptunaSearch(spec(search=search, seeds=[0]), tmp_path / JOURNAL, {})
    run_all(source, lambda trial: results[int(trial.trial_id[1:])])
    assert plain_optuna(tmp_path / JOURNAL).best_trial.number == 0
    assert asked(tmp_path / JOURNAL)[2].value == pytest.approx(1.0)


def test_without_a_finished_configuration_there_is_no_estimate(tmp_path: Path) -> None:
    search = {"algorithm": "optuna", "num_configurations": 2, "sampler": "gp"}
    run_all(OptunaSearch(spec(search=search), tmp_path / JOURNAL, {}), lambda trial: stopped({5: 3.5}))
    assert [(frozen.state, frozen.value) for frozen in asked(tmp_path / JOURNAL)] == [(TrialState.PRUNED, 3.5)] * 2


def test_tpe_ranks_what_was_stopped_below_what_finished(tmp_path: Path) -> None:
    """By Optuna's own split: those that finished come first, then the stopped ones that came furthest."""
    results = [[finished(9.0, {5: 9.0, 10: 9.0})] * 2, [stopped({5: 1.0})] * 2, [stopped({2: 0.1})] * 2]
    search = {"algorithm": "optuna", "num_configurations": 3}
    run_all(
        OptunaSearch(spec(search=search), tmp_path / JOURNAL, {}),
        lambda trial: results[int(trial.trial_id[1:]) // 2][trial.seed],
    )
    study = plain_optuna(tmp_path / JOURNAL)
    below = [_split_trials(study, study.get_trials(), count)[0] for count in (1, 2)]
    assert [[frozen.number for frozen in each] for each in below] == [[0], [0, 1]]


def test_only_an_early_stop_counts_as_one() -> None:
    def result(status: str, note: str) -> TrialResult:
        metrics = {"cfm_loss": 1.0, "ce_loss": 2.0}
        state = trial_states.TrialState("t0000", "a", status=status, step=5, metrics=metrics, note=note)
        return trial_states.trial_result(state, "cfm_loss", ["ce_loss"])

    assert result("stopped", f"{trial_states.EARLY_STOP}: behind") == TrialResult("early", 1.0, 5, (2.0,))
    assert result("stopped", "loss became nan at step 5").kind == "failed"
    assert result("finished", "").kind == "finished"
    assert result("failed", "no such file").kind == "failed"


@pytest.mark.parametrize("killed_after", range(9))
def test_a_killed_search_goes_on_with_the_same_trials(tmp_path: Path, killed_after: int) -> None:
    """Whatever had ended before the kill is not run again, and nothing that was handed out is forgotten."""
    journal, trial_results = tmp_path / JOURNAL, dict[str, TrialResult]()
    source = OptunaSearch(spec(), journal, trial_results)
    before: dict[str, Trial] = {}
    for number in range(killed_after):
        trial = source.next()
        assert trial is not None
        before[trial.trial_id] = trial
        if number < killed_after - 2:  # the last two were running
            trial_results[trial.trial_id] = rate(trial)
            if number != killed_after - 3:  # the kill came before Optuna was told
                source.ended(trial.trial_id, rate(trial))
    del source
    after = run_all(OptunaSearch(spec(), journal, trial_results), rate)
    assert is_over(spec(), storage_path(tmp_path))
    assert sorted([*trial_results, *(trial.trial_id for trial in after)]) == [f"t{number:04d}" for number in range(8)]
    for trial in after:
        assert trial.trial_id not in before or before[trial.trial_id] == trial
    assert [frozen.state for frozen in asked(journal)] == [TrialState.COMPLETE] * 4


def test_a_resumed_search_does_not_repeat_its_draws(tmp_path: Path) -> None:
    study = spec(seeds=[0], search={"algorithm": "optuna", "num_configurations": 6, "sampler": "random"})
    journal, trial_results, drawn = tmp_path / JOURNAL, dict[str, TrialResult](), []
    for _ in range(6):
        trial = OptunaSearch(study, journal, trial_results).next()
        assert trial is not None
        drawn.append(trial.run.optimizer.learning_rate)
        trial_results[trial.trial_id] = rate(trial)
    assert len(set(drawn)) == 6


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_journal_cut_off_in_the_middle_of_a_line_still_works(tmp_path: Path, cut: int) -> None:
    journal = tmp_path / JOURNAL
    source = OptunaSearch(spec(), journal, {})
    first = source.next()
    assert first is not None
    content = journal.read_bytes()
    journal.write_bytes(content[:-cut])
    Path(f"{journal}.lock").symlink_to(journal)
    done = run_all(OptunaSearch(spec(), journal, {}), rate)
    assert len({trial.trial_id for trial in done}) == len(done)
    states = [frozen.state for frozen in asked(journal)]
    assert len(states) == 4
    assert set(states) <= {TrialState.COMPLETE, TrialState.FAIL}
    assert states.count(TrialState.FAIL) <= 1


def test_a_configuration_that_breaks_a_rule_is_passed_over(tmp_path: Path) -> None:
    study = spec(
        axes={"n_samples": [1, 4], "alpha": [0.0, 1.0]},
        run={"steps": 3, "baseline": "none"},
        seeds=[0],
        search={"algorithm": "optuna", "num_configurations": 12, "sampler": "random"},
    )
    refused: list[str] = []
    source = OptunaSearch(study, tmp_path / JOURNAL, {}, lambda label, problem: refused.append(f"{label}: {problem}"))
    done = run_all(source, lambda trial: TrialResult("finished", 1.0, 3))
    assert refused
    assert all("n_samples=1 alpha=1" in line for line in refused)
    assert len(done) + len(refused) == 12
    assert [frozen.state for frozen in asked(tmp_path / JOURNAL)].count(TrialState.FAIL) == len(refused)


def test_all_kinds_of_axes_come_back_as_they_were_meant(tmp_path: Path) -> None:
    study = spec(
        axes={
            "depths": [[0.25, 0.5], [0.5]],
            "max_grad_norm": [None, 1.0],
            "n_samples": {"distribution": "integer", "low": 2, "high": 5},
            "gamma": {"distribution": "uniform", "low": 0.0, "high": 0.1},
        },
        seeds=[0],
        search={"algorithm": "optuna", "num_configurations": 10},
    )
    for trial in run_all(OptunaSearch(study, tmp_path / JOURNAL, {}), lambda trial: TrialResult("finished", 1.0, 3)):
        assert trial.run.features.depths in ((0.25, 0.5), (0.5,))
        assert trial.run.optimizer.max_grad_norm in (None, 1.0)
        assert trial.run.rollout.n_samples in range(2, 6)
        assert 0.0 <= trial.run.loss.gamma <= 0.1


def test_several_trials_can_be_out_at_once(tmp_path: Path) -> None:
    source = OptunaSearch(spec(), tmp_path / JOURNAL, {})
    out = [source.next() for _ in range(3)]
    assert [trial.trial_id for trial in out if trial] == ["t0000", "t0001", "t0002"]
    for trial in reversed(out):
        assert trial is not None
        source.ended(trial.trial_id, rate(trial))
    states = [frozen.state for frozen in asked(tmp_path / JOURNAL)]
    assert states == [TrialState.COMPLETE, TrialState.RUNNING]
    assert not is_over(spec(), storage_path(tmp_path))


def uniform_axis(sampler: str, number: int) -> StudySpec:
    return spec(
        axes={"gamma": {"distribution": "uniform", "low": 0.0, "high": 1.0}},
        seeds=[0],
        baselines={},
        search={"algorithm": "optuna", "num_configurations": number, "sampler": sampler, "search_seed": 3},
    )


def gammas(done: list[Trial]) -> list[float]:
    return [trial.run.loss.gamma for trial in done]


def test_qmc_puts_one_configuration_in_each_of_sixteen_equal_parts_also_when_it_is_resumed(tmp_path: Path) -> None:
    study, trial_results, done = uniform_axis("qmc", 17), dict[str, TrialResult](), list[Trial]()
    while len(done) < 17:
        # A new driver after every fifth configuration.
        source = OptunaSearch(study, tmp_path / JOURNAL, trial_results)
        for _ in range(min(5, 17 - len(done))):
            trial = source.next()
            assert trial is not None
            done.append(trial)
            trial_results[trial.trial_id] = TrialResult("finished", 1.0, 3)
            source.ended(trial.trial_id, trial_results[trial.trial_id])
    # Optuna learns from the first one what there is to spread over.
    assert sorted(int(gamma * 16) for gamma in gammas(done[1:])) == list(range(16))


@pytest.mark.parametrize(("sampler", "number"), [("tpe", 60), ("gp", 24)])
def test_a_model_of_the_objective_finds_its_minimum_closer_than_chance(
    tmp_path: Path, sampler: str, number: int
) -> None:
    def distance(gamma: float) -> float:
        return (gamma - 0.3) ** 2

    def rated(trial: Trial) -> TrialResult:
        return TrialResult("finished", distance(trial.run.loss.gamma), 3)

    late = {
        name: gammas(run_all(OptunaSearch(uniform_axis(name, number), tmp_path / name, {}), rated))[number // 2 :]
        for name in (sampler, "random")
    }
    means = {name: sum(map(distance, found)) / len(found) for name, found in late.items()}
    assert means[sampler] < 0.5 * means["random"]


# --- conditions and exclusions ---------------------------------------------------------------------------------

CONDITIONAL: dict[str, Any] = {
    "axes": {
        "whitening": ["none", "variant_i"],
        "n_samples": {"distribution": "log_integer", "low": 2, "high": 8, "when": {"whitening": "variant_i"}},
        "gamma": {"distribution": "uniform", "low": 0.0, "high": 0.3, "step": 0.1},
        "size": {"choices": {"small": {"batch_size": 4}, "large": {"batch_size": 8}}},
    },
    "seeds": [0],
}
ANY = TrialResult("finished", 1.0, 3)


def exists_as_it_should(trial: Trial) -> bool:
    return ("n_samples=" in trial.label) == (trial.run.reward.whitening == "variant_i")


@pytest.mark.parametrize("sampler", ["tpe", "gp", "qmc", "random"])
def test_every_sampler_suggests_axes_only_where_they_exist(tmp_path: Path, sampler: str) -> None:
    study = spec(**CONDITIONAL, search={"algorithm": "optuna", "num_configurations": 16, "sampler": sampler})
    done = run_all(
        OptunaSearch(study, tmp_path / JOURNAL, {}), lambda trial: TrialResult("finished", trial.run.loss.gamma, 3)
    )
    assert len(done) == 16
    assert all(map(exists_as_it_should, done))
    assert {trial.run.reward.whitening for trial in done} == {"none", "variant_i"}
    assert {trial.run.loss.gamma for trial in done} <= {0.0, 0.1, 0.2, 0.3}
    assert {trial.run.training.batch_size for trial in done} == {4, 8}
    for frozen, trial in zip(asked(tmp_path / JOURNAL), done, strict=True):
        assert ("rollout.n_samples" in frozen.params) == (trial.run.reward.whitening == "variant_i")


def test_a_conditional_search_goes_on_with_the_same_trials(tmp_path: Path) -> None:
    study = spec(**CONDITIONAL, search={"algorithm": "optuna", "num_configurations": 6, "sampler": "random"})
    source = OptunaSearch(study, tmp_path / JOURNAL, {})
    before = {trial.trial_id: trial for _ in range(4) if (trial := source.next())}
    del source
    after = run_all(OptunaSearch(study, tmp_path / JOURNAL, {}), lambda trial: ANY)
    assert {trial.trial_id: trial for trial in after[:4]} == before
    assert len(after) == 6


@pytest.mark.parametrize("sampler", ["tpe", "gp", "qmc", "random", "nsga2"])
@pytest.mark.parametrize("known", [False, True])
def test_a_driver_that_ends_while_asking_finishes_it_in_its_next_session(
    tmp_path: Path, sampler: str, known: bool
) -> None:
    """Killed after every line of the journal: the same number of configurations, and those known beforehand, run."""
    point = {"whitening": "variant_i", "n_samples": 4, "gamma": 0.3, "size": "small"}
    search = {"algorithm": "optuna", "num_configurations": 2, "sampler": sampler, "known": [point] if known else []}
    study = spec(**CONDITIONAL, search=search)
    OptunaSearch(study, tmp_path / JOURNAL, {}).next()
    lines = (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)
    for number in range(1, len(lines)):
        (tmp_path / JOURNAL).write_bytes(b"".join(lines[:number]))
        done = run_all(OptunaSearch(study, tmp_path / JOURNAL, {}), lambda trial: ANY)
        assert [trial.trial_id for trial in done] == ["t0000", "t0001"], number
        assert all(map(exists_as_it_should, done))
        assert [frozen.state for frozen in asked(tmp_path / JOURNAL)] == [TrialState.COMPLETE] * 2
        if known:
            assert done[0].run.loss.gamma == 0.3
            assert done[0].run.rollout.n_samples == 4


def test_a_journal_that_cannot_be_read_or_written_ends_the_study_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = spec(seeds=[0], search={"algorithm": "optuna", "num_configurations": 2})
    search = OptunaSearch(study, tmp_path / JOURNAL, {})
    trial = search.next()
    assert trial is not None

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(JournalFileBackend, "read_logs", fail)
    monkeypatch.setattr(JournalFileBackend, "append_logs", fail)
    for use in (search.next, lambda: search.ended(trial.trial_id, ANY), lambda: search.exhausted):
        with pytest.raises(StorageError, match=r"optuna.journal: .*Input/output error"):
            use()
    with pytest.raises(StorageError, match="Input/output error"):
        OptunaSearch(study, tmp_path / JOURNAL, {})


@pytest.mark.parametrize("sampler", ["tpe", "gp", "qmc", "random"])
def test_excluded_suggestions_cost_no_place_and_asking_ends(tmp_path: Path, sampler: str) -> None:
    """One configuration of twenty is left: most suggestions are excluded, many times in a row."""
    study = spec(
        axes={"alpha": [0.0, 0.25, 0.5, 0.75, 1.0], "gamma": [0.0, 0.1, 0.2, 0.3]},
        exclude=[{"alpha": [0.0, 0.25, 0.5, 0.75]}, {"gamma": [0.0, 0.1, 0.3]}],
        seeds=[0],
        search={"algorithm": "optuna", "num_configurations": 3, "sampler": sampler},
    )
    trial_results: dict[str, TrialResult] = {}
    done: list[Trial] = []
    while not is_over(study, storage_path(tmp_path)):  # a new driver for every trial
        source = OptunaSearch(study, tmp_path / JOURNAL, trial_results)
        trial = source.next()
        assert trial is not None
        done.append(trial)
        trial_results[trial.trial_id] = ANY
        source.ended(trial.trial_id, ANY)
    assert [(trial.run.reward.alpha, trial.run.loss.gamma) for trial in done] == [(1.0, 0.2)] * 3
    states = [frozen.state for frozen in asked(tmp_path / JOURNAL)]
    assert states.count(TrialState.COMPLETE) == 3
    assert states.count(TrialState.PRUNED) == len(states) - 3 <= 3 * 10
    assert OptunaSearch(study, tmp_path / JOURNAL, trial_results).exhausted
