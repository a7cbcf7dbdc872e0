"""Weights and evaluations of a whole run against references that share no code with it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ebft_study.config import RunConfig
from ebft_study.data import Batch
from ebft_study.methods import MetricAccumulator
from ebft_study.training.loop import finish, observe, start
from ebft_study.training.update import Run
from tests.references import verifier, whole_evaluation, whole_update
from tests.tiny_run import WORDS, MemoryRecorder, report_nothing, tiny_config, write_model

SETTINGS: dict[str, Any] = {
    "text_column": None, "prompt_column": "prompt", "answer_column": "answer", "packing": True, "sequence_length": 30,
    "completion_length": 3, "stride": 5, "first_context_length": 2, "n_samples": 4, "temperature": 0.8, "seed": 3,
    "alpha": 0.5, "gamma": 0.1, "kl_coefficient": 0.7, "kl_estimator": "k2", "batch_size": 3, "micro_batch_size": 2,
    "warm_start_steps": 2, "warm_start_learning_rate": 4e-4, "steps": 3, "learning_rate": 2e-4, "weight_decay": 2.0,
    "betas": [0.7, 0.8], "max_grad_norm": 0.3, "schedule": "cosine", "warmup_fraction": 0.3, "ema_decay": 0.6,
    "depths": [0.4, 1.0], "eval_every_steps": 100, "sample_every_steps": 100, "checkpoint_every_steps": 100,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "rewards as they are": {"anchor_region": "answer", "ce_region": "answer", "kl_estimator": "sequence"},
    "another KL": {"aggregation": "sum"},
    "whitened, other terms": {"whitening": "variant_i", "alpha": 1.0, "aggregation": "sum", "kl_estimator": "k3"},
}


def pairs(path: Path, examples: int) -> Path:
    """A file of prompts and answers of a few words each, so that a row of tokens holds two of them and some padding."""
    generator = torch.Generator().manual_seed(2)

    def words(low: int, high: int) -> str:
        count = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (count,), generator=generator).tolist())

    rows = [{"prompt": words(2, 5), "answer": " " + words(4, 9)} for _ in range(examples)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def config_of(folder: Path, *, examples: int, **changes: Any) -> RunConfig:
    return tiny_config(folder, **SETTINGS | {"dataset": str(pairs(folder / "pairs.jsonl", examples))} | changes)


def rows_of(batch: Batch) -> list[whole_update.Row]:
    columns = (batch.indices, batch.tokens, batch.document_ids, batch.answer_mask)
    return [whole_update.Row(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def plain_model(config: RunConfig) -> torch.nn.Module:
    """The base model with an attention that is not the package's."""
    return AutoModelForCausalLM.from_pretrained(config.model, attn_implementation="eager").eval()  # type: ignore[no-any-return]


ENDS = list(range(0, 320, 12))
"""Tokens that end an answer: a random model hardly ever draws the real one."""
RLVR: dict[str, Any] = {
    "method": "rlvr", "verifier.verifier": "tests.references.verifier:common_letters", "packing": False,
    "max_answer_tokens": 19, "sequence_length": 26, "n_samples": 5, "kl_coefficient": 0.2, "batch_size": 4,
    "micro_batch_size": 3,
}  # fmt: skip
RLVR_RUNS: dict[str, dict[str, Any]] = {
    "RLOO": {"aggregation": "sum", "kl_estimator": "sequence", "temperature": 0.7},
    "GRPO": {"baseline": "group_norm", "ce_region": "answer", "overlong": "mask"},
    "Dr. GRPO": {"baseline": "mean", "aggregation": "constant", "kl_estimator": "k3", "temperature": 1.0},
}


@pytest.mark.parametrize("changes", RLVR_RUNS.values(), ids=RLVR_RUNS)
def test_weights_after_updates_by_a_verifier_are_those_of_the_definitions(
    tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ebft_study.training.setup.end_tokens", lambda base: ENDS)
    config = config_of(tmp_path, examples=60, **RLVR | changes)
    run, batches, observed = Run(config), [], MetricAccumulator()
    for _ in range(config.total_steps):
        batches.append(rows_of(run.batch()[0]))
        run.update()
        observed = run.accumulator
    run.parts.close()
    assert 0.1 < observed.mean("truncated_rate") < 0.9
    assert 0.0 < observed.mean("verifier_failure_rate") < 0.5
    assert any(row.answers.index(True) + 19 > 26 for rows in batches[2:] for row in rows), "a prompt without room"

    model = plain_model(config)
    texts = whole_update.Texts(run.parts.base.tokenizer, verifier.score)
    average = whole_update.train(model, config, batches, texts, ENDS)
    for name, weight in model.named_parameters():
        assert_equal(run.model.get_parameter(name), weight)
        assert_equal(run.average.weights[name], average[name])


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_weights_after_several_updates_are_those_of_the_definitions(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = config_of(tmp_path, examples=120, **changes)
    run, batches, norms = Run(config), [], []
    for _ in range(config.total_steps):
        batches.append(rows_of(run.batch()[0]))
        before = run.accumulator.of("grad_norm").total
        run.update()
        norms.append(run.accumulator.of("grad_norm").total - before)
    assert any(set(row.documents) >= {-1, 0, 1} for rows in batches for row in rows)
    assert min(norms) > 0.3, "clipping is active in every update"

    model = plain_model(config)
    average = whole_update.train(model, config, batches)
    for name, weight in model.named_parameters():
        assert_equal(run.model.get_parameter(name), weight)
        assert_equal(run.average.weights[name], average[name])


def assert_equal(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """To 1e-5; Adam divides gradients near zero by their own size, and so magnifies the rounding of a few entries."""
    error = (ours - expected).detach().abs()
    assert float((error <= 1e-5).float().mean()) > 0.995
    assert float(error.max()) < 1e-4


def test_everything_that_a_run_measures_is_as_defined(tmp_path: Path) -> None:
    """The base model first, then the averaged weights; validation at the run's length, the held-out split in full."""
    config = config_of(
        tmp_path, examples=500, steps=1, batch_size=2, learning_rate=5e-3, eval_every_steps=1, evaluation_seed=7,
        evaluation_temperature=1.3, cfm_samples=3, profile_lengths=[1, 6], validation_sequences=5, heldout_sequences=6,
        judge=str(write_model(tmp_path / "judge", seed=4)), judge_depths=[0.5, 1.0], judge_pooling="mean",
        judge_normalize="token_joint", judge_completion_length=4,
    )  # fmt: skip
    run, recorder = Run(config), MemoryRecorder()
    start(run, recorder, report_nothing)
    while run.step < config.total_steps:
        run.update()
        observe(run, recorder, report_nothing)
    finish(run, recorder)
    base, averaged = plain_model(config), plain_model(config)
    for name, weight in averaged.named_parameters():
        weight.data.copy_(run.average.weights[name])
        assert not torch.equal(run.model.get_parameter(name), weight)
    for model, step in ((base, 0), (averaged, config.total_steps)):
        validation = measured(model, base, run, "validation", 5, [3])
        for name in ("ce_loss", "ce_answer_loss", "cfm_loss", "judge_cfm_loss"):
            value, error, _ = validation[name, 3 if name == "cfm_loss" else None]
            assert recorder.rows[step][name] == pytest.approx(value, rel=1e-4), (name, step)
            if name == "cfm_loss":
                assert recorder.rows[step]["cfm_standard_error"] == pytest.approx(error, rel=1e-3)
        assert recorder.rows[step]["perplexity"] == pytest.approx(math.exp(validation["ce_loss", None][0]), rel=1e-4)
        check_scores(recorder.scored[step], "validation", run, validation)
        rows = {(row["metric"], row["position"]): row for row in recorder.evaluated[step]}
        heldout = measured(model, base, run, "heldout", 6, [1, 3, 6])
        check_scores(recorder.scored[step], "heldout", run, {k: v for k, v in heldout.items() if k[0] != "entropy"})
        assert rows.keys() == heldout.keys()
        for key, (value, error, count) in heldout.items():
            assert rows[key]["benchmark"] == "heldout"
            assert rows[key]["value"] == pytest.approx(value, rel=1e-4), key
            assert rows[key]["standard_error"] == pytest.approx(error, rel=1e-3), key
            assert rows[key]["count"] == count, key


def check_scores(recorded: list[Mapping[str, Any]], split: str, run: Run, expected: whole_evaluation.Estimates) -> None:
    """The values of sequences add up to the estimate, and their spread to its standard error."""
    rows = {(row["metric"], row["position"]): row for row in recorded if row["benchmark"] == split}
    assert rows.keys() == expected.keys()
    chosen = whole_evaluation.chosen(len(run.parts.data[split]), 6 if split == "heldout" else 5)
    for key, (value, error, count) in expected.items():
        counts, values = np.array(rows[key]["counts"]), np.array(rows[key]["values"])
        assert set(rows[key]["sequences"]) <= set(chosen)
        assert counts.sum() == count
        assert counts @ values / count == pytest.approx(value, rel=1e-4)
        assert np.sqrt(((counts * (values - value)) ** 2).sum()) / count == pytest.approx(error, rel=1e-3)


def measured(
    model: torch.nn.Module, base: torch.nn.Module, run: Run, split: str, sequences: int, lengths: list[int]
) -> whole_evaluation.Estimates:
    data = run.parts.data[split]
    rows = rows_of(data.rows(torch.tensor(whole_evaluation.chosen(len(data), sequences))))
    assert len(data) > sequences + 2
    judge = AutoModelForCausalLM.from_pretrained(run.config.evaluation.judge, attn_implementation="eager").eval()
    entropy = split == "heldout"
    return whole_evaluation.evaluate(model, base, run.config, rows, lengths, entropy=entropy, judge=judge)
