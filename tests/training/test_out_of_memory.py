"""A step that runs out of memory: smaller passes, the same run; the memory is pretended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ebft_study.methods.ebft import Ebft
from ebft_study.methods.sft import Sft
from ebft_study.training.memory import smaller
from ebft_study.training.update import Run
from tests.tiny_run import DETERMINISTIC, run_tiny, tiny_config


def fails(monkeypatch: pytest.MonkeyPatch, method: type, *, too_many: Callable[[int, int], bool]) -> list[int]:
    """Let passes of a method run out of memory, after their gradients, by numbers of sequences and of anchors."""
    backward, failed = method.backward, list[int]()  # type: ignore[attr-defined]

    def limited(self: Any, model: Any, batch: Any, *rest: Any, **more: Any) -> float:
        loss: float = backward(self, model, batch, *rest, **more)
        if too_many(len(batch.indices), getattr(self, "anchors_at_once", 0)):
            failed.append(len(batch.indices))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss

    monkeypatch.setattr(method, "backward", limited)
    return failed


@pytest.mark.parametrize(("method", "kind"), [("ebft", Ebft), ("sft", Sft)])
def test_a_step_without_memory_is_made_in_smaller_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, kind: type
) -> None:
    config = tiny_config(tmp_path, method=method, batch_size=4, micro_batch_size=4, log_every_steps=1)
    _, expected = run_tiny(config)
    failed = fails(monkeypatch, kind, too_many=lambda sequences, _: sequences > 1)
    outcome, made = run_tiny(config)
    assert (outcome.status, failed) == ("finished", [4, 2])
    for name in (*DETERMINISTIC, "ce_tokens", "flops", "train_tokens"):
        assert made.curve(name) == pytest.approx(expected.curve(name), rel=2e-3, abs=2e-5), name
    notices = [message for event, message in made.events if event == "memory"]
    assert len(notices) == 2
    assert "step 1 ran out of memory: micro_batch_size=4" in notices[0]
    assert "Now micro_batch_size=1" in notices[1]


def test_single_sequences_take_fewer_anchors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path, batch_size=2, micro_batch_size=1)
    _, expected = run_tiny(config)
    failed = fails(monkeypatch, Ebft, too_many=lambda _, anchors: anchors > 2)
    run = Run(config)
    assert run.parts.memory_plan.anchors_at_once > 2
    outcome, made = run_tiny(config)
    assert outcome.status == "finished"
    assert failed
    for name in DETERMINISTIC:
        assert made.curve(name) == pytest.approx(expected.curve(name), rel=2e-3, abs=2e-5), name


def test_what_fits_in_no_passes_fails_as_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, Ebft, too_many=lambda *_: True)
    with pytest.raises(torch.OutOfMemoryError):
        run_tiny(tiny_config(tmp_path))


def test_a_smaller_plan_needs_less(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, batch_size=5, micro_batch_size=5)
    plan = Run(config).parts.memory_plan
    seen = [plan]
    while (less := smaller(config, "cpu", seen[-1])) is not None:
        assert less.peak_bytes <= seen[-1].peak_bytes
        seen.append(less)
    assert [each.micro_batch_size for each in seen][:4] == [5, 3, 2, 1]
    assert seen[-1].anchors_at_once == 1
    assert seen[-1].peak_bytes < plan.peak_bytes
