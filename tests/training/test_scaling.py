"""Saving memory on one worker: activations computed again, and numbers of half the size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ebft_study.algorithm.anchors import Anchors, find_anchors
from ebft_study.data.tokens import PADDING_DOCUMENT
from ebft_study.errors import ModelError
from ebft_study.features.local import LocalFeatures
from ebft_study.methods import MetricAccumulator
from ebft_study.networks.blocks import completion_log_probs, run_prefix, token_log_probs
from ebft_study.networks.loading import load_model
from ebft_study.networks.verification import verify
from ebft_study.rollouts.strided import StridedRollouts
from ebft_study.training.loop import start
from ebft_study.training.setup import checkpoint_activations
from ebft_study.training.update import Run
from ebft_study.training.validation import sample_rows
from tests.small_models import ARCHITECTURES, VOCABULARY, small_batch, small_model
from tests.tiny_run import MemoryRecorder, report_nothing, run_tiny, tiny_config

BFLOAT16 = {"precision": "bfloat16"}


def started(folder: Path, **changes: Any) -> Run:
    return Run(tiny_config(folder, **changes))


def gradients(run: Run) -> dict[str, torch.Tensor]:
    """Gradients of the first step."""
    batch, anchors, noise, denominators = run.batch()
    with run.autocast():
        run.method.backward(
            run.model, batch, anchors, noise=noise, denominators=denominators, accumulator=MetricAccumulator()
        )
    return {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "changes", [{"gamma": 0.3, "kl_coefficient": 0.2}, {"completion_length": 1}, {"method": "sft"}], ids=str
)
def test_rows_and_anchors_of_padding_change_no_gradient(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Workers with shards have as many of both as any other worker."""
    run = started(tmp_path, **changes)
    batch, anchors, noise, denominators = run.batch()
    S, B = anchors.valid.shape
    padded = batch.padded(S + 2)
    assert (padded.document_ids[S:] == PADDING_DOCUMENT).all()
    more = Anchors(*(torch.cat([part, torch.zeros_like(part[:2])]) for part in anchors)).padded(B + 3)
    assert more.valid.sum() == anchors.valid.sum()
    draws = torch.full((S + 2, B + 3, *noise.shape[2:]), 0.5)
    draws[:S, :B] = noise
    found = []
    for case in ((batch, anchors, noise), (padded, more, draws)):
        run.model.zero_grad()
        accumulator = MetricAccumulator()
        run.method.backward(run.model, *case[:2], noise=case[2], denominators=denominators, accumulator=accumulator)
        found.append(({name: p.grad.clone() for name, p in run.model.named_parameters()}, accumulator.row()))
    for name, gradient in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], gradient, atol=1e-6, rtol=1e-5)
    for name, value in found[0][1].items():
        if not name.endswith("seconds"):
            assert found[1][1][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


# --- activation checkpointing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "sft"},
        {"gamma": 0.3, "kl_coefficient": 0.2},
        {"completion_length": 6},
        {"precision": "bfloat16", "gamma": 0.3},
        {"lora_rank": 2, "lora_targets": ["q_proj"], "kl_coefficient": 0.2},
    ],
    ids=str,
)
def test_activation_checkpointing_changes_no_gradient(tmp_path: Path, changes: dict[str, Any]) -> None:
    expected = gradients(started(tmp_path, **changes))
    found = gradients(started(tmp_path, activation_checkpointing=True, **changes))
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_checkpointed_rollout_has_the_gradient_of_scoring_it_again(architecture: str) -> None:
    model, batch = small_model(architecture), small_batch([[0] * 20, [0] * 8 + [1] * 12])
    checkpoint_activations(model, name=architecture)
    model.train()
    anchors = find_anchors(batch.document_ids, completion_length=5, stride=4, first_context_length=3)
    noise = torch.rand(*anchors.positions.shape, 3, 5, generator=torch.Generator().manual_seed(0))
    rollouts = StridedRollouts().sample(model, batch, anchors, noise=noise, temperature=0.8)
    prefix = run_prefix(model, batch.tokens, batch.document_ids)
    scored = completion_log_probs(model, prefix, anchors, rollouts.completions, temperature=0.8)
    weights = torch.randn(scored.shape, generator=torch.Generator().manual_seed(1)) * anchors.valid[..., None, None]
    parameters = list(model.parameters())
    found, expected = (
        torch.autograd.grad((weights * log_probs).sum(), parameters) for log_probs in (rollouts.log_probs, scored)
    )
    for sampled, again in zip(found, expected, strict=True):
        torch.testing.assert_close(sampled, again, atol=1e-4 * float(again.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("method", ["ebft", "sft"])
def test_activation_checkpointing_keeps_far_less(tmp_path: Path, method: str) -> None:
    usual, checkpointed = (
        kept_bytes(started(tmp_path, method=method, activation_checkpointing=again)) for again in (False, True)
    )
    assert checkpointed < 0.4 * usual


def kept_bytes(run: Run) -> int:
    """What one step keeps for its backward passes besides weights: saved tensors, and inputs of layers to run again."""
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    for layer in run.model.get_decoder().layers:
        if layer.gradient_checkpointing:
            again = layer._gradient_checkpointing_func
            layer._gradient_checkpointing_func = lambda run_layer, states, again=again: again(run_layer, keep(states))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gradients(run)
    return sum(sizes.values())


def test_nothing_is_checkpointed_where_no_gradient_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = started(tmp_path, activation_checkpointing=True)
    for layer in run.model.get_decoder().layers:
        monkeypatch.setattr(layer, "_gradient_checkpointing_func", lambda *_: pytest.fail("checkpointed"))
    start(run, MemoryRecorder(), report_nothing)
    assert sample_rows(run)
    assert run.model.training


def test_an_architecture_without_checkpointing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match="activation_checkpointing: model 'old' does not support it"):
        checkpoint_activations(model, name="old")


# --- precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"weight_dtype": "bfloat16"}, {"lora_rank": 4}], ids=str)
@pytest.mark.parametrize("method", ["ebft", "sft"])
def test_training_in_bfloat16_stays_close_to_float32(tmp_path: Path, method: str, changes: dict[str, Any]) -> None:
    # Rollouts of other tokens soon make another run: EBFT is compared while it has moved little.
    rate = {"ebft": 2e-3, "sft": 1e-2}[method]
    common = {"method": method, "gamma": 0.3, "learning_rate": rate, "steps": 6}
    rank = {name: value for name, value in changes.items() if name == "lora_rank"}
    _, exact = run_tiny(tiny_config(tmp_path, **common, **rank))
    _, rounded = run_tiny(tiny_config(tmp_path, **common, **changes, **BFLOAT16))
    curve, found = exact.curve("ce_loss"), rounded.curve("ce_loss")
    for step, value in found.items():
        assert value == pytest.approx(curve[step], rel=0.02)
    if method == "sft":
        assert found[6] < found[0] - 0.05


def test_bfloat16_weights_have_gradients_and_optimizer_states_of_their_type(tmp_path: Path) -> None:
    run = started(tmp_path, weight_dtype="bfloat16", ema_decay=0.9, **BFLOAT16)
    run.update()
    assert {p.dtype for p in run.model.parameters()} == {torch.bfloat16}
    assert {state["exp_avg_sq"].dtype for state in run.optimizer.state.values()} == {torch.bfloat16}
    # Steps of an average are too small for so few digits.
    assert {average.dtype for average in run.average.weights.values()} == {torch.float32}


def test_frozen_networks_are_stored_in_the_type_of_the_passes(tmp_path: Path) -> None:
    run = started(tmp_path, kl_coefficient=0.1, **BFLOAT16)
    for network, dtype in (
        (run.model, torch.float32),
        (run.parts.features.network, torch.bfloat16),
        (run.parts.method.base, torch.bfloat16),
    ):
        assert {p.dtype for p in network.parameters()} == {dtype}
    other = started(tmp_path, random_weights=True, **BFLOAT16)
    assert {p.dtype for p in other.parts.features.network.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_passes_with_bfloat16_weights_need_no_autocast(architecture: str) -> None:
    low, exact = small_model(architecture).bfloat16(), small_model(architecture).bfloat16().float()
    batch = small_batch([[0] * 20, [0] * 8 + [1] * 12])
    anchors = find_anchors(batch.document_ids, completion_length=4, stride=4, first_context_length=3)
    shape = (*anchors.positions.shape, 3, 4)
    completions = torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
    found, expected = (step(model, batch, anchors, completions) for model in (low, exact))
    for name, value in expected.items():
        assert found[name].shape == value.shape
        error = (found[name].float() - value).norm() / value.norm()
        assert error < 0.05, (name, float(error))
    assert found["log_probs"].dtype == torch.float32


def step(model: nn.Module, batch: Any, anchors: Any, completions: torch.Tensor) -> dict[str, torch.Tensor]:
    """Log-probabilities of completions and of the truth, features, and a gradient."""
    prefix = run_prefix(model, batch.tokens, batch.document_ids)
    mask = anchors.valid[..., None, None]
    log_probs = completion_log_probs(model, prefix, anchors, completions, temperature=0.8).masked_fill(~mask, 0.0)
    truth = token_log_probs(model, prefix.states[:, :-1], batch.tokens[:, 1:], temperature=1.0)
    (gradient,) = torch.autograd.grad(log_probs.sum() + truth.sum(), model.get_input_embeddings().weight)
    network = LocalFeatures(model, depths=(0.5, 1.0), pooling="last_token", normalize="per_layer")
    features = network.embed(batch, anchors, completions)[0].phi.masked_fill(~mask, 0.0)
    return {"log_probs": log_probs.detach(), "truth": truth.detach(), "gradient": gradient, "features": features}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_in_bfloat16_pass_verification(architecture: str) -> None:
    verify(small_model(architecture).bfloat16(), name=architecture, n_tokens=40, completion_length=4)


def test_a_model_loads_in_the_type_that_is_asked_for(tmp_path: Path) -> None:
    name = tiny_config(tmp_path).model
    exact, low = load_model(name), load_model(name, dtype=torch.bfloat16)
    assert {p.dtype for p in low.model.parameters()} == {torch.bfloat16}
    assert low.fingerprint != exact.fingerprint
