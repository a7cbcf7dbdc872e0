"""Refuses models whose block passes are not exactly what the model computes by itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor, nn

from ebft_study.algorithm.anchors import Anchors
from ebft_study.errors import ModelError, one_line
from ebft_study.networks.blocks import (
    Backend,
    captured_layers,
    completion_log_probs,
    decoder_names,
    mlp_only_at,
    next_token_log_probs,
    run_prefix,
)

SUPPORTED = (
    "Use a decoder-only model with standard attention, such as Qwen2, Qwen3, Llama, Mistral or Gemma; "
    "docs/architectures.md lists all"
)
ModuleT = TypeVar("ModuleT", bound=nn.Module)
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 4e-2}
"""Measured in bfloat16: at most 0.022 between two orders of the same sums, 0.085 and more for unsupported attention."""


@torch.no_grad()
def verify(model: nn.Module, *, name: str, n_tokens: int, completion_length: int, backend: Backend = "auto") -> None:
    """Refuse a model whose block passes differ from its own forward pass over as many tokens as a run has.

    One plain pass over `n_tokens + completion_length` tokens (or as many as the model has positions for), with the
    model's own `eager` attention, shows the log-probabilities of the prefix, and of completions early, in the middle
    and at the end of it. Block passes run in training mode, in which nothing may be random. Rounding to 16 bits hides
    small differences, so such a model is first compared in float32, where there is memory for a copy.

    Raises:
        ModelError: with the property of the architecture that is not supported, or the largest difference.
    """
    try:
        if next(model.parameters()).dtype != torch.float32 and _has_room_for_float32(model):
            _compare(copy_with_weights(model, torch.float32).float(), n_tokens, completion_length, "chunked")
        _compare(model, n_tokens, completion_length, backend)
    except ModelError as error:
        raise ModelError(f"model {name!r}: {error}") from None


def copy_with_weights(model: ModuleT, dtype: torch.dtype) -> ModuleT:
    """A frozen copy with all weights of type `dtype`, made without a copy of them in their own type."""
    cast = {
        id(parameter): nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=False)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, cast)  # type: ignore[arg-type]


def _compare(model: nn.Module, n_tokens: int, completion_length: int, backend: Backend) -> None:
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    x, anchors, completions = _probe(model, n_tokens, completion_length)
    try:
        _refuse_length_dependent_positions(model.config, x.shape[1])
        with _mode(model, training=True):
            _check_layers(model, x[:, : min(x.shape[1], 8)])
            prefix = run_prefix(model, x, torch.zeros_like(x))
            scored = completion_log_probs(model, prefix, anchors, completions, temperature=1.0, backend=backend)
            ours = next_token_log_probs(model, prefix.states, x)[0], scored[0, :, 0].flatten()
        with _mode(model, training=False), _own_attention(model):
            logits = model(input_ids=x, use_cache=False).logits[0, :-1]
    except torch.OutOfMemoryError:
        raise
    except ModelError as error:
        raise ModelError(f"{error}. {SUPPORTED}") from None
    except (TypeError, AttributeError, KeyError, IndexError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and device.type != "cpu" and backend != "chunked":
            problem = f"FlexAttention cannot be compiled or run here ({one_line(error)[:200]})"
            raise ModelError(f"{problem}. Use training.attention=chunked") from error
        problem = f"its architecture does not run with block-parallel rollouts ({one_line(error)})"
        raise ModelError(f"{problem}. {SUPPORTED}") from error
    plain = torch.cat([part.float().log_softmax(-1) for part in logits.split(256)]).gather(-1, x[0, 1:, None])[:, 0]
    of_completions = anchors.positions[0, :, None] + torch.arange(completion_length, device=device) - 1
    expected = plain, plain[of_completions.flatten()]
    difference = max(relative_difference(*pair, dtype) for pair in zip(ours, expected, strict=True))
    if not difference <= TOLERANCE[dtype]:
        raise ModelError(
            f"block-parallel rollouts differ from its own forward pass by {100 * difference:.3g} % of a "
            f"log-probability over {x.shape[1]} tokens. {SUPPORTED}"
        )


def relative_difference(ours: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """Difference of log-probabilities that passes in `dtype` computed.

    In float32 the largest, relative to the largest log-probability. In 16 bits the mean, relative to the mean: two
    orders of the same sums differ by much at single tokens, above all where rounding chooses another expert.
    """
    summary = torch.max if dtype == torch.float32 else torch.mean
    return float(summary((expected - ours).float().abs()) / summary(expected.float().abs()).clamp(min=1.0))


def _has_room_for_float32(model: nn.Module) -> bool:
    """Whether a copy takes no more than a quarter of the free memory, which other trials may want, too."""
    device = next(model.parameters()).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return 4 * sum(p.numel() for p in model.parameters()) < free / 4


def _check_layers(model: nn.Module, tokens: Tensor) -> None:
    """Every layer must give one state per token, from attention over them; and the last MLP may run for some alone."""
    layers: nn.ModuleList = getattr(model.get_decoder(), decoder_names(model).layers)  # type: ignore[operator]
    n_layers, last = len(layers), tokens.shape[1] - 1
    with captured_layers(model, list(range(1, n_layers + 1))) as captured:
        prefix = run_prefix(model, tokens, torch.zeros_like(tokens))
    if len(prefix.keys_values) != n_layers:
        without = n_layers - len(prefix.keys_values)
        raise ModelError(f"{without} of its {n_layers} layers have no attention that block attention can replace")
    if any(states.shape != prefix.states.shape for states in captured.values()):
        raise ModelError("its layers do not give one state per token")
    with mlp_only_at(layers[-1], torch.tensor([last], device=tokens.device)):
        alone = run_prefix(model, tokens, torch.zeros_like(tokens)).states[:, last]
    if not torch.allclose(alone.float(), prefix.states[:, last].float(), rtol=0.05, atol=0.05):
        raise ModelError("its last layer computes something else for one token than for all")


def _probe(model: nn.Module, n_tokens: int, completion_length: int) -> tuple[Tensor, Anchors, Tensor]:
    """Random tokens, anchors in them, and two completions of each: its true one, and a random one beside it."""
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(0)
    vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    G, longest = completion_length, getattr(model.config, "max_position_embeddings", None)
    n_tokens = max(min(n_tokens, (longest or n_tokens + G) - G), 1)
    x = torch.randint(0, vocabulary, (1, n_tokens + G), generator=generator)
    positions = torch.tensor([[min(4, n_tokens), (n_tokens + 1) // 2, n_tokens]])
    true = x[0, positions[0, :, None] + torch.arange(G)]
    other = torch.randint(0, vocabulary, true.shape, generator=generator)
    anchors = Anchors(positions.to(device), torch.ones_like(positions, dtype=torch.bool, device=device))
    return x.to(device), anchors, torch.stack([true, other], dim=1)[None].to(device)


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


@contextmanager
def _own_attention(model: nn.Module) -> Iterator[None]:
    """Context in which the model runs with the attention of its own code."""
    before = model.config._attn_implementation  # type: ignore[union-attr]
    model.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]


def _refuse_length_dependent_positions(config: Any, n_tokens: int) -> None:
    """Refuse rotary frequencies that change with the length of a sequence, so that no prefix can be shared.

    Those of `dynamic` change beyond `max_position_embeddings` only, which no run passes.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    for rope in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        limit = rope.get("original_max_position_embeddings")
        if rope.get("rope_type") == "longrope" and limit and n_tokens > limit:
            raise ModelError(
                f"its longrope positions change beyond {limit} tokens, and the run needs {n_tokens}: contexts cannot "
                "be shared there"
            )
