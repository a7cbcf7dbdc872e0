"""Which architectures of the installed transformers the project runs, found by running each of them, tiny.

    python -m tests.architectures [--only llama] [--write docs/architectures.md]

Every causal LM that can be built tiny from its configuration is saved, planned and loaded as a study does it, over more
tokens than its windows hold. What loads is compared with plain passes of the model's own code (`eager` attention), one
context and one completion at a time: log-probabilities of given and of sampled completions, and features. The outcome
is `equal` with the largest difference, or `refused` with the line that a user sees. Anything else is a defect.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import math
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ebft_study.algorithm.anchors import find_anchors
from ebft_study.algorithm.sampling import uniforms
from ebft_study.cost import ModelShape
from ebft_study.data import Batch
from ebft_study.errors import EbftError
from ebft_study.features.local import LocalFeatures
from ebft_study.networks.blocks import completion_log_probs, run_prefix
from ebft_study.networks.loading import load_model, read_config
from ebft_study.networks.verification import TOLERANCE, relative_difference
from ebft_study.pretraining.ladder import train_tokenizer
from ebft_study.rollouts.strided import StridedRollouts
from tests.references import naive_model

T, G, WINDOW = 72, 6, 16
"""Tokens of a sequence, tokens of a completion, and tokens that a sliding window holds."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LARGEST = 20_000_000
"""Parameters of a model that counts as tiny."""
TINY: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff"), 96),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len"), 256),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("sliding_window", "attention_window_size", "attention_chunk_size"), WINDOW),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim", "head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 8),
    "num_key_value_heads": 2,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "attn_logit_softcapping": 2.0,
    "attention_types": [[["global", "local"], 2]],
    "window_size": WINDOW,
    "layer_types": None,
}  # fmt: skip
"""Settings of configurations, where they exist; a window, a bound and a head count change the result."""


@dataclass(frozen=True)
class Outcome:
    """What became of an architecture in one type of weights."""

    kind: Literal["equal", "refused", "different", "traceback", "not built"]
    detail: str


def architectures() -> list[str]:
    """Model types of all causal LMs of the installed transformers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def examine(model_type: str, device: str = "cpu") -> dict[str, Outcome]:
    """The outcome in each type of weights; block passes run on `device`, and plain ones on the CPU."""
    with tempfile.TemporaryDirectory() as folder, _quiet():
        try:
            _build(model_type, Path(folder))
        except Exception as error:
            return dict.fromkeys(DTYPES, Outcome("not built", _line(error)))
        return {name: _run(Path(folder), name, device) for name in DTYPES}


def tiny_configs(model_type: str, vocabulary: int) -> Iterator[Any]:
    """Configurations with the settings of `TINY` that a model type knows; later ones leave more of them alone."""
    known = CONFIG_MAPPING[model_type]()
    inner = getattr(known, "text_config", None) or known
    settings: dict[str, Any] = {name: value for name, value in TINY.items() if _is_setting(inner, name)}
    if "qk_rope_head_dim" in settings:  # multi-head latent attention: the size of a head follows, and none is shared
        settings.pop("head_dim", None)
        settings["num_key_value_heads"] = TINY["num_attention_heads"]
    settings |= {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    kinds = getattr(inner, "layer_types", None)
    for changes in (
        {},
        {"layer_types": list(kinds[:4]) if isinstance(kinds, list) else _LEFT},
        {"layer_types": _LEFT, "head_dim": _LEFT},
        {"layer_types": _LEFT, "head_dim": _LEFT, "num_experts_per_tok": 1},
    ):
        chosen = {name: value for name, value in (settings | changes).items() if value is not _LEFT}
        with contextlib.suppress(Exception):
            yield type(inner)(**chosen)


_LEFT = object()
"""A setting that keeps its default."""
_MAY_BE_NONE = ("layer_types", "head_dim", "sliding_window", "num_experts_per_tok", "num_key_value_heads")


def _is_setting(config: Any, name: str) -> bool:
    if isinstance(getattr(type(config), name, None), property):
        return False
    try:
        return getattr(config, name) is not None or name in _MAY_BE_NONE
    except Exception:  # some differ from layer to layer, and refuse to be read
        return False


def _build(model_type: str, folder: Path) -> None:
    tokenizer = _tokenizer()
    problem: Exception = ValueError("no configuration with the settings of tests/architectures.py")
    for config in tiny_configs(model_type, len(tokenizer)):
        try:
            with torch.device("meta"):
                parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if parameters > LARGEST:
                raise ValueError(f"{parameters / 1e6:.0f} million parameters in spite of the settings")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            break
        except Exception as error:
            problem = error
    else:
        raise problem
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # large enough that attention, windows and bounds matter
                parameter.normal_(0.0, 1.5 / math.sqrt(parameter.shape[-1]))
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _run(folder: Path, dtype: str, device: str) -> Outcome:
    try:
        ModelShape.from_config(read_config(str(folder)))
        model, network = (
            load_model(str(folder), device=device, dtype=DTYPES[dtype], n_tokens=T, completion_length=G).model
            for _ in range(2)
        )
        exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        compared = list(_differences(model, network, exact))
    except EbftError as error:
        return Outcome("refused", str(error).replace(f"model {str(folder)!r}: ", "").partition(". Use ")[0])
    except Exception as error:
        return Outcome("traceback", _line(error))
    tolerance = TOLERANCE[DTYPES[dtype]]
    is_equal = all(difference <= max(tolerance, 2 * rounding) for difference, rounding in compared)
    difference, rounding = max(compared)
    shown = f"{difference:.1e}" if dtype == "float32" else f"{difference:.1e} (rounding: {rounding:.1e})"
    return Outcome("equal" if is_equal else "different", shown)


@torch.no_grad()
def _differences(
    model: PreTrainedModel, network: PreTrainedModel, exact: PreTrainedModel
) -> Iterator[tuple[float, float]]:
    """Between block passes and plain ones over a packed row, and between the plain ones and those of `exact` weights.

    Of log-probabilities of completions, as they were sampled and scored again, and of features.
    """
    documents = torch.tensor([[0] * 20 + [1] * (T - 20)])
    tokens = torch.randint(3, model.config.vocab_size, documents.shape, generator=torch.Generator().manual_seed(1))
    batch = Batch(tokens, documents, documents >= 0, torch.arange(1)).to(model.device)
    anchors = find_anchors(batch.document_ids, completion_length=G, stride=12, first_context_length=3)
    noise = uniforms((7,), [0], n_anchors=anchors.positions.shape[1], n_samples=2, length=G)
    rollouts = StridedRollouts().sample(model, batch, anchors, noise=noise, temperature=0.8)
    prefix = run_prefix(model, batch.tokens, batch.document_ids)
    scored = completion_log_probs(model, prefix, anchors, rollouts.completions, temperature=0.8)
    local = LocalFeatures(network, depths=(0.5, 1.0), pooling="last_token", normalize="per_layer")
    phi = local.embed(batch, anchors, rollouts.completions)[0].phi[0].flatten(0, 1).cpu()
    blocks = [log_probs[0].flatten().cpu() for log_probs in (scored, rollouts.log_probs)]
    model = copy.deepcopy(model).cpu()  # the plain passes
    positions = anchors.positions[0].tolist()
    contexts = [tokens[0, (0 if position < 20 else 20) : position] for position in positions for _ in range(2)]
    pairs = list(zip(contexts, rollouts.completions[0].flatten(0, 1).cpu(), strict=True))

    def plain(of: PreTrainedModel) -> tuple[Tensor, Tensor]:
        features = [naive_model.features(of, *pair, local.indices, "last_token", "per_layer") for pair in pairs]
        return torch.cat([naive_model.completion_log_probs(of, *pair, 0.8) for pair in pairs]), torch.stack(features)

    (log_probs, features), (exact_log_probs, exact_features) = plain(model), plain(exact)
    summary = torch.max if model.dtype == torch.float32 else torch.mean
    rounding = relative_difference(log_probs, exact_log_probs, model.dtype)
    for ours in blocks:
        yield relative_difference(ours, log_probs, model.dtype), rounding
    distances = ((ours - features).norm(dim=-1) for ours in (phi, exact_features))
    of_phi, of_exact = (float(summary(distance)) for distance in distances)
    yield of_phi, of_exact


def _tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["the name of the value for each index in the list is none"] * 20, 300)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _line(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 160 else text[:157] + "..."


def page(outcomes: dict[str, dict[str, Outcome]]) -> str:
    """The outcomes as Markdown."""
    by_kind: dict[str, list[str]] = {}
    for name, by_dtype in outcomes.items():
        kinds = {outcome.kind for outcome in by_dtype.values()}
        by_kind.setdefault(max(kinds, key=_SEVERITY.index), []).append(name)

    def table(kind: str, *headers: str) -> list[str]:
        lines = [f"| {' | '.join(('architecture', *headers))} |", "|---" * (len(headers) + 1) + "|"]
        for name in by_kind.get(kind, []):
            details = [outcome.detail.replace("|", "/") for outcome in outcomes[name].values()]
            lines.append(f"| {' | '.join([name, *details[: len(headers)]])} |")
        return [*lines, ""]

    sections = {
        "equal": ("Equal", "float32", "bfloat16"),
        "different": ("Different: defects", "float32", "bfloat16"),
        "traceback": ("Ended by an error: defects", "float32", "bfloat16"),
        "refused": ("Refused", "line"),
        "not built": ("Not examined", "why it could not be built tiny"),
    }
    lines = [_HEAD.format(version=transformers.__version__, torch=torch.__version__, T=T, G=G, window=WINDOW)]
    for kind, (title, *headers) in sections.items():
        if kind in by_kind:
            lines += [f"## {title}: {len(by_kind[kind])}", "", *table(kind, *headers)]
    return "\n".join(lines)


_SEVERITY = ("not built", "equal", "refused", "different", "traceback")
_HEAD = """# Architectures

`make architectures` writes this page with the transformers ({version}) and torch ({torch}) that are installed: every
causal LM that can be built with a few thousand parameters from its configuration is saved, planned and loaded as a
study does it. What loads is compared with the model's own code (`eager` attention), one context and one completion at a
time, over packed rows of {T} tokens, completions of {G} and windows of {window} tokens: log-probabilities of sampled
completions as they were sampled and as they are scored, and features of two depths.

*Equal* gives the largest of these differences: in float32 relative to the largest log-probability, and of a feature
vector of length 1; in bfloat16 the mean, beside the distance between the model's own bfloat16 and float32 passes. There
the difference is below 0.04 or twice that distance. *Refused* gives the line that a study ends with, before training.
A study repeats the comparison with its own weights, at its own length, when it loads a model. The cost and the memory
of a mixture of experts are planned as those of a dense model.
"""


def main() -> int:
    """Examine all architectures and print or write the page; 1 if one is different or ends in a traceback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="model types; default: all")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", type=Path, help="file for the page; default: the terminal")
    options = parser.parse_args()
    names, outcomes = options.only or architectures(), {}
    with ProcessPoolExecutor(options.jobs) as pool:
        for number, (name, of_name) in enumerate(zip(names, pool.map(examine, names), strict=True), 1):
            outcomes[name] = of_name
            shown = ", ".join(f"{dtype}: {o.kind} {o.detail[:90]}" for dtype, o in of_name.items())
            print(f"{number}/{len(names)} {name}: {shown}", file=sys.stderr, flush=True)
    text = page(outcomes)
    if options.write:
        options.write.write_text(text)
    else:
        print(text)
    return int(any(o.kind in ("different", "traceback") for by_dtype in outcomes.values() for o in by_dtype.values()))


if __name__ == "__main__":
    sys.exit(main())
