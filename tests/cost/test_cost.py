"""The cost model against what PyTorch counts: FLOPs, saved activations and live bytes of the real step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ebft_study.algorithm import attention
from ebft_study.algorithm.anchors import Anchors, find_anchors
from ebft_study.algorithm.features import layer_indices
from ebft_study.config import RunConfig, build_run
from ebft_study.cost import (
    Limits,
    MicroBatchPlan,
    ModelShape,
    StepShape,
    memory,
    saved_bytes_per_token,
    step_cost,
)
from ebft_study.data import Batch
from ebft_study.features import local
from ebft_study.features.local import LocalFeatures
from ebft_study.methods import LossDenominators, MetricAccumulator
from ebft_study.methods.ebft import Ebft
from ebft_study.methods.judging import Judging
from ebft_study.methods.rlvr import Rlvr
from ebft_study.methods.sft import Sft
from ebft_study.networks import blocks
from ebft_study.networks.blocks import ATTENTION, Blocks, run_blocks, run_prefix
from ebft_study.rollouts import answer_anchors
from ebft_study.rollouts.answers import InProcessAnswers
from ebft_study.rollouts.strided import StridedRollouts
from ebft_study.verifiers import Problem, load_verifier
from tests.rollout_backends import WithoutGraph

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def limits_of_the_implementation(device_type: str) -> Limits:
    device = torch.device(device_type)
    return Limits(
        logits_at_once=blocks.logits_at_once(device),
        scores_at_once=blocks._scores_at_once(device),
        feature_tokens_at_once=local.TOKENS_PER_PASS[device_type],
        chunks=attention.CHUNKS[device_type],
        fused_attention=blocks.backend_on(device) == "flex",
        fused_decoding=blocks.LONGEST_FUSED if blocks.backend_on(device) == "flex" else 0,
    )


CPU = limits_of_the_implementation("cpu")


def build(*, tied: bool, **sizes: Any) -> PreTrainedModel:
    """Tied Qwen2 (with biases) or untied Llama."""
    torch.manual_seed(0)
    config_type, model_type = (Qwen2Config, Qwen2ForCausalLM) if tied else (LlamaConfig, LlamaForCausalLM)
    config = config_type(**{**SIZES, **sizes}, tie_word_embeddings=tied)
    model: PreTrainedModel = model_type._from_config(config, attn_implementation=ATTENTION)
    return model.train()


@dataclass(frozen=True)
class Case:
    """A step, by the settings that it depends on."""

    T: int = 64
    stride: int = 8
    n: int = 2
    G: int = 4
    gamma: float = 0.0
    depths: tuple[float, ...] = (0.25, 0.5, 0.75)
    tied: bool = True
    method: str = "ebft"
    kl: float = 0.0
    checkpointing: bool = False
    rescoring: bool = False
    bfloat16: bool = False
    anchors_at_once: int | None = None
    answers: int | None = None
    """L, tokens of whole answers to one prompt per sequence."""
    sizes: dict[str, int] = field(default_factory=dict)
    feature_sizes: dict[str, int] = field(default_factory=dict)
    S: int = 2

    def config(self) -> RunConfig:
        alone = {"alpha": 0.0, "baseline": "none"}
        settings: dict[str, Any] = {
            "method": self.method,
            "data": {"sequence_length": self.T},
            "rollout": {"n_samples": self.n, "completion_length": self.G, "stride": self.stride},
            "features": {"depths": self.depths},
            "loss": {"gamma": self.gamma, "kl_coefficient": self.kl},
            "reward": alone if self.n == 1 else {},
            "evaluation": {"profile_lengths": (1,)},
            "training": {"batch_size": self.S, "precision": "bfloat16" if self.bfloat16 else "float32"},
            "verifier": {"verifier": "bleu"} if self.answers else {},
        }
        settings["rollout"] |= {"max_answer_tokens": self.answers}
        return build_run(settings, source="test")

    def step(self) -> StepShape:
        kept = not self.rescoring and self.answers is None
        return StepShape.from_config(
            self.config(), activation_checkpointing=self.checkpointing, differentiable_rollouts=kept
        )

    def plan(self) -> MicroBatchPlan:
        whole = MicroBatchPlan.whole(self.step())
        return replace(whole, anchors_at_once=self.anchors_at_once or whole.anchors_at_once)

    def models(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        model = build(tied=self.tied, **self.sizes)
        if self.checkpointing:
            model.gradient_checkpointing_enable()
        return model, build(tied=self.tied, **{**self.sizes, **self.feature_sizes})

    def batch(self) -> tuple[Batch, Anchors]:
        vocabulary = {**SIZES, **self.sizes}["vocab_size"]
        tokens = torch.randint(0, vocabulary, (self.S, self.T), generator=torch.Generator().manual_seed(1))
        answered = torch.arange(self.T).expand(self.S, -1) >= self.T - (self.answers or self.T)
        batch = Batch(tokens, torch.zeros_like(tokens), answered, torch.arange(self.S))
        if self.answers:
            return batch, answer_anchors(batch, self.answers)
        anchors = find_anchors(
            batch.document_ids, completion_length=self.G, stride=self.stride, first_context_length=self.stride
        )
        return batch, anchors


class Watched:
    """A backend whose calls are reported before and after."""

    def __init__(self, inner: Any, before: Callable[[], None], after: Callable[[], None]) -> None:
        self.inner, self.before, self.after = inner, before, after

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.before()
            result = getattr(self.inner, name)(*args, **kwargs)
            self.after()
            return result

        return call


def run_step(
    case: Case, model: nn.Module, network: LocalFeatures, enter: Callable[[], None], leave: Callable[[str], None]
) -> MetricAccumulator:
    """The real gradient of one step; `enter` and `leave` are called around rollouts and features."""
    config, accumulator = case.config(), MetricAccumulator()
    batch, anchors = case.batch()
    method: Any = Sft(config.loss)
    if case.method == "ebft":
        method = Ebft(
            config,
            rollouts=Watched(
                StridedRollouts() if case.step().differentiable_rollouts else WithoutGraph(),
                enter,
                lambda: leave("rollouts"),
            ),
            features=Watched(network, enter, lambda: leave("features")),
            base=build(tied=case.tied, **case.sizes).requires_grad_(False) if case.kl else None,
            anchors_at_once=case.anchors_at_once,
        )
    if case.answers:
        problems = {"train": [Problem("", "")] * case.S}
        method = Rlvr(
            config,
            sampler=Watched(InProcessAnswers(), enter, lambda: leave("rollouts")),
            judging=Judging(load_verifier(config.verifier), problems, Letters()),
            base=build(tied=case.tied, **case.sizes).requires_grad_(False) if case.kl else None,
            end_tokens=[],
        )
    noise = torch.rand(*anchors.positions.shape, case.n, case.G, generator=torch.Generator().manual_seed(2))
    denominators = LossDenominators(float(anchors.valid.sum()), float(batch.tokens[:, 1:].numel()))
    with torch.autocast("cpu", torch.bfloat16, enabled=case.bfloat16):
        method.backward(model, batch, anchors, noise=noise, denominators=denominators, accumulator=accumulator)
    return accumulator


class Letters:
    """A tokenizer whose tokens are single characters."""

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(map(chr, tokens))


def features_of(network: PreTrainedModel, case: Case) -> LocalFeatures:
    return LocalFeatures(network, depths=case.depths, pooling="last_token", normalize="per_layer")


# --- shapes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config_type", "model_type", "changes"),
    [
        (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
        (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": False}),
        (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
        (LlamaConfig, LlamaForCausalLM, {}),
        (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True, "head_dim": 8}),
    ],
)
def test_parameters_are_those_of_the_real_model(config_type: Any, model_type: Any, changes: dict[str, Any]) -> None:
    model = model_type(config_type(**SIZES, **changes))
    shape = ModelShape.from_config(model.config)
    assert shape.n_parameters == sum(p.numel() for p in model.parameters())
    assert shape.body_parameters == sum(p.numel() for p in model.get_decoder().parameters())


@pytest.mark.parametrize("n_layers", [1, 3, 10, 28])
@pytest.mark.parametrize("depths", [(0.25,), (0.7, 0.25), (1.0,), (0.01,)])
def test_a_network_is_cut_where_its_features_are_read(n_layers: int, depths: tuple[float, ...]) -> None:
    shape = replace(ModelShape.from_config(Qwen2Config(**SIZES)), n_layers=n_layers)
    assert shape.cut(depths).n_layers == max(layer_indices(depths, n_layers))


@pytest.mark.parametrize("case", [Case(), Case(T=61, stride=5, G=7), Case(T=12, stride=8, G=4), Case(G=1)])
def test_anchors_are_those_of_a_full_sequence(case: Case) -> None:
    _, anchors = case.batch()
    assert list(case.step().anchors) == anchors.positions[0].tolist()


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_limits_are_those_of_the_implementation(device_type: str) -> None:
    assert Limits.on(device_type) == limits_of_the_implementation(device_type)


# --- work ------------------------------------------------------------------------------------------------------


def count_attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def count_attention_backward(upstream: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:  # fmt: skip # noqa: E501
    return int(sdpa_backward_flop_count(upstream, query, key, value))


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: count_attention_backward,
}
"""The counter knows the attention kernels of GPUs only."""


def count_step(case: Case, model: nn.Module, network: PreTrainedModel) -> tuple[dict[str, int], float]:
    """FLOPs by phase that PyTorch counts, and the share of duplicates among the completions."""
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    counted, begin = {"rollouts": 0, "features": 0}, [0]

    def enter() -> None:
        begin[0] = counter.get_total_flops()

    def leave(name: str) -> None:
        counted[name] += counter.get_total_flops() - begin[0]

    with counter:
        accumulator = run_step(case, model, features_of(network, case), enter, leave)
    counted["scoring"] = counter.get_total_flops() - sum(counted.values())
    return counted, accumulator.mean("duplicate_rate") if case.method == "ebft" else 0.0


FLOP_CASES = {
    "plain": Case(),
    "untied, cross-entropy, long completions": Case(
        T=128, stride=6, n=4, G=8, gamma=0.1, depths=(0.5, 1.0), tied=False
    ),
    "dense anchors, shallow features": Case(T=256, stride=3, n=4, G=8, depths=(0.25,)),
    "dense anchors in parts": Case(T=128, stride=3, n=4, G=8, anchors_at_once=7),
    "one token, one sample": Case(T=64, stride=4, n=1, G=1, depths=(1.0,), tied=False),
    "one token, cross-entropy": Case(T=128, stride=5, G=1, gamma=0.1, depths=(0.75,)),
    "wide stride": Case(T=256, stride=16, depths=(0.25, 0.5), tied=False),
    "scored again": Case(T=128, stride=4, n=4, G=8, gamma=0.1, rescoring=True),
    "scored again in parts": Case(T=256, stride=6, tied=False, rescoring=True, anchors_at_once=7),
    "scored again, logits in chunks": Case(T=128, n=4, rescoring=True, sizes={"vocab_size": 60_000}),
    "checkpointing": Case(T=128, gamma=0.1, checkpointing=True),
    "checkpointing in parts": Case(T=128, stride=4, checkpointing=True, anchors_at_once=5),
    "another feature network": Case(
        gamma=0.1, feature_sizes={"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 8}
    ),
    "KL term": Case(kl=0.1),
    "logits in chunks": Case(T=256, n=8, gamma=0.1, sizes={"vocab_size": 60_000}),
    "duplicates": Case(T=128, stride=3, n=4, G=1, sizes={"vocab_size": 16}),
    "answers": Case(method="rlvr", answers=32, n=4, gamma=0.1),
    "answers, KL term": Case(method="rlvr", T=96, answers=48, kl=0.1, tied=False, checkpointing=True),
    "sft": Case(method="sft"),
    "sft, logits in chunks": Case(T=256, method="sft", tied=False, sizes={"vocab_size": 60_000}),
}


@pytest.mark.parametrize("name", FLOP_CASES)
def test_flops_are_those_that_pytorch_counts(name: str) -> None:
    case = FLOP_CASES[name]
    model, network = case.models()
    shapes = ModelShape.from_config(model.config), ModelShape.from_config(network.config)
    counted, duplicate_rate = count_step(case, model, network)
    cost = step_cost(
        *shapes, case.step(), plan=case.plan(), limits=CPU, counting="executed", duplicate_rate=duplicate_rate
    )
    for phase, flops in counted.items():
        # Rewards are not modelled: Gram matrices of n vectors per context. Sequences with fewer distinct completions
        # than others are padded, so duplicates spare a little less than their share.
        tolerance = 0.05 if duplicate_rate else 0.01
        assert getattr(cost, phase).flops == pytest.approx(flops, rel=tolerance), phase
    assert cost.total.flops == pytest.approx(sum(counted.values()), rel=tolerance)


def test_prefix_and_blocks_apart_are_what_pytorch_counts() -> None:
    case = Case(T=128, G=5, rescoring=True)
    model, _ = case.models()
    batch, anchors = case.batch()
    blocks = Blocks.of(batch.document_ids, anchors, case.n)
    tokens = torch.zeros(case.S, anchors.positions.shape[1] * case.n, case.G - 1, dtype=torch.long)
    counters = [FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) for _ in range(2)]
    with counters[0]:
        prefix = run_prefix(model, batch.tokens, batch.document_ids)
    with counters[1]:
        run_blocks(model, prefix, blocks, tokens)
    shape, step = ModelShape.from_config(model.config), case.step()
    forward = step_cost(shape, shape, step, limits=CPU, counting="executed").scoring_forward.flops
    alone = step_cost(shape, shape, replace(step, method="sft"), limits=CPU, counting="executed").scoring_forward.flops
    truth, completions = (case.S * shape.head_flops(rows) for rows in (case.T - 1, step.block_rows))
    assert alone - truth == pytest.approx(counters[0].get_total_flops(), rel=1e-6)
    assert forward - alone - completions == pytest.approx(counters[1].get_total_flops(), rel=1e-6)


def test_needed_attention_is_every_pair_of_a_query_and_a_key_it_may_see() -> None:
    case = Case(T=30, stride=7, n=3, G=5, rescoring=True)
    step, shape = case.step(), ModelShape.from_config(Qwen2Config(**SIZES))
    prefix = sum(t + 1 for t in range(case.T))
    run, embedded = 0, 0
    for anchor in range(7, 26, 7):
        run += case.n * sum(anchor + t + 1 for t in range(case.G - 1))
        embedded += case.n * sum(anchor + t + 1 for t in range(case.G))
    per_pair = 4 * shape.query_size * case.S
    with_attention = step_cost(shape, shape, step)
    without = step_cost(replace(shape, n_heads=0), replace(shape, n_heads=0), step)
    matrices = 2 * 2 * shape.hidden_size * shape.query_size  # q and o, which vanish with the heads
    tokens = with_attention.rollouts.token_forwards
    assert tokens == case.S * 3 * case.n * (case.G - 1)
    pairs = (with_attention.rollouts.flops - without.rollouts.flops) / 4 - matrices * tokens
    assert pairs == pytest.approx(per_pair * run)
    tokens = with_attention.scoring_forward.token_forwards
    assert tokens == case.S * (case.T + 3 * case.n * (case.G - 1))
    pairs = (with_attention.scoring_forward.flops - without.scoring_forward.flops) / 4 - matrices * tokens
    assert pairs == pytest.approx(per_pair * (prefix + run))
    tokens = with_attention.features.token_forwards
    assert tokens == case.S * (case.T + 3 * case.n * case.G)
    pairs = (with_attention.features.flops - without.features.flops) / 3 - matrices * tokens
    assert pairs == pytest.approx(per_pair * (prefix + embedded))


def test_needed_is_never_more_than_executed() -> None:
    for case in FLOP_CASES.values():
        shape = ModelShape.from_config(Qwen2Config(**SIZES))
        needed, executed = (
            step_cost(shape, shape, case.step(), limits=CPU, counting=counting) for counting in ("needed", "executed")
        )
        assert 0.7 * executed.total.flops < needed.total.flops <= executed.total.flops


def test_completions_that_repeat_another_are_embedded_once() -> None:
    shape, step = ModelShape.from_config(Qwen2Config(**SIZES)), Case().step()
    none, half, every = (step_cost(shape, shape, step, duplicate_rate=rate).features for rate in (0.0, 0.5, 1.0))
    completions = step.n_blocks * step.completion_length
    assert none.token_forwards == step.batch_size * (step.sequence_length + completions)
    assert half.token_forwards == step.batch_size * (step.sequence_length + completions / 2)
    assert half.flops == pytest.approx((none.flops + every.flops) / 2)


def test_a_plan_changes_no_needed_flops() -> None:
    shape = ModelShape.from_config(Qwen2Config(**SIZES))
    step = replace(Case(T=128, n=2, G=4).step(), batch_size=8)
    cut = step_cost(shape, shape, step, plan=MicroBatchPlan(4, 100))
    assert cut.total.flops == step_cost(shape, shape, step).total.flops


def test_adapters_spare_the_gradients_of_frozen_matrices() -> None:
    shape = ModelShape.from_config(Qwen2Config(**SIZES))
    adapted = replace(shape, trainable_parameters=1000)
    step = Case().step()
    full, light = (step_cost(model, shape, step) for model in (shape, adapted))
    assert light.scoring_backward.flops < 0.7 * full.scoring_backward.flops
    assert light.scoring_forward.flops > full.scoring_forward.flops


def test_sampling_that_keeps_no_graph_is_paid_for_once_more() -> None:
    shape, step = ModelShape.from_config(Qwen2Config(**SIZES)), Case(G=8).step()
    kept, again = (step_cost(shape, shape, replace(step, differentiable_rollouts=d)) for d in (True, False))
    assert again.rollouts == kept.rollouts
    assert again.scoring_backward.flops == kept.scoring_backward.flops
    blocks = again.scoring_forward.flops - kept.scoring_forward.flops
    assert blocks == pytest.approx(kept.rollouts.flops, rel=1e-9)
    checkpointed = step_cost(shape, shape, replace(step, activation_checkpointing=True))
    assert checkpointed.scoring_forward == kept.scoring_forward
    assert checkpointed.scoring_backward.flops > kept.scoring_backward.flops


# --- memory ----------------------------------------------------------------------------------------------------


def saved_bytes(model: nn.Module, run: Callable[[], Any], *, known: list[Tensor], bfloat16: bool) -> tuple[Any, int]:
    """The result of `run`, and the bytes that autograd saved: neither parameters, nor their casts, nor `known`."""
    ignored = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *known]}
    weights = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape)[::-1] for p in model.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tuple(tensor.shape) not in weights:
            saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        result = run()
    return result, sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in ignored)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"num_key_value_heads": 4, "intermediate_size": 300}])
def test_activations_are_those_that_autograd_saves(bfloat16: bool, tied: bool, sizes: dict[str, int]) -> None:
    case = Case(T=61, n=3, G=5, bfloat16=bfloat16, tied=tied, sizes=sizes)
    model, _ = case.models()
    shape, step = ModelShape.from_config(model.config), case.step()
    batch, anchors = case.batch()
    prefix, saved = saved_bytes(
        model, lambda: run_prefix(model, batch.tokens, batch.document_ids), known=[], bfloat16=bfloat16
    )
    n_tokens = batch.tokens.numel()
    expected = n_tokens * shape.n_layers * saved_bytes_per_token(shape, step, blocks=False)
    assert expected == pytest.approx(saved, rel=0.1)

    leaves = prefix.leaves()
    blocks = Blocks.of(batch.document_ids, anchors, case.n)
    tokens = torch.zeros(case.S, anchors.positions.shape[1] * case.n, case.G - 1, dtype=torch.long)
    known = [tensor for pair in leaves.keys_values.values() for tensor in pair]
    _, saved = saved_bytes(model, lambda: run_blocks(model, leaves, blocks, tokens), known=known, bfloat16=bfloat16)
    expected = tokens.numel() * shape.n_layers * saved_bytes_per_token(shape, step, blocks=True)
    assert expected == pytest.approx(saved, rel=0.1)


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that exist, and the most there were since `peak` was last reset."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            self.seen.add(storage)
            self._change(storage.nbytes())
            weakref.finalize(storage, self._change, -storage.nbytes())

    def _change(self, n_bytes: int) -> None:
        self.live += n_bytes
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.note(leaf)
        return result


def measure_peaks(case: Case, *, has_gradients: bool = True) -> dict[str, int]:
    """Largest number of live bytes in every phase of a real step, optimizer states left out.

    Args:
        has_gradients: of micro-batches before this one; otherwise it is the first of its step.
    """
    model, network = case.models()
    features, tracker = features_of(network, case), LiveBytes()
    peaks = {"scoring": 0, "rollouts": 0, "features": 0}
    for parameter in model.parameters():
        tracker.note(parameter)
        if has_gradients:
            parameter.grad = torch.zeros_like(parameter)
            tracker.note(parameter.grad)
    for parameter in network.get_decoder().parameters():
        tracker.note(parameter)

    def enter() -> None:
        leave("scoring")

    def leave(name: str) -> None:
        peaks[name] = max(peaks[name], tracker.peak)
        tracker.peak = tracker.live

    with tracker:
        run_step(case, model, features, enter, leave)
    # The second step starts from what the first one leaves behind.
    if not has_gradients:
        model.zero_grad(set_to_none=True)
    peaks.update(scoring=0, rollouts=0, features=0)
    tracker.peak = tracker.live
    with tracker:
        run_step(case, model, features, enter, leave)
    leave("scoring")
    return peaks


WIDE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 8}
MEMORY_CASES = {
    "whole": Case(T=128, n=4, G=8, gamma=0.1, sizes=WIDE),
    "whole, bfloat16": Case(T=128, n=4, G=8, gamma=0.1, bfloat16=True, sizes=WIDE),
    "in parts": Case(T=128, stride=4, n=4, tied=False, anchors_at_once=8, depths=(0.5, 1.0), sizes=WIDE),
    "in parts, bfloat16": Case(T=128, stride=4, n=4, bfloat16=True, anchors_at_once=8, sizes=WIDE),
    "scored again": Case(T=128, n=4, G=8, gamma=0.1, rescoring=True, sizes=WIDE),
    "scored again in parts": Case(T=128, stride=4, n=4, tied=False, rescoring=True, anchors_at_once=8, sizes=WIDE),
    "scored again, bfloat16": Case(T=128, n=4, G=8, bfloat16=True, rescoring=True, sizes=WIDE),
    "checkpointing": Case(T=256, stride=16, G=16, gamma=0.1, checkpointing=True, sizes=WIDE),
    "checkpointing, bfloat16": Case(T=256, stride=16, G=16, checkpointing=True, bfloat16=True, sizes=WIDE),
    "checkpointing in parts": Case(T=128, stride=4, n=4, checkpointing=True, anchors_at_once=8, sizes=WIDE),
    "wide vocabulary": Case(T=128, n=4, G=8, sizes={**WIDE, "vocab_size": 20_000}),
    "wide vocabulary, bfloat16": Case(T=128, n=4, G=8, bfloat16=True, sizes={**WIDE, "vocab_size": 20_000}),
    "one token": Case(T=128, G=1, gamma=0.1, sizes=WIDE),
    "answers": Case(method="rlvr", T=128, answers=64, n=4, gamma=0.1, sizes=WIDE),
    "answers, bfloat16": Case(method="rlvr", T=128, answers=64, n=4, bfloat16=True, sizes=WIDE),
    "answers, checkpointing": Case(method="rlvr", T=128, answers=64, n=4, checkpointing=True, sizes=WIDE),
    "answers, wide vocabulary": Case(method="rlvr", T=128, answers=64, n=4, sizes={**WIDE, "vocab_size": 20_000}),
    "sft": Case(T=256, method="sft", sizes=WIDE),
    "sft, wide vocabulary": Case(T=256, method="sft", tied=False, sizes={**WIDE, "vocab_size": 20_000}),
}


@pytest.mark.parametrize("name", MEMORY_CASES)
def test_peak_memory_is_what_the_tensors_of_a_real_step_take(name: str) -> None:
    case = MEMORY_CASES[name]
    step, shape = case.step(), ModelShape.from_config(case.models()[0].config)
    # The only part of a step begins without gradients, and it has those of the head alone when it samples.
    is_only_part = case.plan() == MicroBatchPlan.whole(step) and step.differentiable_rollouts and case.G > 1
    measured = measure_peaks(case, has_gradients=not is_only_part)
    expected = memory(shape, shape, step, case.plan(), limits=CPU)
    head = step.weight_bytes * shape.head_parameters if case.gamma else 0
    for phase, peak in measured.items():
        if peak:
            modelled = expected.phases_bytes[phase] - expected.optimizer_bytes
            modelled -= expected.gradients_bytes - head if is_only_part and phase != "scoring" else 0
            assert modelled == pytest.approx(peak, rel=0.15), phase
    assert expected.peak_bytes == max(expected.phases_bytes.values())


@pytest.mark.parametrize("anchors_at_once", [None, 2])
def test_gradients_of_the_passes_of_a_weight_are_no_second_copy_where_a_step_is_one_part(
    anchors_at_once: int | None,
) -> None:
    """As in training, which begins a step without gradients: they outweigh everything else here."""
    case = Case(T=24, stride=4, S=1, gamma=0.1, anchors_at_once=anchors_at_once, sizes={**WIDE, "hidden_size": 512})
    shape = ModelShape.from_config(case.models()[0].config)
    expected = memory(shape, shape, case.step(), case.plan(), limits=CPU)
    peak = max(measure_peaks(case, has_gradients=False).values())
    assert expected.gradients_bytes > 0.2 * peak
    assert expected.peak_bytes - expected.optimizer_bytes == pytest.approx(peak, rel=0.08)


def test_what_every_worker_holds() -> None:
    shape, step = ModelShape.from_config(Qwen2Config(**SIZES)), replace(Case().step(), batch_size=8)
    plan, n = MicroBatchPlan(2, 4), shape.n_parameters
    alone = memory(shape, shape, step, plan)
    assert (alone.weights_bytes, alone.gradients_bytes, alone.optimizer_bytes) == (4 * n, 4 * n, 8 * n)
    assert alone.frozen_bytes == 4 * shape.cut(step.depths).body_parameters
    assert alone.update_bytes == 0
    repeated = memory(shape, shape, replace(step, world_size=4), plan)
    assert repeated.update_bytes == 8 * n
    averaged = memory(shape, shape, replace(step, weight_average=True), plan)
    assert averaged.weights_bytes == 8 * n
    adapted = memory(replace(shape, trainable_parameters=10), shape, replace(step, shared_features=True), plan)
    assert (adapted.gradients_bytes, adapted.optimizer_bytes, adapted.frozen_bytes) == (40, 80, 0)
    sft = memory(shape, shape, replace(step, method="sft"), MicroBatchPlan(2, 1))
    assert (sft.frozen_bytes, sft.rollouts_bytes, sft.features_bytes) == (alone.frozen_bytes, 0, 0)


def test_what_workers_with_shards_hold_and_gather() -> None:
    """All of it float32: counted by hand, against workers that hold everything."""
    V, H, L = 32, SIZES["hidden_size"], SIZES["num_hidden_layers"]
    config = Qwen2Config(**{**SIZES, "vocab_size": V, "tie_word_embeddings": True})
    shape, plan = ModelShape.from_config(config), MicroBatchPlan(2, 4)
    step = replace(Case(kl=0.1).step(), batch_size=8, world_size=4, differentiable_rollouts=False, judge_parameters=7)
    n = shape.n_parameters
    features, outer = shape.cut(step.depths).body_parameters, V * H + H
    assert shape.outer_parameters == outer
    layer = (n - outer) // L
    assert shape.layer_parameters == layer
    repeated, sharded = (memory(shape, shape, replace(step, sharded=sharded), plan) for sharded in (False, True))
    assert (sharded.weights_bytes, sharded.gradients_bytes, sharded.optimizer_bytes) == (n, n, 2 * n)
    assert sharded.frozen_bytes == n + features + 7 == repeated.frozen_bytes / 4
    assert sharded.update_bytes == 0
    more = {
        phase: (sharded.phases_bytes[phase] - repeated.phases_bytes[phase])
        + (repeated.phases_bytes["optimizer"] - repeated.update_bytes - sharded.phases_bytes["optimizer"])
        for phase in ("rollouts", "features", "scoring", "evaluation")
    }
    assert more["rollouts"] == 4 * n
    assert more["features"] == 4 * (outer + features)
    assert more["evaluation"] == 4 * (n + features + 7)
    # Embeddings and head; a layer and the next one; the gradients of a layer, of another one in transit, of the head.
    assert more["scoring"] == 4 * (outer + 2 * layer + 2 * layer + V * H)
    alone = replace(step, world_size=1, sharded=True)
    assert memory(shape, shape, alone, plan) == memory(shape, shape, replace(alone, sharded=False), plan)


def test_the_largest_moments_of_shards() -> None:
    """Wide embeddings: the end of a backward pass, when their gradient and the same in transit are in memory."""
    wide, plan = ModelShape.from_config(Qwen2Config(**{**SIZES, "vocab_size": 10**6})), MicroBatchPlan(1, 1)
    step = replace(Case().step(), world_size=2, sharded=True, differentiable_rollouts=False)
    limits = replace(CPU, logits_at_once=10**6)
    found = memory(wide, wide, step, plan, limits=limits).scoring_bytes
    assert found == pytest.approx(4 * wide.outer_parameters * (1 + 1 + 1 + 0.5), rel=0.02)
    adapted = memory(wide.with_adapters(2), wide, replace(step, shared_features=True), plan, limits=limits)
    assert adapted.scoring_bytes < 4 * wide.outer_parameters * 2
    # The base model's log-probabilities come before the generator's: nothing of it is in memory then.
    with_base = memory(wide, wide, replace(step, kl_coefficient=0.1), plan, limits=limits)
    assert with_base.scoring_bytes == found


def test_completions_are_scored_again_where_weights_are_divided() -> None:
    settings = Case().config()
    settings = settings.model_copy(update={"training": settings.training.model_copy(update={"sharding": "fsdp"})})
    kept = [StepShape.from_config(settings, world_size=n).differentiable_rollouts for n in (1, 2)]
    assert kept == [True, False]
