"""Populations without a cluster: who exploits whom, taking turns, and what a resumed study knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.tune import CheckpointConfig
from ray.tune.schedulers import TrialScheduler

from ebft_study.config import RunConfig, short_name
from ebft_study.results import StudyRecorder, TrialRecorder
from ebft_study.results.lineage import EXPLOIT, lineage
from ebft_study.study.folder import attempts
from ebft_study.study.folder.trial_states import TrialResult
from ebft_study.study.population import exploit
from ebft_study.study.population.exploit import LastScore, Lineage
from ebft_study.study.population.pbt import Populations
from ebft_study.study.search.listed import PopulationSearch
from ebft_study.study.spec import normalize, trials
from ebft_study.study.spec.study_spec import ObjectiveSpec, StudySpec
from ebft_study.training import checkpoint
from tests.studies import task_of

STEPS, INTERVAL = 40, 10
CONTINUES, PAUSES, EXPLOITS = TrialScheduler.CONTINUE, TrialScheduler.PAUSE, TrialScheduler.NOOP


def spec(**changes: Any) -> StudySpec:
    content = {
        "study": "s",
        "question": "q",
        "run": {"steps": STEPS, "eval_every_steps": 5, "checkpoint_every_steps": 5},
        "axes": {"learning_rate": [1e-4, 2e-4, 4e-4, 8e-4]},
        "baselines": {"sft": {"method": "sft"}},
        "scheduler": {"kind": "pbt", "perturbation_interval_steps": INTERVAL, "quantile_fraction": 0.25},
        **changes,
    }
    return normalize.from_record(content, source="test")


class Manager:
    """Tune's memory of a trial's checkpoints."""

    checkpoint_config = CheckpointConfig(num_to_keep=3)


class TuneTrial:
    """A trial as Tune hands it over."""

    def __init__(self, folder: Path, trial: trials.Trial, lineage: Lineage | None = None) -> None:
        changes = {"settings": lineage.settings, "lineage": asdict(lineage)} if lineage else {}
        self.config = task_of(trial, total_steps=STEPS, **changes).to_config()
        self.trial_id, self.status, self.experiment_tag = f"tune-{trial.trial_id}", "RUNNING", ""
        self.run_metadata = type("Metadata", (), {"checkpoint_manager": Manager()})()
        self.folder, self.attempt = folder, 0
        self.start()

    def __repr__(self) -> str:
        return str(self.config["trial_id"])

    def is_finished(self) -> bool:
        return self.status == "TERMINATED"

    def set_config(self, config: dict[str, Any]) -> None:
        self.config = config

    def set_experiment_tag(self, tag: str) -> None:
        self.experiment_tag = tag

    # what the trial's own process does

    def start(self) -> int | None:
        """Begin an attempt; returns the step that it starts from."""
        name = self.config["trial_id"]
        found = exploit.start_from(self.folder, name, self.config["lineage"])
        self.attempt = attempts.begin(self.folder, name)
        self.status = "RUNNING"
        self.weights = checkpoint.load(found)["weights"] if found else torch.tensor([float(name[1:]), 0.0])
        return checkpoint.step_of(found) if found else None

    def save(self, step: int) -> Path:
        own = Path(self.folder, "train", f"{self.config['trial_id']}-{self.attempt}", attempts.checkpoint_name(step))
        own.mkdir()
        self.weights = self.weights + torch.tensor([0.0, 1.0])
        checkpoint.save(own, {"step": step, "weights": self.weights}, step=step)
        return own


class Cluster:
    """A study's folder, its trials in Tune's hands, and the scheduler."""

    def __init__(self, folder: Path, study: StudySpec, *, slots: int = 8) -> None:
        self.folder, self.spec, self.recorder = folder, study, StudyRecorder(folder, study="s")
        self.released: list[tuple[str, int]] = []
        self.scheduler = Populations(
            study, folder, self, warm_start_steps=study.run.get("training", {}).get("warm_start_steps", 0),
            slots=slots, released=lambda trial_id, attempt: self.released.append((trial_id, attempt)),
        )  # fmt: skip
        lines = exploit.lineages(folder)
        listed = trials.trials_of(study, trials.enumerated(study))
        self.trials = {t.trial_id: TuneTrial(folder, t, lines.get(t.trial_id)) for t in listed}
        for trial in self.trials.values():
            self.scheduler.on_trial_add(self, trial)

    # Tune's controller

    search_alg = object()

    def get_trials(self) -> list[TuneTrial]:
        return list(self.trials.values())

    def pause_trial(self, trial: TuneTrial, should_checkpoint: bool = True) -> None:
        trial.status = "PAUSED"

    # the monitor

    def exploited(self, trial_id: str, attempt: int, details: Mapping[str, Any]) -> None:
        self.recorder.event(EXPLOIT, "", trial_id=trial_id, attempt=attempt, **details)

    def paused(self, trial_id: str, attempt: int) -> None: ...

    # a trial reports

    def report(self, name: str, step: int, value: float, *, saved: bool = True) -> str:
        trial = self.trials[name]
        recorder = TrialRecorder(self.folder, study="s", trial_id=name, attempt=trial.attempt)
        recorder.metrics(step, {"cfm_loss": value})
        if saved:
            trial.save(step)
        result = {"step": float(step), "cfm_loss": value, "attempt": trial.attempt}
        decision = self.scheduler.on_trial_result(self, trial, result)
        if decision == PAUSES:
            self.pause_trial(trial)
        return str(decision)

    def taken(self) -> list[dict[Any, Any]]:
        return lineage(self.folder).to_dict("records") if (self.folder / "results" / "events").exists() else []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    return tmp_path


def measure_all(cluster: Cluster, step: int = INTERVAL) -> list[str]:
    """t0001 is the best and t0004 the worst, which reports last."""
    return [cluster.report(f"t000{i}", step, float(i)) for i in range(1, 5)]


def test_the_worst_continues_from_the_best_with_its_weights_and_settings_of_its_kind(folder: Path) -> None:
    cluster = Cluster(folder, spec())
    assert measure_all(cluster) == [CONTINUES, CONTINUES, CONTINUES, EXPLOITS]
    (row,) = cluster.taken()
    assert (row["trial_id"], row["donor"], row["step"], row["donor_step"]) == ("t0004", "t0001", INTERVAL, INTERVAL)
    assert (row["score"], row["donor_score"]) == (4.0, 1.0)
    assert (row["before"], row["after"]["learning_rate"] in (1e-4, 2e-4, 4e-4, 8e-4)) == ({"learning_rate": 8e-4}, True)
    worst, best = cluster.trials["t0004"], cluster.trials["t0001"]
    assert worst.config["run"]["optimizer"]["learning_rate"] == row["after"]["learning_rate"]
    assert worst.config["run"]["name"] == "t0004"  # it stays who it is
    assert cluster.released == [("t0004", 1)]
    assert worst.start() == INTERVAL
    assert torch.equal(worst.weights, best.weights)
    assert worst.attempt == row["attempt"] + 1


def test_nobody_is_judged_before_everybody_was_measured(folder: Path) -> None:
    cluster = Cluster(folder, spec())
    assert [cluster.report(name, INTERVAL, value) for name, value in (("t0004", 9.0), ("t0001", 1.0))] == [
        CONTINUES
    ] * 2
    assert cluster.report("t0002", INTERVAL, 2.0) == CONTINUES
    assert cluster.taken() == []
    cluster.trials["t0003"].status = "TERMINATED"  # it failed, and is not waited for
    assert cluster.report("t0004", 2 * INTERVAL, 9.0) == EXPLOITS


def test_equals_do_not_exploit_each_other(folder: Path) -> None:
    cluster = Cluster(folder, spec())
    assert [cluster.report(f"t000{i}", INTERVAL, 1.0) for i in range(1, 5)] == [CONTINUES] * 4


def test_between_intervals_in_the_warm_start_and_at_the_end_nothing_happens(folder: Path) -> None:
    cluster = Cluster(folder, spec(run={**spec().run["training"], "warm_start_steps": 10, "steps": STEPS - 10}))
    for step in (5, 10, 15):  # the warm start ends at 10
        assert [cluster.report(f"t000{i}", step, float(i)) for i in range(1, 5)] == [CONTINUES] * 4
    assert measure_all(cluster, 20)[-1] == EXPLOITS
    assert cluster.report("t0003", STEPS, 99.0) == CONTINUES


def test_baselines_neither_give_nor_take(folder: Path) -> None:
    cluster = Cluster(folder, spec())
    assert cluster.report("t0000", INTERVAL, 0.01) == CONTINUES
    measure_all(cluster)
    assert cluster.taken()[0]["donor"] == "t0001"
    assert cluster.report("t0000", 2 * INTERVAL, 99.0) == CONTINUES


def test_a_value_that_is_not_finite_is_passed_over(folder: Path) -> None:
    cluster = Cluster(folder, spec())
    assert cluster.report("t0001", INTERVAL, float("nan")) == CONTINUES
    assert [cluster.report(f"t000{i}", INTERVAL, float(i)) for i in (2, 3, 4)] == [CONTINUES] * 3


def test_seeds_are_populations_of_their_own(folder: Path) -> None:
    cluster = Cluster(folder, spec(seeds=[0, 1], baselines={}), slots=8)
    for name in (f"t000{i}" for i in range(4)):
        cluster.report(name, INTERVAL, 1.0)  # all of seed 0, better than all of seed 1
    for i in range(4, 8):
        cluster.report(f"t000{i}", INTERVAL, float(i))
    assert [(row["trial_id"], row["donor"]) for row in cluster.taken()] == [("t0007", "t0004")]


def test_trials_take_turns_where_there_are_more_of_them_than_slots(folder: Path) -> None:
    cluster = Cluster(folder, spec(baselines={}), slots=2)
    names = [f"t000{i}" for i in range(4)]
    for name in names[1:]:
        cluster.trials[name].status = "PENDING"
    assert cluster.report("t0000", 5, 1.0) == CONTINUES
    assert cluster.report("t0000", INTERVAL, 1.0) == PAUSES
    assert repr(cluster.scheduler.choose_trial_to_run(cluster)) == "t0001"  # the furthest behind
    done = dict.fromkeys(names, 0) | {"t0000": INTERVAL}
    for _ in range(20):  # one slot: whoever the scheduler chooses does one interval
        chosen = cluster.scheduler.choose_trial_to_run(cluster)
        if chosen is None:
            break
        first = chosen.start() or 0
        step = (first // INTERVAL + 1) * INTERVAL
        done[repr(chosen)] = step
        if cluster.report(repr(chosen), step, 1.0, saved=step < STEPS) == CONTINUES and step == STEPS:
            chosen.status = "TERMINATED"
        assert max(done.values()) - min(done.values()) <= 2 * INTERVAL
    assert done == dict.fromkeys(names, STEPS)


def test_with_room_for_all_nobody_waits(folder: Path) -> None:
    cluster = Cluster(folder, spec(baselines={}), slots=4)
    cluster.trials["t0003"].status = "PENDING"  # about to start
    assert cluster.report("t0000", INTERVAL, 1.0) == CONTINUES


# --- what is on disk -------------------------------------------------------------------------------------------


def test_the_newest_complete_checkpoint_of_the_donor_is_taken(folder: Path) -> None:
    cluster = Cluster(folder, spec())
    for i in range(1, 4):
        cluster.report(f"t000{i}", INTERVAL, float(i))
    best = cluster.trials["t0001"]
    best.save(15)
    next(best.save(20).glob("*.safetensors")).write_bytes(b"half")
    cluster.report("t0004", INTERVAL, 4.0)
    assert cluster.taken()[0]["donor_step"] == 15
    assert cluster.trials["t0004"].start() == 15


def test_a_donor_without_any_checkpoint_gives_nothing(folder: Path) -> None:
    cluster = Cluster(folder, spec())
    cluster.report("t0001", INTERVAL, 1.0, saved=False)
    for i in range(2, 5):
        assert cluster.report(f"t000{i}", INTERVAL, float(i)) == CONTINUES
    assert cluster.taken() == []


def test_what_was_taken_outlives_the_donors_own_copy(folder: Path) -> None:
    cluster = Cluster(folder, spec())
    measure_all(cluster)
    weights = cluster.trials["t0001"].weights
    for path in folder.glob("train/t0001-*/checkpoint_*/*"):
        path.unlink()
    worst = cluster.trials["t0004"]
    worst.start()
    assert torch.equal(worst.weights, weights)


def test_a_trial_never_goes_back_to_its_own_past(folder: Path) -> None:
    """A driver killed between record and checkpoint: the donor's newest instead; and none at all is an error."""
    cluster = Cluster(folder, spec())
    measure_all(cluster)
    worst, best = cluster.trials["t0004"], cluster.trials["t0001"]
    cluster.trials["t0004"].save(35)  # by an old attempt that was still dying
    (folder / cluster.taken()[0]["checkpoint"] / checkpoint.RECORD).unlink()
    best.save(15)
    assert worst.start() == 15
    for path in folder.glob("train/t0001-*/checkpoint_*/*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="t0001 has no other"):
        worst.start()


def test_of_the_lineages_that_a_trial_has_left_only_the_last_checkpoints_stay(folder: Path) -> None:
    own = [folder / "train" / f"t0001-{attempts.begin(folder, 't0001')}" for _ in range(4)]
    for step, path in zip((5, 10, 15), (own[0], own[1], own[3]), strict=True):
        (path / "checkpoint").mkdir()
        checkpoint.save(path / "checkpoint", {"step": step}, step=step)
    attempts.prune(
        folder, "t0001", RunConfig().checkpoint.model_copy(update={"keep_checkpoints": 1}), ObjectiveSpec(), since=4
    )
    assert [len(list(path.iterdir())) for path in own] == [0, 1, 0, 1]


def test_what_a_killed_driver_left_half_done_is_removed(folder: Path) -> None:
    (folder / "train" / ".takeover-t0001").mkdir(parents=True)
    (folder / "train" / "t0001-1").mkdir()
    exploit.remove_unfinished(folder)
    assert [path.name for path in (folder / "train").iterdir()] == ["t0001-1"]


# --- resuming --------------------------------------------------------------------------------------------------


def test_a_resumed_population_is_where_it_was(folder: Path) -> None:
    """A new driver that has the tables alone decides as the old one would have."""
    first = Cluster(folder, spec())
    measure_all(first)
    first.trials["t0004"].start()
    first.report("t0004", 15, 0.7)
    second = Cluster(folder, spec())
    worst = second.trials["t0004"]
    assert worst.config["settings"] == first.trials["t0004"].config["settings"]
    assert worst.config["lineage"]["donor"] == "t0001"
    for name in ("t0001", "t0002", "t0003", "t0004"):
        states = [c.scheduler._of_seed[0]._trial_state[c.trials[name]] for c in (first, second)]
        assert states[0].last_score == states[1].last_score
        assert states[0].last_perturbation_time == states[1].last_perturbation_time == INTERVAL
    # Everybody was measured before, so the first report is judged.
    assert second.report("t0003", 2 * INTERVAL, 9.0) == EXPLOITS
    assert second.taken()[-1]["trial_id"] == "t0003"


def test_a_trial_that_went_back_is_compared_at_the_next_interval_and_its_former_steps_are_not_its_own(
    folder: Path,
) -> None:
    """The worst is at step 20, the donor's checkpoint of step 15."""
    cluster = Cluster(folder, spec())
    for i in range(1, 4):
        cluster.report(f"t000{i}", INTERVAL, float(i))
    cluster.trials["t0001"].save(15)
    assert cluster.report("t0004", 2 * INTERVAL, 4.0) == EXPLOITS
    scores = exploit.last_scores(folder, metric="cfm_loss", interval=INTERVAL, after=0)
    assert scores["t0004"] == LastScore(15, 4.0)
    assert cluster.trials["t0004"].start() == 15
    assert cluster.report("t0004", 2 * INTERVAL, 5.0) == EXPLOITS


def test_no_exploit_is_drawn_again(folder: Path) -> None:
    study = spec(axes={"gamma": {"distribution": "uniform", "low": 0.0, "high": 1.0}}, search={
        "algorithm": "random", "num_configurations": 4}, scheduler={
        "kind": "pbt", "perturbation_interval_steps": INTERVAL, "resample_probability": 1.0})  # fmt: skip
    drawn = []
    for step in (INTERVAL, 2 * INTERVAL, 3 * INTERVAL):
        cluster = Cluster(folder, study)  # a new driver each time
        measure_all(cluster, step)
        drawn.append(cluster.trials["t0004"].config["settings"]["loss.gamma"])
    assert len(set(drawn)) == 3
    assert [row["after"][short_name("loss.gamma")] for row in cluster.taken()] == drawn


def test_a_new_population_begins_when_slots_are_free() -> None:
    study = spec(seeds=[0, 1], baselines={})
    source = PopulationSearch(trials.trials_of(study, trials.enumerated(study)), slots=2)
    out = [source.next() for _ in range(5)]
    assert [trial and trial.seed for trial in out] == [0, 0, 0, 0, None]
    for trial in out[:3]:
        assert trial
        source.ended(trial.trial_id, TrialResult("finished", 1.0, STEPS))
    rest = [source.next() for _ in range(5)]
    assert [trial and trial.seed for trial in rest] == [1, 1, 1, 1, None]
    assert source.exhausted
