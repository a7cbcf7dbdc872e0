"""Randomly initialised models of three architectures, small enough for loops over every context."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ebft_study.data import Batch
from ebft_study.networks.blocks import ATTENTION

VOCABULARY = 40
ARCHITECTURES = ["qwen2-tied", "llama-untied", "gemma2-windows"]
"""Gemma 2 has sliding windows in every other layer, and bounds its scores and logits."""


def small_model(
    architecture: str = "qwen2-tied",
    *,
    layers: int = 4,
    seed: int = 0,
    head_dim: int = 8,
    vocabulary: int = VOCABULARY,
) -> nn.Module:
    """A model with grouped-query attention and weights large enough that attention matters."""
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": 4 * head_dim,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.25,
    }
    torch.manual_seed(seed)
    if architecture == "qwen2-tied":
        config = Qwen2Config(**sizes, tie_word_embeddings=True)
        return Qwen2ForCausalLM._from_config(config, attn_implementation=ATTENTION).eval()
    if architecture == "gemma2-windows":
        bounds = {"sliding_window": 5, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.5}
        config = Gemma2Config(**sizes, **bounds, head_dim=head_dim, query_pre_attn_scalar=head_dim)
        return Gemma2ForCausalLM._from_config(config, attn_implementation=ATTENTION).eval()
    config = LlamaConfig(**sizes, tie_word_embeddings=False)
    return LlamaForCausalLM._from_config(config, attn_implementation=ATTENTION).eval()


def small_batch(layouts: list[list[int]], seed: int = 0) -> Batch:
    """Random tokens over given document layouts."""
    documents = torch.tensor(layouts)
    tokens = torch.randint(0, VOCABULARY, documents.shape, generator=torch.Generator().manual_seed(seed))
    return Batch(tokens, documents, documents >= 0, torch.arange(len(layouts)))
