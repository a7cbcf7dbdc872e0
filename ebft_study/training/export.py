"""Trained models as Hugging Face folders, which transformers and peft load without this package."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from ebft_study.config import RunConfig
from ebft_study.networks.loading import OWN_CODE, base_dtype, load_tokenizer, source_of
from ebft_study.networks.lora import adapter_settings
from ebft_study.training import state


def write_model(run: RunConfig, saved: Path, folder: Path, *, merge: bool = False) -> int:
    """Write the model of a checkpoint, as evaluations see it, and its tokenizer; returns the checkpoint's step.

    Weights are written in the type that they were trained in. Of a run with adapters these alone are written, for
    `peft`, or with `merge` the whole model with the adapters added to its weights, `W + lora_alpha / lora_rank B A`.

    Args:
        saved: a checkpoint's folder on a disk.
        folder: exists, and is empty.

    Raises:
        ModelError: the base model is not there.
        CheckpointError: the checkpoint is damaged, or not of this run's trained parameters.
    """
    tokenizer = load_tokenizer(run.model, revision=run.model_revision)
    # Without the block attention of training, and with the dropout of its configuration.
    model = AutoModelForCausalLM.from_pretrained(
        source_of(run.model), revision=run.model_revision, dtype=base_dtype(run), **OWN_CODE
    )
    if run.lora.lora_rank > 0:
        import peft

        settings = adapter_settings(model, run.lora, run.model)
        # The hub's name, or the path, by which peft finds the base model again.
        model.config._name_or_path = settings.base_model_name_or_path = source_of(run.model)
        settings.revision = run.model_revision
        with torch.random.fork_rng(devices=[]):
            adapted = peft.get_peft_model(model, settings)
        step = state.load_weights(adapted.get_base_model(), saved)
        model = adapted.merge_and_unload() if merge else adapted
    else:
        step = state.load_weights(model, saved)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return step
