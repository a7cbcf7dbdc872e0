"""One run from its first to its last step: exact resume, micro-batches that change nothing, honest endings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing

from ebft_study.errors import CheckpointError, ConfigError, DataError, EbftError
from ebft_study.results.metrics import COST
from ebft_study.training import checkpoint
from ebft_study.training.loop import train
from ebft_study.training.prepare import prepare
from ebft_study.training.update import Run, learning_rate_at
from tests.references import verifier
from tests.tiny_run import (
    DETERMINISTIC,
    MemoryRecorder,
    answered,
    keep_checkpoints,
    run_tiny,
    tiny_config,
    write_data,
)


@pytest.mark.parametrize("method", ["ebft", "sft", "rlvr"])
@pytest.mark.parametrize("changes", [{}, {"warm_start_steps": 3, "ema_decay": 0.9, "log_every_steps": 3}])
def test_a_resumed_run_continues_bit_for_bit(tmp_path: Path, method: str, changes: dict[str, Any]) -> None:
    settings = (answered(tmp_path) if method == "rlvr" else {}) | {"method": method, "steps": 4}
    config = tiny_config(tmp_path, **settings | changes)
    torch.manual_seed(123)
    _, whole = run_tiny(config, on_report=keep_checkpoints(tmp_path))
    torch.manual_seed(456)
    outcome, rest = run_tiny(config, start_from=tmp_path / "step-2")
    assert outcome.step == config.total_steps
    for name in (*DETERMINISTIC, "verifier_reward", "answer_tokens"):
        expected = {step: value for step, value in whole.curve(name).items() if step > 2}
        assert rest.curve(name) == expected
    assert bool(whole.curve("verifier_reward")) == (method == "rlvr")
    assert rest.evaluated[outcome.step] == whole.evaluated[outcome.step]


def test_a_finished_run_reports_again_and_changes_nothing(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=2)
    run_tiny(config, on_report=keep_checkpoints(tmp_path))
    reports: list[dict[str, float]] = []
    outcome, again = run_tiny(config, start_from=tmp_path / "step-2", on_report=lambda m, _: reports.append(m))
    assert outcome.status == "finished"
    assert again.rows.keys() == {2}
    assert again.rows[2].keys() <= set(COST), "what another held-out evaluation costs"
    assert reports[0]["step"] == 2
    assert "cfm_loss" in reports[0]


@pytest.mark.parametrize("micro_batch_size", [1, 3])
@pytest.mark.parametrize("kl", [0.0, 0.2])
def test_micro_batches_change_nothing_but_rounding(tmp_path: Path, micro_batch_size: int, kl: float) -> None:
    settings = {"gamma": 0.3, "kl_coefficient": kl}
    _, whole = run_tiny(tiny_config(tmp_path, **settings))
    _, parts = run_tiny(tiny_config(tmp_path, micro_batch_size=micro_batch_size, **settings))
    for name in DETERMINISTIC:
        assert parts.curve(name) == pytest.approx(whole.curve(name), rel=2e-3, abs=2e-5)


def test_a_seed_has_its_own_batches(tmp_path: Path) -> None:
    first, again, other = (Run(tiny_config(tmp_path, seed=seed)).batch()[0].indices.tolist() for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("changes", [{}, {"method": "ebft", "verifier_weight": 0.5, "alpha": 0.5}])
def test_the_step_of_a_verifier_is_the_same_in_micro_batches(tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = answered(tmp_path, gamma=0.3, kl_coefficient=0.2, baseline="group_norm") | changes
    _, whole = run_tiny(tiny_config(tmp_path, **settings))
    _, parts = run_tiny(tiny_config(tmp_path, micro_batch_size=1, **settings))
    for name in (*DETERMINISTIC, "verifier_reward", "answer_tokens", "kl", "truncated_rate"):
        assert parts.curve(name) == pytest.approx(whole.curve(name), rel=2e-3, abs=2e-5), name
    assert whole.curve("sampled_tokens")[4] == pytest.approx(4 * 4 * 3 * whole.curve("answer_tokens")[4], rel=0.2)
    rows = whole.sampled[4]
    assert len(rows) == 2 * 3
    if changes:
        assert any(r["reward"] is not None for r in rows)
        _, other = run_tiny(tiny_config(tmp_path, **settings | {"verifier_weight": 0.9}))
        assert other.curve("grad_norm")[1] != whole.curve("grad_norm")[1]
        return
    assert all(verifier.score(r["context"], r["ground_truth"], r["completion"].strip()) == r["reward"] for r in rows)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"verifier.verifier": "unit_tests"},
            ConfigError,
            "verifier='unit_tests': 59 examples .* have no tests",
        ),
        ({"max_answer_tokens": 60}, DataError, "max_answer_tokens=60: no prompt of split 'train' .* room for so long"),
    ],
)
def test_data_that_a_verifier_cannot_teach_are_refused_before_anything_starts(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    config = tiny_config(tmp_path, **answered(tmp_path, **changes))
    for start in (lambda: Run(config), lambda: prepare([tiny_config(tmp_path, **answered(tmp_path)), config])):
        with pytest.raises(error, match=message) as raised:
            start()
        assert "\n" not in str(raised.value)


def test_prompts_without_room_for_an_answer_are_counted_and_skipped(tmp_path: Path) -> None:
    run = Run(tiny_config(tmp_path, **answered(tmp_path, max_answer_tokens=47, batch_size=50)))
    rows = run.parts.data["train"].answer_mask.long().argmax(dim=1)
    skipped = int((rows + 47 > 64).sum())
    assert 0 < skipped < len(rows)
    assert f"{skipped} of {len(rows)} prompts leave no room for 47 tokens of answer" in "; ".join(run.parts.remarks)
    run.update()
    assert run.accumulator.of("answer_tokens").count < 50 * 3


@pytest.mark.parametrize("method", ["ebft", "rlvr"])
def test_two_workers_give_the_gradients_and_metrics_of_one(tmp_path: Path, method: str) -> None:
    settings = answered(tmp_path) if method == "rlvr" else {}
    config = tiny_config(tmp_path, **settings | {"gamma": 0.3, "batch_size": 5, "steps": 3})
    _, alone = run_tiny(config)
    multiprocessing.spawn(_worker, args=(2, config.model_dump(), str(tmp_path)), nprocs=2)
    together = torch.load(tmp_path / "rows.pt", weights_only=True)
    for name in DETERMINISTIC:
        for step, value in alone.curve(name).items():
            assert together[step][name] == pytest.approx(value, rel=1e-3, abs=1e-5), (name, step)


def _worker(rank: int, world_size: int, settings: dict[str, Any], folder: str) -> None:
    import torch.distributed as dist

    from ebft_study.config import RunConfig

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    recorder = MemoryRecorder() if rank == 0 else None
    train(
        RunConfig.model_validate(settings),
        recorder=recorder,
        on_report=lambda _m, _f: None,
        rank=rank,
        world_size=world_size,
    )
    if recorder:
        torch.save(recorder.rows, f"{folder}/rows.pt")
    dist.destroy_process_group()


def test_more_workers_than_sequences_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size=4"):
        Run(tiny_config(tmp_path), world_size=5)


def test_training_lowers_cross_entropy(tmp_path: Path) -> None:
    _, recorder = run_tiny(tiny_config(tmp_path, method="sft", steps=30, learning_rate=1e-2, eval_every_steps=30))
    curve = recorder.curve("ce_loss")
    assert curve[30] < curve[0] - 0.5


def test_learning_rate_zero_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    _, recorder = run_tiny(tiny_config(tmp_path, learning_rate=0.0))
    assert len(set(recorder.curve("ce_loss").values())) == 1
    assert len(set(recorder.curve("cfm_loss").values())) == 1


def test_the_feature_network_keeps_the_base_weights_through_a_warm_start(tmp_path: Path) -> None:
    run = Run(tiny_config(tmp_path, warm_start_steps=2))
    before = [p.clone() for p in run.parts.features.network.parameters()]
    run.update()
    run.update()
    run.update()
    after = list(run.parts.features.network.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(
        run.model.get_input_embeddings().weight, run.parts.features.network.get_input_embeddings().weight
    )


def test_a_non_finite_loss_stops_the_run_with_its_reason(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, method="sft", steps=50, learning_rate=1e30, max_grad_norm=None)
    reports: list[dict[str, float]] = []
    outcome, recorder = run_tiny(config, on_report=lambda m, _: reports.append(m))
    assert outcome.status == "stopped"
    assert outcome.step < 50
    assert "nan" in outcome.reason or "inf" in outcome.reason
    assert ("stopped", outcome.reason) in recorder.events
    assert all(value == value for value in reports[-1].values())


def test_every_report_holds_the_step_and_the_latest_evaluation(tmp_path: Path) -> None:
    reports: list[dict[str, float]] = []
    run_tiny(tiny_config(tmp_path), on_report=lambda m, _: reports.append(m))
    assert [report["step"] for report in reports] == [0, 2, 4]
    assert all({"ce_loss", "cfm_loss", "perplexity"} <= report.keys() for report in reports)


def test_the_end_of_a_warm_start_is_evaluated(tmp_path: Path) -> None:
    settings = {"warm_start_steps": 1, "steps": 4, "eval_every_steps": 3, "log_every_steps": 3}
    _, recorder = run_tiny(tiny_config(tmp_path, **settings))
    assert list(recorder.curve("ce_loss")) == [0, 1, 3, 5]
    assert list(recorder.curve("loss")) == [3, 5]
    # Held-out numbers where EBFT begins, for what it did from there; of every evaluation the sequences' values.
    assert list(recorder.evaluated) == [0, 1, 5]
    assert [[row["benchmark"] for row in rows] for rows in recorder.scored.values()] == [
        ["validation"] * 2 + ["heldout"] * 3, ["validation"] * 2 + ["heldout"] * 3, ["validation"] * 2,
        ["validation"] * 2 + ["heldout"] * 3,
    ]  # fmt: skip


def test_samples_show_context_completion_and_truth(tmp_path: Path) -> None:
    _, recorder = run_tiny(tiny_config(tmp_path))
    row = recorder.sampled[2][0]
    assert row["context"]
    assert row["completion"]
    assert row["reward"] == pytest.approx(row["alignment"] - 1.0 * row["diversity"])


def test_samples_name_the_row_of_the_data_that_they_continue(tmp_path: Path) -> None:
    larger = write_data(tmp_path / "larger.jsonl", examples=300)
    config = tiny_config(tmp_path, dataset=str(larger), steps=1)
    rows = run_tiny(config)[1].sampled[1]
    parts = Run(config).parts
    data, decode = parts.data["validation"], parts.base.tokenizer.decode
    assert {row["sequence"] for row in rows} == {0, len(data) - 1} != {0, 1}, "two rows, spread over the split"
    for row in rows:
        tokens, anchor = data.tokens[row["sequence"]], row["anchor"]
        assert row["context"] == decode(tokens[:anchor])
        assert row["ground_truth"] == decode(tokens[anchor : anchor + config.rollout.completion_length])


def test_answers_only_settings_work_on_pairs_and_are_refused_on_raw_text(tmp_path: Path) -> None:
    pairs = write_data(tmp_path / "pairs.jsonl", answers=True)
    changes = {"anchor_region": "answer", "ce_region": "answer", "steps": 1}
    columns = {"text_column": None, "prompt_column": "prompt", "answer_column": "answer", "dataset": str(pairs)}
    _, recorder = run_tiny(tiny_config(tmp_path, **changes, **columns))
    assert "ce_answer_loss" in recorder.rows[0]
    with pytest.raises(ConfigError, match="raw text"):
        run_tiny(tiny_config(tmp_path, **changes, text_column=None))


def test_the_base_model_is_measured_once_and_recalled_exactly(tmp_path: Path) -> None:
    _, first = run_tiny(tiny_config(tmp_path, steps=1))
    _, second = run_tiny(tiny_config(tmp_path, steps=1, seed=9))
    for name in ("ce_loss", "cfm_loss"):
        assert first.rows[0][name] == second.rows[0][name]
    assert first.evaluated[0] == second.evaluated[0]
    _, other = run_tiny(tiny_config(tmp_path, steps=1, evaluation_seed=1))
    assert other.rows[0]["cfm_loss"] != first.rows[0]["cfm_loss"]


def test_learning_rate_warms_up_then_stays_or_decays(tmp_path: Path) -> None:
    constant = tiny_config(tmp_path, warmup_fraction=0.2).optimizer
    assert [learning_rate_at(constant, 1.0, step, 10) for step in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 1.0]
    cosine = tiny_config(tmp_path, schedule="cosine", warmup_fraction=0.0, final_learning_rate_fraction=0.1).optimizer
    assert learning_rate_at(cosine, 1.0, 0, 100) == 1.0
    assert learning_rate_at(cosine, 1.0, 100, 100) == pytest.approx(0.1)
    assert learning_rate_at(cosine, 1.0, 50, 100) == pytest.approx(0.55)


def test_a_checkpoint_of_another_format_is_refused_in_words(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    checkpoint.save(folder, {"step": 1, "tokens_seen": 0, "latest": {}, "model": {}}, step=1)
    with pytest.raises(CheckpointError, match="older version"):
        run_tiny(tiny_config(tmp_path), start_from=folder)


def test_a_checkpoint_of_version_0_1_within_a_row_of_metrics_loses_nothing(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, log_every_steps=3, steps=3)
    _, whole = run_tiny(config, on_report=keep_checkpoints(tmp_path))
    saved = checkpoint.load(tmp_path / "step-2")
    observed = saved["tally"]["observed"]
    without_count = ("loss", "policy_loss", *(name for name in observed if name.endswith("_seconds")))
    sums = {name: moments["total"] for name, moments in observed.items()}
    saved["tally"] = {
        "sums": sums | {"advantage_squared": observed["advantage"]["squares"]},
        "counts": {name: 0.0 if name in without_count else moments["count"] for name, moments in observed.items()}
        | {"advantage_squared": observed["advantage"]["count"]},
        "peaks": {},
        "steps": saved["tally"]["steps"],
    }
    folder = tmp_path / "old"
    folder.mkdir()
    checkpoint.save(folder, saved, step=2)
    _, rest = run_tiny(config, start_from=folder)
    for name in (*DETERMINISTIC, "policy_loss", "duplicate_rate", "policy_entropy"):
        assert rest.rows[3][name] == whole.rows[3][name], name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"sequence_length": 200}, "reaches position"),
        ({"packing": False, "sequence_length": 120, "first_context_length": 110}, "has room for one anchor"),
        ({"method": "rlvr", "max_answer_tokens": 60}, "room for so long"),
        ({"benchmarks": ["mini"], "benchmark_max_tokens": 120}, "benchmark_max_tokens"),
    ],
)
def test_mistakes_in_data_show_before_weights_are_read(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = tiny_config(tmp_path, **(answered(tmp_path, **changes) if "method" in changes else changes))
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(EbftError, match=message):
        Run(config)
