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

from ebft_study.data import Example, TextDataset
from ebft_study.networks.loading import load_model, read_config
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


def test_trigram_probabilities_sum_to_one_over_the_vocabulary() -> None:
    rng = np.random.default_rng(0)
    model = TrigramModel(rng.integers(0, 6, 500), 6)
    for context in itertools.product(range(6), repeat=2):
        total = sum(math.exp(-model.cross_entropy(np.array([*context, token]))) for token in range(6))
        assert total == pytest.approx(1.0)


def test_trigram_estimates_equal_counting() -> None:
    """At every position of the counted text, some of whose contexts occur once."""
    rng, V = np.random.default_rng(1), 10
    train = rng.integers(0, V, 400)
    model = TrigramModel(train, V, held_back=0.1)
    counted = train[:360].tolist()
    trigrams = Counter(zip(counted, counted[1:], counted[2:], strict=False))
    bigrams = Counter(itertools.pairwise(counted[1:]))
    unigrams = Counter(counted[2:])
    assert any(sum(trigrams[u, v, x] for x in range(V)) == 1 for u, v, _ in trigrams)
    for u, v, w in trigrams:
        p3 = trigrams[u, v, w] / sum(trigrams[u, v, x] for x in range(V))
        p2 = bigrams[v, w] / sum(bigrams[v, x] for x in range(V))
        p1 = unigrams[w] / len(counted[2:])
        expected = model.weights @ np.array([1 / V, p1, p2, p3])
        assert model.cross_entropy(np.array([u, v, w])) == pytest.approx(-math.log(expected))


def test_a_trigram_model_learns_a_deterministic_sequence() -> None:
    cycle = np.tile(np.arange(5), 200)
    assert TrigramModel(cycle, 5).cross_entropy(cycle) < 0.01


def test_a_trigram_model_refuses_too_little_text() -> None:
    with pytest.raises(ValueError, match="training tokens"):
        TrigramModel(np.arange(3), 5)


def test_the_tokenizer_returns_every_text_unchanged() -> None:
    tokenizer = train_tokenizer(["def f(x): return x"] * 5, 300)
    for text in ("def f(x):\n    return 'ß€☃'\t# \x00", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_recipes_name_their_models() -> None:
    assert list(LADDER) == ["tiny-1m", "tiny-4m", "tiny-16m"]


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
    assert record["parameters"] == loaded.n_parameters
    assert "trigram baseline" in capsys.readouterr().out
    assert load_model("tiny-test").fingerprint == loaded.fingerprint
    assert capsys.readouterr().out == "", "the second load finds the model in the cache"
    assert not list((tmp_path / "models").glob(".*.tmp"))
