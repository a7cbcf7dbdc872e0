"""What a run records about itself, besides its evaluations: spreads, counts, rates, and samples with their parts."""

from __future__ import annotations

from collections import defaultdict
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ebft_study.training import validation
from ebft_study.training.update import Run
from tests.references.feature_matching import cfm, terms
from tests.references.whole_update import advantages
from tests.tiny_run import run_tiny, tiny_config


@pytest.mark.parametrize("baseline", ["rloo", "none"])
def test_what_a_row_says_about_rollouts_is_as_defined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, baseline: str
) -> None:
    """Means over the contexts of all steps since the last row; at this temperature, many samples are equal."""
    alpha = 0.5
    run = Run(tiny_config(tmp_path, alpha=alpha, baseline=baseline, n_samples=4, temperature=0.1))
    method: Any = run.parts.method
    sampled = watched(monkeypatch, method.rollouts, "sample")
    embedded = watched(monkeypatch, method.features, "embed")
    valid = []
    for _ in range(2):
        valid.append(run.batch()[1].valid)
        run.update()
    expected: dict[str, list[float]] = defaultdict(list)
    used: list[float] = []
    for mask, rollouts, (features,) in zip(valid, sampled, embedded, strict=True):
        for s, b in mask.nonzero().tolist():
            phi, psi = features.phi[s, b].double().numpy(), features.psi[s, b].double().numpy()
            t1, t2 = terms(phi, psi, "none")
            reward = t1 - alpha * t2
            completions = [tuple(tokens) for tokens in rollouts.completions[s, b].tolist()]
            context = {
                "reward": reward.mean(),
                "alignment": t1.mean(),
                "diversity": t2.mean(),
                "fm_whitened": (t2 / 2 - t1).mean(),
                "train_cfm_loss": cfm(phi, psi),
                "duplicate_rate": 1 - len(set(completions)) / len(completions),
                "zero_variance_fraction": float(max(reward) - min(reward) < 1e-8),
                "policy_entropy": -float(rollouts.log_probs[s, b].detach().mean()),
            }
            for name, value in context.items():
                expected[name].append(value)
            used += (reward if baseline == "none" else advantages(phi, psi, alpha=alpha, whitening="none")).tolist()
    row = validation.training_metrics(run)
    for name, values in expected.items():
        assert row[name] == pytest.approx(np.mean(values), rel=1e-5), name
    assert row["advantage_std"] == pytest.approx(np.std(used), rel=1e-5)
    assert 0 < row["duplicate_rate"] < 1
    assert 0 < row["zero_variance_fraction"] < 0.5


def watched(monkeypatch: pytest.MonkeyPatch, part: Any, name: str) -> list[Any]:
    """Everything that a method returns from now on."""
    returned: list[Any] = []
    call = getattr(part, name)

    def watch(*arguments: Any, **keywords: Any) -> Any:
        returned.append(call(*arguments, **keywords))
        return returned[-1]

    monkeypatch.setattr(part, name, watch)
    return returned


def test_losses_and_times_are_means_over_steps(tmp_path: Path) -> None:
    """The loss of the steps since the last row is that of each of them, if every step has a row of its own."""
    rows = {}
    for every in (1, 4):
        _, recorder = run_tiny(tiny_config(tmp_path, log_every_steps=every, gamma=0.3))
        rows[every] = recorder
    for name in ("loss", "policy_loss", "grad_norm"):
        assert rows[4].curve(name)[4] == pytest.approx(np.mean(list(rows[1].curve(name).values())))
    row = rows[4].rows[4]
    assert row["loss"] == pytest.approx(row["policy_loss"] + 0.3 * row["train_ce_loss"], rel=0.05)
    assert (
        sum(row[f"{phase}_seconds"] for phase in ("rollout", "feature", "scoring", "optimizer")) <= row["step_seconds"]
    )


def test_tokens_are_counted_without_padding_and_their_rate_is_that_of_the_steps_since_the_last_row(
    tmp_path: Path,
) -> None:
    run, tokens = Run(tiny_config(tmp_path, sequence_length=32)), []
    rows = []
    for _ in range(2):
        for _ in range(2):
            tokens.append(int((run.batch()[0].document_ids >= 0).sum()))
            run.update()
        rows.append(validation.training_metrics(run))
    assert max(tokens) < 4 * 32, "some sequences are padded"
    for row, count in zip(rows, (2, 4), strict=True):
        assert row["tokens_seen"] == sum(tokens[:count])
        assert row["sequences_seen"] == 4 * count
        expected = sum(tokens[count - 2 : count]) / (2 * row["step_seconds"])
        assert row["tokens_per_second"] == pytest.approx(expected)


@pytest.mark.parametrize("whitening", ["none", "variant_ii"])
@pytest.mark.parametrize("baseline", ["rloo", "naive"])
def test_a_sample_has_its_text_and_the_parts_of_its_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whitening: str, baseline: str
) -> None:
    alpha, n = 0.5, 4
    run = Run(tiny_config(tmp_path, n_samples=n, alpha=alpha, whitening=whitening, baseline=baseline))
    embedded = watched(monkeypatch, run.parts.features, "embed")
    rows = validation.sample_rows(run)
    data, decode = run.parts.data["validation"], run.parts.base.tokenizer.decode
    tokens = data.tokens[[0, len(data) - 1]].tolist()
    contexts = [list(group) for _, group in groupby(rows, key=lambda row: (row["sequence"], row["anchor"]))]
    assert len(contexts) == 4
    for context in contexts:
        s, a = context[0]["sequence"], context[0]["anchor"]
        assert {row["context"] for row in context} == {decode(tokens[s][:a])}
        assert {row["ground_truth"] for row in context} == {decode(tokens[s][a : a + 3])}
        phi, psi = ((part[s, a // 4 - 1]).double().numpy() for part in (embedded[0][0].phi, embedded[0][0].psi))
        t1, t2 = terms(phi, psi, whitening)
        for j, row in enumerate(context):
            others = [i for i in range(n) if i != j]
            # (94), or the mean of the other rewards
            diversity = (sum(t2[others]) - t2[j]) / (n - 2) if baseline == "rloo" else np.mean(t2[others])
            expected = {"sample": j, "alignment": t1[j], "diversity": t2[j], "reward": t1[j] - alpha * t2[j]}
            expected["advantage"] = expected["reward"] - (np.mean(t1[others]) - alpha * diversity)
            for name, value in expected.items():
                assert row[name] == pytest.approx(value, abs=1e-4), name
