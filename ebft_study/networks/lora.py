"""Low-rank adapters (LoRA, through peft): the model's own weights never change, so it contains the base model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ebft_study.errors import ModelError

if TYPE_CHECKING:
    import peft

    from ebft_study.config import LoraConfig

ALL = "all-linear"


def add_adapters(model: nn.Module, config: LoraConfig, *, seed: int, dtype: torch.dtype, name: str) -> None:
    """Freeze `model` and give its linear layers trainable adapters, in place. They change no output until trained.

    Args:
        seed: fixes the adapters' first weights.
        dtype: type of the adapters' weights.

    Raises:
        ModelError: the decoder has no linear layer of a name in `lora_targets`.
    """
    # peft takes seconds to import, which a run without adapters should not pay.
    import peft

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(adapter_settings(model, config, name), model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def adapter_settings(model: nn.Module, config: LoraConfig, name: str) -> peft.LoraConfig:
    """The settings of peft for the adapters of `model`."""
    import peft

    return peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=_targets(model, config, name),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )


def _targets(model: nn.Module, config: LoraConfig, name: str) -> list[str]:
    body = model.get_decoder()  # type: ignore[operator]
    linear = {path.rpartition(".")[2] for path, module in body.named_modules() if isinstance(module, nn.Linear)}
    wanted = linear if config.lora_targets == (ALL,) else set(config.lora_targets)
    missing = sorted(wanted - linear)
    if missing or not linear:
        raise ModelError(
            f"lora.lora_targets={list(config.lora_targets)}: the decoder of model {name!r} has no linear layers named "
            f"{', '.join(missing) or 'anything'}. Use {ALL} or some of {', '.join(sorted(linear))}"
        )
    return sorted(wanted)


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of a model that have adapters, by name."""
    if not any(".lora_" in name for name, _ in model.named_parameters()):
        return {}  # peft takes seconds to import
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


@torch.no_grad()
def copy_merged_rows(layer: Any, weight: Tensor, rows: slice, target: Tensor, scratch: Tensor) -> None:
    """Write rows of `W + scaling B A`, added up in float32, into `target`; a weight is merged in little memory.

    Args:
        weight: these rows of the base layer's W.
        scratch: float32, of at least as many numbers as `target`; its content is lost.
    """
    up, down = layer.lora_B["default"].weight[rows].float(), layer.lora_A["default"].weight.float()
    merged = scratch[: target.numel()].view(target.shape)
    with torch.autocast(weight.device.type, enabled=False):
        torch.mm(up * layer.scaling["default"], down, out=merged)
    target.copy_(merged.add_(weight))


@contextmanager
def base_weights(model: nn.Module) -> Iterator[None]:
    """Context in which an adapted model is the base model, in evaluation mode, even while a graph of it exists."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    training = model.training
    for module in adapted:
        module.enable_adapters(False)
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for module in adapted:
            module.enable_adapters(True)


class BaseModel(nn.Module):
    """An adapted model without its adapters, for passes without gradients. It has no weights of its own."""

    def __init__(self, adapted: nn.Module) -> None:
        super().__init__()
        # A module would be registered as a part, and its weights counted twice; a tuple is not.
        self._adapted = (adapted,)

    @property
    def config(self) -> Any:
        return self._adapted[0].config

    def get_decoder(self) -> Any:
        """Runs the decoder with the adapters disabled."""

        def run(**inputs: Any) -> Any:
            with base_weights(self._adapted[0]):
                return self._adapted[0].get_decoder()(**inputs)  # type: ignore[operator]

        return run

    def get_output_embeddings(self) -> Any:
        """The head, which never has adapters."""
        return self._adapted[0].get_output_embeddings()  # type: ignore[operator]
