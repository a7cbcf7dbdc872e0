"""The tiny ladder: recipes, the trigram baseline, and the whole path on a small corpus."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM

from ebft_study.config import DataConfig
from ebft_study.data import Example, TextDataset, load_text
from ebft_study.networks.loading import load_model, read_config
from ebft_study.paths import cache_folder
from ebft_study.pretraining import ladder
from ebft_study.pretraining.ladder import LADDER, Recipe, recipe_digest, train_tokenizer
from ebft_study.pretraining.ngram import TrigramModel


def recipe_for_tests(**changes: Any) -> Recipe:
    """The smallest recipe that still learns, for quick checks of the whole path."""
    return replace(LADDER["tiny-1m"], **{"name": "tiny-test", "steps": 30, **changes})


@pytest.fixture
def corpus() -> TextDataset:
    text = "\n".join(f"def function_{i}(value):\n    return value + {i % 7}" for i in range(300))
    example = Example("", text, "a.py")
    splits = {"train": (example, Example("", text[::-1], "b.py")), "validation": (example,), "heldout": (example,)}
    return TextDataset("tiny", False, splits, {"source": "test"}, "abc123")


def kneser_ney(train: list[int], vocabulary: int, u: int, v: int, w: int) -> float:
    """`p(w | u v)` by the definition (Chen and Goodman, 1998): sets and dictionaries, nothing shared with the model."""
    trigrams = Counter(zip(train, train[1:], train[2:], strict=False))
    bigrams = Counter((b, c) for _, b, c in trigrams)  # how many tokens precede each, not how often it occurs
    unigrams = Counter((c,) for _, c in bigrams)

    def discount(counts: Counter[Any], count: int) -> float:
        n, k = Counter(counts.values()), min(count, 3)
        if not (n[1] and n[2] and n[3]):
            return k / 2
        return k - (k + 1) * n[1] / (n[1] + 2 * n[2]) * n[k + 1] / n[k]

    def probability(levels: list[Counter[Any]], context: tuple[int, ...]) -> float:
        if not levels:
            return 1 / vocabulary
        counts, lower = levels[0], probability(levels[1:], context[1:])
        following = {gram: count for gram, count in counts.items() if gram[:-1] == context}
        if not following:
            return lower
        left_over = sum(discount(counts, count) for count in following.values())
        count = counts[(*context, w)]
        kept = count - discount(counts, count) if count else 0.0
        return (kept + left_over * lower) / sum(following.values())

    return probability([trigrams, bigrams, unigrams], (u, v))


def zipf_tokens(seed: int, vocabulary: int, size: int) -> np.ndarray:
    """Tokens of which some are rare, as words are; the last two numbers of the vocabulary never occur."""
    weights = 1.0 / np.arange(1, vocabulary - 1)
    return np.random.default_rng(seed).choice(vocabulary - 2, size, p=weights / weights.sum())


def probability(model: TrigramModel, *trigram: int) -> float:
    return math.exp(-model.cross_entropy(np.array(trigram)))


@pytest.mark.parametrize("size", [60, 600, 20_000])
def test_trigram_probabilities_sum_to_one_for_seen_and_unseen_contexts(size: int) -> None:
    train = zipf_tokens(0, 14, size)
    seen = set(itertools.pairwise(train.tolist()))
    model = TrigramModel(train, 14)
    contexts = list(itertools.product(range(14), repeat=2))
    assert not seen.issuperset(contexts), "tokens 12 and 13 are in no context that training has seen"
    for context in contexts:
        assert sum(probability(model, *context, token) for token in range(14)) == pytest.approx(1.0)


@pytest.mark.parametrize("vocabulary", [14, 100])
def test_trigram_probabilities_are_those_of_the_definition(vocabulary: int) -> None:
    """With 100 tokens the discounts of all orders are estimated, with 14 those of the lowest cannot be."""
    train = zipf_tokens(1, vocabulary, 1000)
    model, last = TrigramModel(train, vocabulary), vocabulary - 1
    for trigram in [(0, 1, 2), (0, 0, 0), (9, 8, 7), (0, 1, last), (3, last, 2), (last - 1, last, 1), (last, 0, 11)]:
        assert probability(model, *trigram) == pytest.approx(kneser_ney(train.tolist(), vocabulary, *trigram)), trigram


def test_a_trigram_model_gives_every_token_a_chance() -> None:
    assert np.isfinite(TrigramModel(np.tile(np.arange(3), 50), 5).cross_entropy(np.array([4, 4, 4, 0, 1, 2])))


def test_a_trigram_model_learns_a_deterministic_sequence() -> None:
    cycle = np.tile(np.arange(5), 200)
    assert TrigramModel(cycle, 5).cross_entropy(cycle) < 0.02


def test_a_trigram_model_refuses_too_little_text() -> None:
    with pytest.raises(ValueError, match="training tokens"):
        TrigramModel(np.arange(3), 5)


TOO_SMALL = ("tiny-250k", "tiny-500k")
"""Rungs that a trigram model beats."""


def test_the_tiny_models_of_this_machine_beat_the_trigram_model_and_the_rung_below() -> None:
    """The models are those that earlier runs have pretrained; this test pretrains none."""
    folders = {}
    for name, recipe in LADDER.items():
        corpus = load_text(DataConfig(dataset=recipe.corpus))
        folders[name] = cache_folder() / "models" / f"{name}-{recipe_digest(recipe, corpus)}"
    pretrained = [name for name, folder in folders.items() if (folder / "pretraining.json").exists()]
    if not pretrained:
        pytest.skip("no tiny model has been pretrained here")
    records = [json.loads((ladder.ensure_tiny_model(name) / "pretraining.json").read_text()) for name in pretrained]
    for name, record in zip(pretrained, records, strict=True):
        if name not in TOO_SMALL:
            assert record["perplexity"] < 0.95 * record["trigram_perplexity"], record
    rungs = [record["perplexity"] for name, record in zip(pretrained, records, strict=True) if name.startswith("tiny")]
    assert rungs == sorted(rungs, reverse=True)


def test_the_tokenizer_returns_every_text_unchanged() -> None:
    tokenizer = train_tokenizer(["def f(x): return x"] * 5, 300)
    for text in ("def f(x):\n    return 'ß€☃'\t# \x00", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_tokenizer_is_loaded_with_the_rules_that_it_was_trained_with(tmp_path: Path) -> None:
    trained = train_tokenizer(["def f(x):\n    return x + 12\n\n\n# some text"] * 5, 300)
    trained.save_pretrained(tmp_path)
    ladder.architecture(recipe_for_tests()).save_pretrained(tmp_path)
    text = 'def f(x):\n    """add 30 to 45."""\n\n    return x + 3  # it\'s\n'
    assert AutoTokenizer.from_pretrained(tmp_path).encode(text) == trained.encode(text)


SIZES = {"250k": 0.28, "500k": 0.52, "1m": 1.05, "2m": 2.17, "4m": 4.22, "16m": 15.8, "60m": 61.1}
"""Millions of parameters, the shared embedding counted once."""


def test_recipes_name_their_models() -> None:
    assert list(LADDER) == [*(f"tiny-{size}" for size in SIZES), "mini-1m"]


@pytest.mark.parametrize("size", SIZES)
def test_the_ladder_climbs(size: str) -> None:
    """Each rung is wider, at least as deep and trained for longer than the one below."""
    with torch.device("meta"):
        model = Qwen2ForCausalLM(ladder.architecture(LADDER[f"tiny-{size}"]))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(SIZES[size], abs=0.05)
    below = [LADDER[f"tiny-{other}"] for other in list(SIZES)[: list(SIZES).index(size)]][-1:]
    for smaller in below:
        recipe = LADDER[f"tiny-{size}"]
        assert recipe.hidden_size > smaller.hidden_size
        assert recipe.n_layers >= smaller.n_layers
        assert recipe.steps > smaller.steps
        assert (recipe.vocabulary_size, recipe.corpus) == (smaller.vocabulary_size, smaller.corpus)


def test_recipes_of_earlier_versions_keep_their_digests() -> None:
    """Another digest makes everyone pretrain again."""
    corpus = TextDataset("tiny", False, {}, {}, "corpus")
    known = {
        "tiny-1m": "04ad4ae28ebd",
        "tiny-4m": "b07d7d6754be",
        "tiny-16m": "dfceafb8d96d",
        "mini-1m": "b9d4f7c39865",
    }
    assert {name: recipe_digest(LADDER[name], corpus) for name in known} == known


def test_a_change_of_recipe_or_corpus_makes_another_model(corpus: TextDataset) -> None:
    recipe = recipe_for_tests()
    other = TextDataset("tiny", False, corpus.splits, {}, "different")
    digests = {
        recipe_digest(recipe, corpus),
        recipe_digest(recipe_for_tests(steps=31), corpus),
        recipe_digest(recipe, other),
    }
    assert len(digests) == 3


def test_pretraining_learns_and_leaves_a_model_that_loads(
    corpus: TextDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EBFT_STUDY_CACHE", str(tmp_path))
    monkeypatch.setattr(ladder, "load_text", lambda _config: corpus)
    recipe = recipe_for_tests(
        vocabulary_size=300, sequence_length=32, batch_size=4, hidden_size=32, intermediate_size=48
    )
    monkeypatch.setitem(ladder.LADDER, "tiny-test", recipe)
    loaded = load_model("tiny-test")
    folder = next((tmp_path / "models").glob("tiny-test-*/"))
    record = json.loads((folder / "pretraining.json").read_text())
    known = read_config("tiny-test").to_dict()  # what a plan looks at, without training anything
    saved = loaded.model.config.to_dict()
    elsewhere = {"_name_or_path", "architectures", "dtype", "transformers_version", "initializer_range"}
    described = {*known} - elsewhere
    assert {key: saved.get(key) for key in described} == {key: known[key] for key in described}
    assert loaded.tokenizer.eos_token_id == known["eos_token_id"]
    assert record["perplexity"] < 100
    tokens = ladder.token_stream(corpus, "validation", loaded.tokenizer, limit=200_000)
    measured_again = math.exp(ladder.validation_cross_entropy(loaded.model, tokens, recipe.sequence_length))
    assert measured_again == pytest.approx(record["perplexity"], rel=1e-4), "the tokens are those of the pretraining"
    assert record["parameters"] == loaded.n_parameters
    assert "trigram baseline" in capsys.readouterr().out
    assert load_model("tiny-test").fingerprint == loaded.fingerprint
    assert capsys.readouterr().out == "", "the second load finds the model in the cache"
    assert not list((tmp_path / "models").glob(".*.tmp"))
    measured = record["trigram_perplexity"]
    weights = (folder / "model.safetensors").stat().st_mtime_ns
    del record["trigram_smoothing"]
    (folder / "pretraining.json").write_text(json.dumps(record | {"trigram_perplexity": 99}))
    assert load_model("tiny-test").fingerprint == loaded.fingerprint
    record = json.loads((folder / "pretraining.json").read_text())
    assert record["trigram_perplexity"] == measured, "a record of version 0.1 had another trigram model's"
    assert (folder / "model.safetensors").stat().st_mtime_ns == weights
