"""The answer with which a report opens, on studies of known outcome."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ebft_study.analysis.summary import StudySummary, summarize
from ebft_study.report import answers, conclusion
from ebft_study.results import load
from ebft_study.study.driver.export import best_trial
from ebft_study.study.folder import attempts
from tests.synthetic_study import PAPER_LIKE, Effect, write_study

FIRST: dict[Any, Effect] = {(1.0, 0.0): (0.0, -0.3), (0.5, 0.0): (0.0, -0.1), (0.0, 0.0): (0.0, 0.1)}
"""Of alpha alone; SFT is between the first two."""
SFT: dict[Any, Effect] = {None: (-0.1, -0.2)}


def of(folder: Path, effects: dict[Any, Effect], **options: Any) -> StudySummary:
    return summarize(load(write_study(folder, effects=effects, **options)))


def only(study: StudySummary) -> conclusion.Conclusion:
    (found,) = conclusion.conclusions(study)
    return found


def difference(sentence: str, before: str) -> float:
    found = re.search(rf"{re.escape(before)}: ([−+][\d.]+) \(95 % interval", sentence)
    assert found, sentence
    return float(found[1].replace("−", "-"))


def test_the_setting_that_moves_the_objective_is_told_with_what_was_put_in(tmp_path: Path) -> None:
    found = only(of(tmp_path / "s", {**FIRST, **SFT}, noise=0.004))
    assert found.title == "Held-out CFM (cfm_loss), lower is better"
    assert difference(found.moves, "α moves it") == pytest.approx(-0.4, abs=0.02)
    assert " with α=1 instead of α=0." in found.moves
    assert "Holm's correction is for 2 comparisons." in found.moves


def test_two_settings_are_ordered_by_what_they_do_and_one_without_effect_is_left_open(tmp_path: Path) -> None:
    effects = {(a, g): (0.0, -0.3 * a - 0.05 * (g > 0)) for a, g in itertools.product((0.0, 1.0), (0.0, 0.1))}
    moved = only(of(tmp_path / "s", effects, noise=0.002)).moves
    assert re.match(r"α moves it: −0\.[23].*; γ moves it: −0\.0\S+ .* with γ=0\.1 instead of γ=0\.", moved)
    flat = {(a, g): (0.0, -0.3 * a) for a, g in itertools.product((0.0, 1.0), (0.0, 0.1))}
    moved = only(of(tmp_path / "t", flat)).moves
    assert re.match(r"α moves it: .*\. Whether γ moves it cannot be told: ", moved)


def test_an_effect_that_a_single_comparison_sees_is_not_told_after_the_correction(tmp_path: Path) -> None:
    """Four comparisons: without the correction a middling effect would be told."""
    seen = set()
    for size in (0.002, 0.003, 0.004, 0.005, 0.006):
        effects = {key: (0.0, size * key[0]) if key else (0.0, 0.0) for key in PAPER_LIKE}
        moved = only(of(tmp_path / str(size), effects)).moves
        shown = re.search(r"([Ww]hether )?α moves it.*?: \S+ \(95 % interval (\S+) to (\S+),", moved)
        assert shown, moved
        excludes_zero = (float(shown[2].replace("−", "-")) > 0) or (float(shown[3].replace("−", "-")) < 0)
        seen.add((excludes_zero, not shown[1]))
    assert (True, False) in seen
    assert (False, True) not in seen


def test_the_best_is_told_from_the_next_and_from_baselines_or_cannot_be(tmp_path: Path) -> None:
    (part,) = only(of(tmp_path / "s", {**FIRST, **SFT}, noise=0.002)).parts
    assert "The best of 3 complete configurations is α=1 " in part.best
    assert "It is told apart from the next best, α=0.5 (+0.19" in part.best
    assert "of the 2 others 2 can be told to be worse" in part.best
    assert difference(part.against, "is below the base model") == pytest.approx(-0.3, abs=0.03)
    assert difference(part.against, "is below SFT") == pytest.approx(-0.1, abs=0.02)
    equal = dict.fromkeys([*FIRST, None], (-0.1, -0.2))
    (part,) = only(of(tmp_path / "t", equal, noise=0.01)).parts
    assert "It cannot be told from the next best" in part.best
    assert "0 can be told to be worse" in part.best
    assert "cannot be told from SFT" in part.against
    worse: dict[Any, Effect] = {**FIRST, None: (0.0, -0.9)}
    (part,) = only(of(tmp_path / "u", worse, noise=0.002)).parts
    assert difference(part.against, "is above SFT") == pytest.approx(0.6, abs=0.03)


def test_higher_is_better_where_the_objective_says_so(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", effects={key: FIRST[key] for key in FIRST})
    spec = yaml.safe_load((folder / "study.yaml").read_text())
    spec["objective"] = [{"metric": "ce_loss", "mode": "min"}, {"metric": "cfm_loss", "mode": "max"}]
    (folder / "study.yaml").write_text(yaml.safe_dump(spec))
    by_metric = {each.metric: each for each in conclusion.conclusions(summarize(load(folder)))}
    assert list(by_metric) == ["ce_loss", "cfm_loss"]
    assert by_metric["cfm_loss"].title.endswith("higher is better")
    assert "is α=0 " in by_metric["cfm_loss"].parts[0].best


def test_its_model_is_the_one_that_export_takes_and_lies_where_trials_write_it(tmp_path: Path) -> None:
    study = of(tmp_path / "s", FIRST)
    (part,) = only(study).parts
    assert part.model is not None
    trial = best_trial(study)
    row = study.results.trials.set_index("trial_id", drop=False).loc[trial]
    place = attempts.folder(tmp_path / "s", trial, int(row["attempt"])) / attempts.checkpoint_name(
        int(row["steps_done"])
    )
    assert str(place).endswith(f"/s/{conclusion.last_checkpoint(row)}")
    assert conclusion.last_checkpoint(row) in part.model.sentence
    assert part.model.command == f"ebft-study export s {trial} --to models/s"


def test_a_study_that_runs_names_the_best_so_far_and_one_that_has_only_begun_nothing(tmp_path: Path) -> None:
    statuses = {(key, seed): "running" for key in FIRST for seed in (1, 2)}
    (part,) = only(of(tmp_path / "s", FIRST, statuses=statuses)).parts
    assert "The best so far is α=1, at " in part.best
    assert "(1 of 3 seeds)" in part.best
    assert "1 seed, so no interval" in part.against
    statuses = {(key, seed): "running" for key in FIRST for seed in (0, 1, 2)}
    assert conclusion.conclusions(of(tmp_path / "t", FIRST, statuses=statuses)) == []


def test_what_only_validation_measures_is_compared_there(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", effects=FIRST)
    spec = yaml.safe_load((folder / "study.yaml").read_text())
    spec["objective"] = {"metric": "reward", "mode": "max"}
    (folder / "study.yaml").write_text(yaml.safe_dump(spec))
    found = only(summarize(load(folder)))
    assert found.title == "Validation reward, higher is better"
    # Rewards do not compare across alpha, so each is a group of its own.
    assert "No two complete configurations that compare differ in α alone" in found.moves
    assert len(found.parts) == 3


def test_the_notebook_gives_the_same_answer(tmp_path: Path) -> None:
    study = of(tmp_path / "s", {**FIRST, **SFT})
    told = answers.reading(study)
    for sentence in only(study).sentences():
        assert sentence in told
