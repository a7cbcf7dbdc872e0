"""The ladder of tiny models: Qwen2 architecture, pretrained here on text that every machine has, cached per machine.

A laptop may have no model hub, so its base models are pretrained locally: real text, a real tokenizer, real
pretraining, in minutes. A model's folder is named by the hash of its recipe and corpus; a change in either makes a new
model.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from ebft_study.data import TextDataset, load_text
from ebft_study.paths import cache_folder
from ebft_study.pretraining.ngram import SMOOTHING, TrigramModel
from ebft_study.progress import Progress
from ebft_study.storage import atomic_write

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0  # special tokens come first in a vocabulary
RECIPE_VERSION = 2
RECORD = "pretraining.json"
"""File of a model's folder with the recipe and what was measured."""


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a tiny model, but for the content of its corpus."""

    name: str
    hidden_size: int
    n_layers: int
    n_heads: int
    intermediate_size: int
    steps: int
    muon_learning_rate: float = 0.04
    adam_learning_rate: float = 1e-2
    vocabulary_size: int = 2048
    sequence_length: int = 256
    batch_size: int = 8
    warmup_fraction: float = 0.03
    weight_decay: float = 0.1
    initializer_range: float = 0.08
    seed: int = 0
    version: int = RECIPE_VERSION
    corpus: str = "stdlib"


LADDER = {
    recipe.name: recipe
    for recipe in (
        Recipe("tiny-250k", hidden_size=64, n_layers=4, n_heads=2, intermediate_size=128, steps=480),
        Recipe("tiny-500k", hidden_size=96, n_layers=4, n_heads=3, intermediate_size=192, steps=540),
        Recipe("tiny-1m", hidden_size=128, n_layers=4, n_heads=4, intermediate_size=384, steps=640),
        Recipe("tiny-2m", hidden_size=192, n_layers=4, n_heads=6, intermediate_size=576, steps=760),
        Recipe("tiny-4m", hidden_size=256, n_layers=5, n_heads=4, intermediate_size=704, steps=900),
        Recipe("tiny-16m", hidden_size=512, n_layers=5, n_heads=8, intermediate_size=1408, steps=1200),
        Recipe("tiny-60m", hidden_size=1024, n_layers=5, n_heads=16, intermediate_size=2816, steps=1640),
        Recipe(
            "mini-1m",
            hidden_size=128,
            n_layers=4,
            n_heads=4,
            intermediate_size=384,
            steps=1200,
            vocabulary_size=512,
            corpus="mini_pretraining",
        ),
    )
}


def ensure_tiny_model(name: str) -> Path:
    """Folder of the ladder model `name` in Hugging Face format, pretrained first if this machine lacks it.

    Safe for several processes: one trains, the others wait. An interrupted pretraining leaves nothing behind.
    """
    from ebft_study.config import DataConfig

    recipe = LADDER[name]
    corpus = load_text(DataConfig(dataset=recipe.corpus))
    folder = cache_folder() / "models" / f"{name}-{recipe_digest(recipe, corpus)}"
    if _is_current(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / RECORD).exists():
            with atomic_write(folder) as temporary:
                pretrain(recipe, corpus, temporary)
        elif not _is_current(folder):
            _measure_baseline_again(recipe, corpus, folder)
    return folder


def _is_current(folder: Path) -> bool:
    record = folder / RECORD
    return record.exists() and json.loads(record.read_text()).get("trigram_smoothing") == SMOOTHING


def _measure_baseline_again(recipe: Recipe, corpus: TextDataset, folder: Path) -> None:
    """Replace the perplexity of an older version's trigram model in the record of a model, which stays as it is."""
    record = json.loads((folder / RECORD).read_text())
    record |= trigram_baseline(recipe, *token_streams(recipe, corpus, load_tokenizer(folder)))
    with atomic_write(folder / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=1))


def recipe_digest(recipe: Recipe, corpus: TextDataset) -> str:
    """Twelve hex digits that name recipe and corpus."""
    settings = {key: value for key, value in asdict(recipe).items() if key != "corpus"}  # it counts by its content
    content = json.dumps([settings, corpus.fingerprint], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def pretrain(recipe: Recipe, corpus: TextDataset, folder: Path) -> dict[str, Any]:
    """Train tokenizer and model by cross-entropy and save both, with a record of perplexities, into `folder`."""
    started = time.perf_counter()
    train_tokenizer([example.answer for example in corpus.splits["train"]], recipe.vocabulary_size).save_pretrained(
        folder
    )
    architecture(recipe).save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    train, validation = token_streams(recipe, corpus, tokenizer)
    model = _train(recipe, train)
    record = {
        "recipe": asdict(recipe),
        "corpus": corpus.provenance,
        "corpus_fingerprint": corpus.fingerprint,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_tokens": len(train),
        "validation_tokens": len(validation),
        "perplexity": math.exp(validation_cross_entropy(model, validation, recipe.sequence_length)),
        **trigram_baseline(recipe, train, validation),
        "seconds": time.perf_counter() - started,
    }
    model.save_pretrained(folder)
    (folder / RECORD).write_text(json.dumps(record, indent=1))
    print(
        f"{recipe.name}: validation perplexity {record['perplexity']:.1f} (trigram baseline on the same tokens: "
        f"{record['trigram_perplexity']:.1f}), {record['seconds']:.0f} s",
        flush=True,
    )
    return record


def trigram_baseline(recipe: Recipe, train: np.ndarray, validation: np.ndarray) -> dict[str, Any]:
    """The part of a model's record that says how well a trigram model of the same tokens does."""
    cross_entropy = TrigramModel(train, recipe.vocabulary_size).cross_entropy(validation)
    return {"trigram_perplexity": math.exp(cross_entropy), "trigram_smoothing": SMOOTHING}


def token_streams(
    recipe: Recipe, corpus: TextDataset, tokenizer: PreTrainedTokenizerFast
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that a model is trained on, and those that it is measured on."""
    needed = recipe.steps * recipe.batch_size * (recipe.sequence_length + 1)
    train = token_stream(corpus, "train", tokenizer, limit=needed)
    return train, token_stream(corpus, "validation", tokenizer, limit=200_000)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a saved model as all that load it get it: its class, and so its rules, follow the architecture.

    A model that was pretrained on other tokens would not know its own text again.
    """
    return AutoTokenizer.from_pretrained(folder)  # type: ignore[no-any-return]


def train_tokenizer(texts: list[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer by the rules of Qwen2: every text can be encoded, no unknown token."""
    bpe, rules = Tokenizer(models.BPE()), Qwen2Tokenizer().backend_tokenizer
    bpe.normalizer, bpe.pre_tokenizer, bpe.decoder = rules.normalizer, rules.pre_tokenizer, rules.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def token_stream(corpus: TextDataset, split: str, tokenizer: PreTrainedTokenizerFast, *, limit: int) -> np.ndarray:
    """Whole files of a split in a fixed random order, each closed by the end-of-text token, cut at `limit` tokens."""
    texts = [example.answer for example in corpus.splits[split]]
    pieces: list[np.ndarray] = []
    total = 0
    for index in np.random.default_rng(0).permutation(len(texts)):
        ids = tokenizer.encode(texts[index], add_special_tokens=False, verbose=False)
        pieces.append(np.asarray([*ids, tokenizer.eos_token_id], dtype=np.int64))
        total += len(pieces[-1])
        if total >= limit:
            break
    stream: np.ndarray = np.concatenate(pieces)
    return stream[:limit]


def _train(recipe: Recipe, stream: np.ndarray) -> Qwen2ForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = Qwen2ForCausalLM._from_config(architecture(recipe), attn_implementation="sdpa")
    optimizers = _optimizers(model, recipe)
    rows = torch.from_numpy(stream[: len(stream) // (recipe.sequence_length + 1) * (recipe.sequence_length + 1)])
    rows = rows.view(-1, recipe.sequence_length + 1)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed))
    with Progress(f"pretraining {recipe.name}", recipe.steps) as progress:
        for step in range(recipe.steps):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * _schedule(step, recipe)
            index = order[torch.arange(step * recipe.batch_size, (step + 1) * recipe.batch_size) % len(rows)]
            loss = _next_token_loss(model, rows[index])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            progress.advance(f"loss {float(loss.detach()):.2f}")
    return model.eval()


def _optimizers(model: Qwen2ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest: with so few tokens it learns faster than AdamW alone."""
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.dim() == 2 and p is not embedding]
    others = [p for p in model.parameters() if p.dim() != 2 or p is embedding]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=recipe.muon_learning_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.adam_learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def architecture(recipe: Recipe) -> Qwen2Config:
    """Hugging Face configuration of a tiny model, which need not be trained yet."""
    return Qwen2Config(
        vocab_size=recipe.vocabulary_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_heads // 2,
        max_position_embeddings=4 * recipe.sequence_length,
        tie_word_embeddings=True,
        initializer_range=recipe.initializer_range,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
    )


def _schedule(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then linear to zero, as a fraction of the peak."""
    warmup = max(1, round(recipe.warmup_fraction * recipe.steps))
    return min((step + 1) / warmup, (recipe.steps - step) / max(recipe.steps - warmup, 1))


def _next_token_loss(model: Qwen2ForCausalLM, rows: Tensor) -> Tensor:
    logits = model(rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def validation_cross_entropy(model: Qwen2ForCausalLM, stream: np.ndarray, sequence_length: int) -> float:
    """Mean cross-entropy in nats per token over rows of `sequence_length` tokens."""
    usable = len(stream) // (sequence_length + 1) * (sequence_length + 1)
    rows = torch.from_numpy(stream[:usable]).view(-1, sequence_length + 1)
    losses = [_next_token_loss(model, chunk) * len(chunk) for chunk in rows.split(32)]
    return float(sum(losses) / len(rows))
