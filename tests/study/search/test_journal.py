"""Optuna's journal in a study: damaged, gone, or of a study in a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ebft_study import config, results
from ebft_study.errors import ConfigError
from ebft_study.storage import StoragePath, storage_path
from ebft_study.study.folder.trial_states import TrialResult
from ebft_study.study.search import journal
from ebft_study.study.search.optuna_search import OptunaSearch
from ebft_study.study.spec import normalize
from ebft_study.study.spec.study_spec import StudySpec
from ebft_study.study.spec.trials import Trial

SPEC: dict[str, Any] = {
    "study": "s",
    "question": "Why?",
    "run": {"steps": 4},
    "axes": {
        "learning_rate": {"distribution": "log_uniform", "low": 1e-5, "high": 1e-2},
        "n_samples": {"distribution": "integer", "low": 2, "high": 8},
        "depths": [[0.5], [0.25, 0.75]],
        "alpha": [0.0, 1.0],
    },
    "baselines": {"sft": {"method": "sft"}},
    "seeds": [0, 1],
    "search": {"algorithm": "optuna", "num_configurations": 5, "sampler": "random"},
}


RICH: dict[str, Any] = {
    "axes": {
        "size": {"choices": {"small": {"n_samples": 2}, "large": {"n_samples": 8, "batch_size": 4}}},
        "whitening": ["none", "variant_i"],
        "alpha": {"values": [0.0, 0.5, 1.0], "when": {"whitening": ["variant_i"]}},
    },
    "exclude": [{"size": "large", "whitening": "none"}],
    "search": {"algorithm": "optuna", "num_configurations": 12, "sampler": "random", "search_seed": 1},
}


def spec(**changes: Any) -> StudySpec:
    return normalize.from_record(SPEC | changes, source="test")


def begin(folder: StoragePath, *, trials: int = 8, **changes: Any) -> tuple[Path, list[Any]]:
    """A search of which three configurations are on record (or as many as that many trials have), the first ended."""
    working = journal.download(folder)
    search = OptunaSearch(spec(**changes), working, {}, on_change=lambda: journal.upload(folder))
    handed = [search.next() for _ in range(trials)]
    recorder = results.StudyRecorder(folder, study="s")
    for trial in handed:
        assert trial is not None
        settings = config.flatten(trial.run)
        row = {"trial_id": trial.trial_id, "status": "pending", "attempt": 0, "hyperparameters": settings}
        recorder.trial({**row, "configuration": trial.configuration.label})
    for trial_id in ("t0002", "t0003"):
        search.ended(trial_id, TrialResult("finished", 1.0, 4))
    return working, handed


def resume(folder: StoragePath, **changes: Any) -> tuple[str, dict[str, Any]]:
    working = journal.download(folder)
    trial_results = {trial_id: TrialResult("finished", 1.0, 4) for trial_id in ("t0000", "t0001", "t0002", "t0003")}
    problem = journal.repair(spec(**changes), working, results.read_table(folder, "trials"), trial_results)
    again = OptunaSearch(spec(**changes), working, trial_results)
    left = {}
    while (trial := again.next()) is not None:
        left[trial.trial_id] = trial
    return problem, left


@pytest.mark.parametrize("damage", ["nothing", "half a last line", "garbage", "flipped value", "gone", "line missing"])
def test_a_damaged_journal_continues_with_the_same_trials(tmp_path: Path, damage: str) -> None:
    working, handed = begin(storage_path(tmp_path))
    content = working.read_bytes()
    lines = content.splitlines(keepends=True)
    working.write_bytes(
        {
            "nothing": content,
            "half a last line": content + b'{"op_code": 4, "wor',
            "garbage": b"".join([*lines[:4], b"\x00\xff garbage\n", *lines[5:]]),
            "flipped value": content.replace(b'"param_value_internal":', b'"param_value_internal":1', 1),
            "gone": b"",
            "line missing": b"".join(lines[:3] + lines[4:]),
        }[damage]
    )
    if damage == "gone":
        working.unlink()
    problem, left = resume(storage_path(tmp_path))
    assert bool(problem) == (damage not in ("nothing", "half a last line")), problem
    assert len(left) == 8, "five configurations over two seeds, one of them ended"
    for trial in handed:
        if trial.trial_id in left:
            assert left[trial.trial_id].configuration == trial.configuration
    asked = journal.open_study(spec(), working).get_trials()
    assert len(asked) == 5
    assert asked[0].value == 1.0


@pytest.mark.parametrize("gone", [False, True], ids=["whole", "gone"])
def test_choices_conditions_and_exclusions_survive_the_loss_of_a_journal(tmp_path: Path, gone: bool) -> None:
    working, handed = begin(storage_path(tmp_path), trials=2 + 2 * 9, **RICH)
    before = [frozen.params for frozen in journal.open_study(spec(**RICH), working).get_trials()]
    excluded = [
        n
        for n, params in enumerate(before)
        if (params["size"], params[config.resolve_key("whitening")]) == ("large", "none")
    ]
    assert excluded, "the test needs a suggestion that is excluded"
    if gone:
        working.unlink()
    problem, left = resume(storage_path(tmp_path), **RICH)
    assert bool(problem) == gone
    for trial in handed:
        if trial.trial_id in left:
            assert left[trial.trial_id].configuration == trial.configuration
    assert len(left) == 2 * (12 - 1), "twelve configurations over two seeds, one of them ended"
    after = [frozen.params for frozen in journal.open_study(spec(**RICH), working).get_trials()][: len(before)]
    assert [{} if n in excluded and gone else params for n, params in enumerate(before)] == after


@pytest.mark.parametrize("sampler", ["tpe", "gp", "qmc", "random"])
def test_after_the_loss_of_a_journal_no_sampler_repeats_a_configuration(tmp_path: Path, sampler: str) -> None:
    search = {**SPEC["search"], "num_configurations": 8, "sampler": sampler}
    working, handed = begin(storage_path(tmp_path), search=search)
    working.unlink()
    _, left = resume(storage_path(tmp_path), search=search)
    labels = [trial.configuration.label for trial in (handed[2], handed[3], *left.values())]
    assert len(set(labels)) == 8


def test_a_journal_that_ends_with_an_enqueued_trial_continues(tmp_path: Path) -> None:
    """A driver that was killed between the two steps of asking for a certain configuration."""
    working, _ = begin(storage_path(tmp_path), trials=4)
    journal.open_study(spec(), working).enqueue_trial({"alpha": 1.0})
    problem, left = resume(storage_path(tmp_path))
    assert problem == ""
    states = [frozen.state.name for frozen in journal.open_study(spec(), working).get_trials()]
    assert states == ["COMPLETE", *["RUNNING"] * 4]
    assert len(left) == 2 * 4


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_failed_trials_run_again_and_optuna_gets_their_new_results(tmp_path: Path, sampler: str) -> None:
    """Optuna takes no result back, so the journal is rebuilt; the results of all others stay as they were."""
    search = {**SPEC["search"], "sampler": sampler, **({"population_size": 4} if sampler == "nsga2" else {})}
    objectives = [{"metric": name, "mode": "min"} for name in ("ce_loss", "cfm_loss")]
    study = spec(search=search, objective=objectives if sampler == "nsga2" else objectives[0])
    folder, seen, handed = storage_path(tmp_path), dict[str, TrialResult](), dict[str, Trial]()

    def result(trial: Trial, value: float = 1.0) -> TrialResult:
        return TrialResult("finished", value, 4, (2.0,) if sampler == "nsga2" else ())

    first = OptunaSearch(study, journal.download(folder), seen)
    recorder = results.StudyRecorder(folder, study="s")
    while (trial := first.next()) is not None:
        handed[trial.trial_id] = trial
        seen[trial.trial_id] = TrialResult("failed") if trial.trial_id == "t0005" else result(trial)
        row = {"trial_id": trial.trial_id, "status": "finished", "attempt": 1}
        recorder.trial(row | {"configuration": trial.configuration.label, "hyperparameters": config.flatten(trial.run)})
        first.ended(trial.trial_id, seen[trial.trial_id])
    rows, path = results.read_table(folder, "trials"), journal.working_copy(folder)
    assert not journal.repair(study, path, rows, seen), "nothing runs again"
    assert [t.state.name for t in journal.open_study(study, path).get_trials()] == [
        "COMPLETE", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"
    ]  # fmt: skip

    del seen["t0005"]
    assert "holds the results of t0005" in journal.repair(study, path, rows, seen)
    again = OptunaSearch(study, path, seen)
    left = again.next()
    assert left is not None
    assert (left.trial_id, left.configuration) == ("t0005", handed["t0005"].configuration)
    assert again.next() is None
    again.ended("t0005", result(left, 3.0))
    asked = journal.open_study(study, path).get_trials()
    assert [frozen.values[0] for frozen in asked] == [1.0, 2.0, 1.0, 1.0, 1.0]
    assert journal.is_over(study, folder)
    assert not journal.repair(study, path, rows, seen | {"t0005": result(left, 3.0)})


def test_a_garbled_journal_is_not_over(tmp_path: Path) -> None:
    working, _ = begin(storage_path(tmp_path))
    before = working.read_bytes()
    assert not journal.is_over(spec(), storage_path(tmp_path))
    assert working.read_bytes() == before, "a driver may be writing"
    working.write_bytes(b"garbage\n" + working.read_bytes())
    assert not journal.is_over(spec(), storage_path(tmp_path))


def test_in_a_store_the_journal_is_fetched_and_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_query: str
) -> None:
    folder = storage_path(f"s3://studies/journal?{s3_query}")
    monkeypatch.setenv("EBFT_STUDY_CACHE", str(tmp_path / "one"))
    working, handed = begin(folder)
    assert (folder / journal.JOURNAL).read_bytes() == working.read_bytes()
    monkeypatch.setenv("EBFT_STUDY_CACHE", str(tmp_path / "two"))  # another machine
    problem, left = resume(folder)
    assert problem == ""
    assert left["t0004"].configuration == handed[4].configuration
    assert not journal.is_over(spec(), folder)


@pytest.mark.parametrize("journal_is_there", [True, False])
def test_axes_that_lack_what_trials_have_are_refused(tmp_path: Path, journal_is_there: bool) -> None:
    """Somebody has edited study.yaml."""
    folder = storage_path(tmp_path)
    path, _ = begin(folder)
    if not journal_is_there:
        path.unlink()
    edited = spec(axes={**SPEC["axes"], "alpha": [0.3, 0.7]})
    with pytest.raises(ConfigError, match=r"axes: do not hold .*, which trial t0.* has. Put back the values"):
        journal.repair(edited, path, results.read_table(folder, "trials"), set())
