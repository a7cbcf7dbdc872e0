"""Generators and feature networks: loading, freezing, fingerprints."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils import logging as transformers_logging

from ebft_study import hub
from ebft_study.errors import EbftError, ModelError
from ebft_study.networks.blocks import ATTENTION, Backend
from ebft_study.networks.lora import BaseModel, add_adapters
from ebft_study.networks.verification import SUPPORTED, copy_with_weights, verify
from ebft_study.pretraining.ladder import LADDER, RECORD, architecture, ensure_tiny_model
from ebft_study.storage import open_file

if TYPE_CHECKING:
    from ebft_study.config import RunConfig

transformers_logging.disable_progress_bar()
FILES = (".json", ".safetensors", ".bin", ".txt", ".model", ".jinja")
"""Endings of the files that a model and its tokenizer are read from."""
OWN_CODE: dict[str, Any] = {"trust_remote_code": False}
"""Of transformers, never that of a model's folder; without a value it asks on the terminal."""
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM with block attention, its tokenizer, and what identifies its weights."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    name: str
    fingerprint: str
    """Empty on workers that did not hash them."""
    n_parameters: int
    folder: str


def load_model(
    name: str,
    *,
    revision: str | None = None,
    random_weights: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: Backend = "auto",
    n_tokens: int = 128,
    completion_length: int = 8,
    tokenizer: PreTrainedTokenizerFast | None = None,
    is_first: bool = True,
    needs_head: bool = True,
) -> LoadedModel:
    """A ladder model, hub model or local folder, with weights of type `dtype`, in evaluation mode, without dropout.

    Weights are mapped from their files and copied to the device one after another, in their type.

    Args:
        random_weights: keep the architecture but draw the weights anew from a fixed seed (an ablation of the paper).
        n_tokens, completion_length: the longest sequence and completion that it will see, for the check.
        tokenizer: the model's, where it is loaded already.
        is_first: of the workers that load the same model, this one verifies and hashes it; the others have no
            fingerprint.
        needs_head: False for a network whose features alone are used; its files may lack the output embedding.

    Raises:
        ModelError: nothing usable at `name`, or an architecture that block-parallel rollouts cannot run.
    """
    source, tokenizer = source_of(name), tokenizer or load_tokenizer(name, revision=revision)
    with _reading(name):
        if random_weights:
            config = AutoConfig.from_pretrained(source, revision=revision, **OWN_CODE)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(
                    config, attn_implementation=ATTENTION, dtype=torch.float32, **OWN_CODE
                )
        else:
            model, read = AutoModelForCausalLM.from_pretrained(
                source,
                revision=revision,
                dtype=dtype,
                attn_implementation=ATTENTION,
                device_map={"": device},
                output_loading_info=True,
                **OWN_CODE,
            )
            _refuse_missing(name, model, read["missing_keys"], needs_head=needs_head)
    model = _without_dropout(cast_weights(model, dtype, device)).to(device).eval()
    if is_first:
        verify(model, name=name, n_tokens=n_tokens, completion_length=completion_length, backend=attention)
    n_parameters = sum(p.numel() for p in model.parameters())
    return LoadedModel(
        model, tokenizer, name, fingerprint(model) if is_first else "", n_parameters, str(Path(source).name)
    )


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of what `load_model` would load; no weights are read.

    Raises:
        ModelError: nothing usable at `name`, or a tokenizer that marks no end.
    """
    with _reading(name):
        tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(
            source_of(name), revision=revision, **OWN_CODE
        )
        tokenizer(["a text"])
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ModelError(f"model {name!r}: its tokenizer has neither a padding nor an end token. Add one and save it")
    return tokenizer


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that training changes, by name; a tied one once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def read_config(name: str, *, revision: str | None = None) -> Any:
    """The Hugging Face configuration of what `load_model` would load; no weights are read, and nothing is trained.

    Raises:
        ModelError: nothing usable at `name`.
    """
    if name in LADDER:
        return architecture(LADDER[name])
    with _reading(name):
        return AutoConfig.from_pretrained(source_of(name), revision=revision, **OWN_CODE)


def source_of(name: str) -> str:
    """Folder or hub id of a model's files; a model of the ladder is trained first, if need be."""
    if name in LADDER:
        return str(ensure_tiny_model(name))
    if not Path(name).exists():
        hub.settle()
    return name


def digest_of_files(name: str, *, revision: str | None = None) -> str:
    """What identifies a model's files without loading them: of a hub model the commit, whatever of it is cached here.

    Of a folder it is the SHA-256 (hex) of the names and contents of configuration, tokenizer and weights: a pass over
    the files, and no memory.

    Raises:
        ModelError: nothing usable at `name`.
    """
    with _reading(name):
        folder = Path(str(cached_file(source_of(name), CONFIG_NAME, revision=revision))).parent
        if folder.parent.name == "snapshots":
            return folder.name
        files = sorted(path for path in folder.iterdir() if path.suffix in FILES and path.name != RECORD)
        digest = hashlib.sha256()
        for path in files:
            with open_file(path) as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def cast_weights(model: ModuleT, dtype: torch.dtype, device: torch.device | str | None = None) -> ModuleT:
    """The model with all weights of type `dtype`, in place, one after another.

    Buffers, such as rotary frequencies, keep their digits.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)
    return model


def _without_dropout(model: ModuleT) -> ModuleT:
    """The model without dropout, in place: a completion is scored by the very policy that sampled it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


def fingerprint(model: nn.Module) -> str:
    """Sixteen hex digits of a hash over names, shapes and bytes of all weights, and the configuration.

    The same weights compute something else with another number of heads, norm or rotary base.
    """
    digest = hashlib.sha256(json.dumps(_architecture(model), sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _architecture(model: nn.Module) -> dict[str, Any]:
    """The part of the configuration that determines the computation: neither types, nor paths, nor versions."""
    config = getattr(model, "config", None)
    if config is None:
        return {}
    ignored = {"transformers_version", "dtype", "torch_dtype", "use_cache"}
    return {key: value for key, value in config.to_dict().items() if key not in ignored and not key.startswith("_")}


def load_generator(
    config: RunConfig,
    *,
    device: torch.device | str = "cpu",
    tokenizer: PreTrainedTokenizerFast | None = None,
    is_first: bool = True,
) -> LoadedModel:
    """The model that a run trains, with fresh adapters if it trains these; it computes the same as the base model.

    Args:
        tokenizer, is_first: see `load_model`.

    Raises:
        ModelError: see `load_model`, or adapters for layers that the model does not have.
    """
    loaded = load_model(
        config.model,
        revision=config.model_revision,
        device=device,
        dtype=base_dtype(config),
        attention=config.training.attention,
        n_tokens=config.data.sequence_length,
        completion_length=config.longest_completion,
        tokenizer=tokenizer,
        is_first=is_first,
    )
    if config.lora.lora_rank > 0:
        dtype = getattr(torch, config.training.weight_dtype)
        add_adapters(loaded.model, config.lora, seed=config.seed, dtype=dtype, name=config.model)
    return loaded


def base_dtype(config: RunConfig) -> torch.dtype:
    """Type of the weights that a run starts from; frozen ones need no more digits than passes compute with."""
    training = config.training
    dtype: torch.dtype = getattr(torch, training.precision if config.lora.lora_rank > 0 else training.weight_dtype)
    return dtype


def frozen_base(config: RunConfig, base: LoadedModel) -> nn.Module:
    """The generator before any training, a warm start included: a frozen copy, or the generator without adapters."""
    if config.lora.lora_rank > 0:
        return BaseModel(base.model)
    return frozen_copy(config, base)


def frozen_copy(config: RunConfig, base: LoadedModel) -> nn.Module:
    """A copy of the generator as it is now, without gradients, in the precision of the passes."""
    copied: nn.Module = copy_with_weights(base.model, getattr(torch, config.training.precision))
    return copied.eval()


def _refuse_missing(name: str, model: nn.Module, missing: set[str], *, needs_head: bool) -> None:
    """Refuse weights that transformers has drawn at random because the files lack them."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    unused = {key for key, parameter in model.named_parameters() if not needs_head and parameter is head.weight}
    if absent := sorted(missing - unused):
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise ModelError(f"model {name!r}: its files lack the weights {absent[0]}{more}. Restore them")


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Context in which libraries read a model's files: whatever these make them raise is one line.

    It may be anything: `KeyError`, `RecursionError`, the own errors of safetensors and transformers, and of tokenizers
    a bare `Exception`.
    """
    try:
        yield
    except (EbftError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelError(_explain(name, error)) from error


def _explain(name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if ATTENTION in reason:  # the architecture looks for its attention elsewhere than in the registry
        problem = "its architecture has attention of its own, which block attention cannot replace"
        return f"model {name!r}: {problem}. {SUPPORTED}"
    if "weights_only" in str(error):
        problem = "its weights are a pickled file that brings code of its own, which is not run"
        return f"model {name!r}: {problem}. Convert it to safetensors"
    if "trust_remote_code" in str(error):
        problem = "it brings code of its own (auto_map), which is not run"
        return f"model {name!r}: {problem}. Use a model whose architecture transformers has"
    if name.startswith((".", "/", "~")) or Path(name).exists():
        return f"model {name!r}: no usable model in this folder ({reason}). Give a folder with config.json and weights"
    return (
        f"model {name!r}: cannot be loaded ({reason}). Use one of {', '.join(LADDER)}, a local folder, "
        "or a hub id that this machine can reach or has cached"
    )
