"""The block-parallel passes against plain forward passes of one context and one sample at a time."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.nn.attention import flex_attention
from transformers import AutoModelForCausalLM, BloomConfig, GptOssConfig, LlamaConfig, MistralConfig

from ebft_study.algorithm.anchors import Anchors, Contexts, completions_at, find_anchors
from ebft_study.algorithm.features import Normalization
from ebft_study.algorithm.sampling import uniforms
from ebft_study.data import Batch
from ebft_study.errors import ModelError
from ebft_study.features.local import LocalFeatures
from ebft_study.networks import blocks
from ebft_study.networks.blocks import ATTENTION, Decoder, completion_log_probs, run_prefix, token_log_probs
from ebft_study.networks.verification import verify
from ebft_study.rollouts.strided import StridedRollouts
from tests.references import naive_model
from tests.small_models import ARCHITECTURES, VOCABULARY, small_batch, small_model

LAYOUTS = [
    [0] * 20,
    [0] * 14 + [-1] * 6,
    [0] * 8 + [1] * 12,
]
G, S, C, N = 3, 4, 3, 3


def anchored(batch: Batch, completion_length: int = G) -> Anchors:
    return find_anchors(batch.document_ids, completion_length=completion_length, stride=S, first_context_length=C)


def contexts(batch: Batch, anchors: Anchors) -> list[tuple[int, int, torch.Tensor]]:
    """(sequence, anchor, context tokens of the anchor's own document) for every valid anchor."""
    found = []
    for s, b in anchors.valid.nonzero().tolist():
        a = int(anchors.positions[s, b])
        own = batch.document_ids[s] == batch.document_ids[s, a]
        start = int(own.nonzero()[0])
        found.append((s, b, batch.tokens[s, start:a]))
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("completion_length", [1, 3])
def test_rollouts_equal_sampling_each_context_alone(architecture: str, completion_length: int) -> None:
    model, batch = small_model(architecture), small_batch(LAYOUTS)
    anchors = anchored(batch, completion_length)
    B = anchors.positions.shape[1]
    noise = uniforms((7,), [0, 1, 2], n_anchors=B, n_samples=N, length=completion_length)
    rollouts = StridedRollouts().sample(model, batch, anchors, noise=noise, temperature=0.8)
    assert rollouts.completions.shape == (3, B, N, completion_length)
    for s, b, context in contexts(batch, anchors):
        for j in range(N):
            tokens, log_probs = naive_model.sample(model, context, noise[s, b, j], 0.8)
            assert rollouts.completions[s, b, j].tolist() == tokens
            torch.testing.assert_close(rollouts.log_probs[s, b, j], torch.tensor(log_probs), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")  # uncompiled it is slow, says PyTorch
@pytest.mark.parametrize(("architecture", "checkpointing"), [("qwen2-tied", True), ("gemma2-windows", False)])
def test_a_gpu_decodes_by_one_fused_call_per_layer_and_token_with_the_same_result(
    architecture: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)  # it knows gradients on a CPU
    calls: list[int] = []
    fused = blocks.flex_block_attention
    monkeypatch.setattr(blocks, "flex_block_attention", lambda *a, **k: (calls.append(1), fused(*a, **k))[1])
    model, batch = small_model(architecture, layers=2).double().train(), small_batch(LAYOUTS)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    anchors = anchored(batch)
    noise = uniforms((7,), [0, 1, 2], n_anchors=anchors.positions.shape[1], n_samples=N, length=G)
    found = []
    for attention in ("chunked", "flex"):
        rollouts = StridedRollouts(attention).sample(model, batch, anchors, noise=noise, temperature=0.8)
        assert len(calls) == (0 if attention == "chunked" else 2 * (G - 1))
        gradients = torch.autograd.grad(rollouts.log_probs[anchors.valid].square().sum(), list(model.parameters()))
        with torch.no_grad():
            again = StridedRollouts(attention).sample(model, batch, anchors, noise=noise, temperature=0.8)
        assert torch.equal(again.completions, rollouts.completions)
        found.append([rollouts.completions, rollouts.log_probs.detach(), again.log_probs, *gradients])
    for ours, expected in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)


def test_long_blocks_are_decoded_in_chunks_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fused(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(blocks, "flex_block_attention", fused)
    model, batch = small_model(), small_batch([[0] * 4])
    prefix = run_prefix(model, batch.tokens, batch.document_ids)
    where = blocks.Blocks(Contexts(torch.zeros(1, 2, dtype=torch.long), torch.full((1, 2), 4)))
    Decoder(model, prefix, where, blocks.LONGEST_FUSED + 1, backend="flex").advance(torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(AssertionError):
        Decoder(model, prefix, where, blocks.LONGEST_FUSED, backend="flex").advance(torch.zeros(1, 2, dtype=torch.long))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("completion_length", [1, 3])
def test_log_probs_and_gradients_equal_scoring_each_completion_alone(architecture: str, completion_length: int) -> None:
    model, batch = small_model(architecture), small_batch(LAYOUTS)
    anchors = anchored(batch, completion_length)
    shape = (*anchors.positions.shape, N, completion_length)
    completions = torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(2))

    fast = _fast_log_probs(model, batch, anchors, completions)
    mask = anchors.valid[..., None, None].expand(shape)
    torch.where(mask, weights * fast, 0.0).sum().backward()
    gradients = _take_gradients(model)

    slow = torch.zeros(())
    for s, b, context in contexts(batch, anchors):
        for j in range(N):
            alone = naive_model.completion_log_probs(model, context, completions[s, b, j], 0.7)
            torch.testing.assert_close(fast[s, b, j].detach(), alone.detach(), atol=1e-5, rtol=1e-5)
            slow = slow + (weights[s, b, j] * alone).sum()
    slow.backward()
    for name, expected in _take_gradients(model).items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(gradients[name], expected, atol=1e-4 * scale, rtol=1e-4)


def _fast_log_probs(model: nn.Module, batch: Batch, anchors: Anchors, completions: torch.Tensor) -> torch.Tensor:
    prefix = run_prefix(model, batch.tokens, batch.document_ids)
    return completion_log_probs(model, prefix, anchors, completions, temperature=0.7)


def _take_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pooling", ["last_token", "mean", "concat"])
@pytest.mark.parametrize("normalize", get_args(Normalization))
@pytest.mark.parametrize("depths", [(0.25, 0.5, 0.75), (0.5, 1.0)])
def test_features_equal_those_of_each_completion_alone(
    architecture: str, pooling: str, normalize: str, depths: tuple[float, ...]
) -> None:
    model, batch = small_model(architecture), small_batch(LAYOUTS)
    anchors = anchored(batch)
    completions = torch.randint(
        0, VOCABULARY, (*anchors.positions.shape, N, G), generator=torch.Generator().manual_seed(3)
    )
    network = LocalFeatures(small_model(architecture), depths=depths, pooling=pooling, normalize=normalize)
    layers = [max(1, int(depth * 4)) for depth in depths]
    truth = completions_at(batch.tokens, anchors, G)
    for length, features in zip([2, G], network.embed(batch, anchors, completions, lengths=[2, G]), strict=True):
        for s, b, context in contexts(batch, anchors):
            expected = naive_model.features(model, context, truth[s, b, :length], layers, pooling, normalize)
            torch.testing.assert_close(features.psi[s, b], expected, atol=1e-5, rtol=1e-5)
            for j in range(N):
                one = completions[s, b, j, :length]
                expected = naive_model.features(model, context, one, layers, pooling, normalize)
                torch.testing.assert_close(features.phi[s, b, j], expected, atol=1e-5, rtol=1e-5)


def test_the_feature_network_runs_nothing_above_its_deepest_layer() -> None:
    network = small_model(layers=4)
    LocalFeatures(network, depths=(0.25, 0.5), pooling="last_token", normalize="per_layer")
    assert len(network.get_decoder().layers) == 2


def test_packed_documents_give_what_each_document_alone_gives() -> None:
    model = small_model()
    packed = small_batch([[0] * 9 + [1] * 11])
    noise = torch.rand(1, 9, N, G, generator=torch.Generator().manual_seed(5))
    anchors = anchored(packed)
    together = StridedRollouts().sample(
        model, packed, anchors, noise=noise[:, : anchors.positions.shape[1]], temperature=1.0
    )
    first_count = int((anchors.positions[0] < 9).sum())
    for begin, end, offset in ((0, 9, 0), (9, 20, first_count)):
        alone = Batch(
            packed.tokens[:, begin:end],
            torch.zeros(1, end - begin).long(),
            packed.answer_mask[:, begin:end],
            torch.tensor([0]),
        )
        own = anchored(alone)
        B = own.positions.shape[1]
        separate = StridedRollouts().sample(model, alone, own, noise=noise[:, offset : offset + B], temperature=1.0)
        assert torch.equal(separate.completions, together.completions[:, offset : offset + B])


def test_a_batch_without_anchors_gives_empty_rollouts() -> None:
    batch = small_batch([[0] * 4])
    anchors = anchored(batch)
    rollouts = StridedRollouts().sample(small_model(), batch, anchors, noise=torch.empty(1, 0, N, G), temperature=1.0)
    assert rollouts.completions.shape == (1, 0, N, G)


def test_log_probs_computed_in_chunks_equal_those_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    states = torch.randn(2, 5, 32, requires_grad=True)
    tokens = torch.randint(0, VOCABULARY, (2, 5))
    whole = token_log_probs(model, states, tokens, temperature=0.6)
    (expected,) = torch.autograd.grad(whole.sum(), states)
    monkeypatch.setattr(blocks, "logits_at_once", lambda device: 3 * VOCABULARY)
    chunked = token_log_probs(model, states, tokens, temperature=0.6)
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(torch.autograd.grad(chunked.sum(), states)[0], expected)


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.25,
}  # fmt: skip


def built(config: Any, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).eval()


@pytest.mark.parametrize("window", [1, 3, 9, 30])
def test_a_model_with_sliding_windows_passes_verification(window: int) -> None:
    verify(built(MistralConfig(**SIZES, sliding_window=window)), name="windowed", n_tokens=40, completion_length=4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_supported_architectures_pass_verification(architecture: str) -> None:
    verify(small_model(architecture), name=architecture, n_tokens=40, completion_length=4)


def test_a_difference_that_shows_only_in_long_sequences_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if block attention ignored the windows: 12 tokens, which were checked once, do not show it."""
    model = built(MistralConfig(**SIZES, sliding_window=20))
    monkeypatch.setattr(blocks.AttentionVariant, "among", lambda variant, n_tokens: variant._replace(window=None))
    verify(model, name="windowed", n_tokens=12, completion_length=3)
    with pytest.raises(ModelError, match="differ from its own forward pass by"):
        verify(model, name="windowed", n_tokens=40, completion_length=3)


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 64),
        ({"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4,
          "original_max_position_embeddings": 24}, 24),
    ],
)  # fmt: skip
def test_rotary_positions_that_depend_on_the_length_are_equal_up_to_it(rope: dict[str, Any], limit: int) -> None:
    verify(built(LlamaConfig(**SIZES, rope_parameters=rope)), name="long", n_tokens=limit - 4, completion_length=4)


def test_longrope_is_refused_beyond_its_original_length() -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4,
            "original_max_position_embeddings": 24}  # fmt: skip
    with pytest.raises(ModelError, match="change beyond 24 tokens, and the run needs 30"):
        verify(built(LlamaConfig(**SIZES, rope_parameters=rope)), name="long", n_tokens=26, completion_length=4)


def test_attention_that_depends_on_something_unknown_is_refused_by_name() -> None:
    config = GptOssConfig(**SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=16)
    with pytest.raises(ModelError, match="depends on 's_aux', which block attention does not support"):
        verify(built(config), name="gpt-oss", n_tokens=20, completion_length=4)


def test_another_layout_of_a_decoder_is_refused_in_one_line() -> None:
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(ModelError, match=r"^model 'bloom': .*docs/architectures.md lists all$"):
        verify(built(config), name="bloom", n_tokens=20, completion_length=4)


def test_dropout_is_refused_where_it_is_left() -> None:
    model = built(LlamaConfig(**SIZES, attention_dropout=0.2))
    with pytest.raises(ModelError, match="depends on 'dropout'"):
        verify(model, name="dropout", n_tokens=20, completion_length=4)
