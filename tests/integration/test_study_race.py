"""A race of two seeds of two configurations in one slot, whose driver is killed while it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ebft_study import results
from tests import commands

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]

CONTENT = """
study: race
question: Do trials take turns, and do bad configurations stop with all their seeds?
run: {steps: 6, eval_every_steps: 2, checkpoint_every_steps: 2, log_every_steps: 1, features: {backend: local},
      weight_decay: 0.05}
axes: {learning_rate: [0.3, 0.1]}
seeds: [0, 1]
baselines: {sft: {method: sft, learning_rate: 0.4}}
scheduler: {kind: race, grace_period_steps: 2}
budget: {max_concurrent_trials: 1}
resources: {workers_per_trial: 0}
"""


@pytest.mark.slow
def test_trials_take_turns_and_a_killed_race_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "studies" / "race"
    (tmp_path / "race.yaml").write_text(CONTENT)

    def evaluated() -> int:
        """Trials on the axes that have got to the first comparison."""
        if not (folder / "results" / "metrics").exists():
            return 0
        metrics = results.read_table(folder, "metrics")
        return int(metrics.loc[(metrics["step"] >= 2), "trial_id"].nunique())

    driver = commands.start("study", "race.yaml", cwd=tmp_path, program=commands.FAKE)
    commands.wait_until(lambda: evaluated() >= 3, driver, seconds=900)
    driver.kill()
    driver.communicate()
    resumed = commands.ended(commands.start("resume", "race", cwd=tmp_path, program=commands.FAKE), 900)
    assert resumed.endswith("exit code 0"), resumed

    trials = results.read_table(folder, "trials").set_index("trial_id")
    on_axes = trials[trials["named_baseline"].isna()]
    steps = {name: sorted(group["steps_done"]) for name, group in on_axes.groupby("learning_rate")}
    assert steps == {0.1: [6, 6], 0.3: [2, 2]}
    assert set(on_axes.loc[on_axes["steps_done"] == 2, "status"]) == {"stopped"}
    reasons = on_axes.loc[on_axes["learning_rate"] == 0.3, "stop_reason"].unique()
    assert len(reasons) == 1
    assert "cfm_loss at step 2 is worse than that of learning_rate=0.1: difference 0.2" in reasons[0]
    assert set(trials.loc[trials["named_baseline"].notna(), "status"]) == {"finished"}
    # In one slot, the first trial of the race stops for the others.
    assert on_axes["attempt"].max() > 1

    events = results.read_table(folder, "events").query("kind == 'race'")
    details = [json.loads(text) for text in events["details"]]
    assert [each["step"] for each in details] == [2, 4]
    compared = {each["configuration"]: each for each in details[0]["comparisons"]}
    assert set(compared) == {"learning_rate=0.3"}
    assert compared["learning_rate=0.3"]["difference"] == pytest.approx(0.2)
    assert sorted(details[0]["stopped"]) == ["learning_rate=0.3"]
