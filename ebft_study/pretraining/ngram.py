"""A trigram model with modified Kneser-Ney smoothing: the baseline that a pretrained tiny model must clearly beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ORDER = 3
SMOOTHING = "modified Kneser-Ney"
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
"""For counts 1, 2 and more, where a text is too small or too regular to estimate them."""


class TrigramModel:
    """Interpolated modified Kneser-Ney (Chen and Goodman, 1998, section 3).

    `p(w | h) = (c(h w) - D(c(h w))) / c(h) + (sum_v D(c(h v)) / c(h)) p(w | h')`, where h' is h without its first
    token, and `p(w | h) = p(w | h')` for a context h that training has not seen. Below the highest order, c counts the
    distinct tokens that precede an n-gram. The lowest order is interpolated with the uniform distribution.
    """

    def __init__(self, train: np.ndarray, vocabulary: int) -> None:
        if len(train) <= ORDER:
            raise ValueError(f"a trigram model needs more than {ORDER} training tokens, but got {len(train)}")
        self.vocabulary = vocabulary
        keys, counts = np.unique(_ngrams(train, ORDER, vocabulary), return_counts=True)
        levels = [_Level.from_counts(keys, counts, vocabulary)]
        for order in range(ORDER - 1, 0, -1):
            keys, counts = np.unique(keys % vocabulary**order, return_counts=True)
            levels.append(_Level.from_counts(keys, counts, vocabulary))
        self._levels = levels[::-1]

    def cross_entropy(self, tokens: np.ndarray) -> float:
        """Mean negative log-probability in nats per token, from the third token on."""
        probabilities = np.full(len(tokens) - ORDER + 1, 1.0 / self.vocabulary)
        for order, level in enumerate(self._levels, start=1):
            probabilities = level.interpolated(_ngrams(tokens, order, self.vocabulary), probabilities)
        return float(-np.log(probabilities).mean())


@dataclass(frozen=True)
class _Level:
    """N-grams of one order, packed into integers, and their contexts; both sorted."""

    vocabulary: int
    ngrams: np.ndarray
    discounted: np.ndarray
    """Count of each n-gram minus its discount."""
    contexts: np.ndarray
    totals: np.ndarray
    """Count of each context."""
    left_over: np.ndarray
    """Discounts of each context's n-grams, which the lower order shares out."""

    @staticmethod
    def from_counts(ngrams: np.ndarray, counts: np.ndarray, vocabulary: int) -> _Level:
        discounts = np.take(_discounts(counts), np.minimum(counts, 3) - 1)
        contexts, first = np.unique(ngrams // vocabulary, return_index=True)
        totals, left_over = np.add.reduceat(counts, first), np.add.reduceat(discounts, first)
        return _Level(vocabulary, ngrams, counts - discounts, contexts, totals, left_over)

    def interpolated(self, ngrams: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """Probabilities of the last tokens of `ngrams`, given those of the order below."""
        contexts = ngrams // self.vocabulary
        totals = _look_up(contexts, self.contexts, self.totals)
        mass = (
            _look_up(ngrams, self.ngrams, self.discounted) + _look_up(contexts, self.contexts, self.left_over) * lower
        )
        return np.where(totals > 0, mass / np.maximum(totals, 1), lower)


def _discounts(counts: np.ndarray) -> tuple[float, ...]:
    """Discounts of counts 1, 2 and more: `k - (k + 1) Y n_{k+1} / n_k`, `Y = n_1 / (n_1 + 2 n_2)`, n_k: counts of k."""
    n = [int((counts == k).sum()) for k in range(5)]
    if not all(n[1:4]):
        return FALLBACK_DISCOUNTS
    y = n[1] / (n[1] + 2 * n[2])
    estimated = tuple(k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3))
    return estimated if all(0 < d <= k for k, d in enumerate(estimated, start=1)) else FALLBACK_DISCOUNTS


def _ngrams(tokens: np.ndarray, order: int, vocabulary: int) -> np.ndarray:
    """The packed n-grams that end at every position >= ORDER - 1."""
    packed = np.zeros(len(tokens) - ORDER + 1, dtype=np.int64)
    for back in range(order - 1, -1, -1):
        packed = packed * vocabulary + tokens[ORDER - 1 - back : len(tokens) - back]
    return packed


def _look_up(keys: np.ndarray, sorted_keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The values of keys; 0 for those that are not in `sorted_keys`."""
    index = np.searchsorted(sorted_keys, keys).clip(max=len(sorted_keys) - 1)
    return np.where(sorted_keys[index] == keys, values[index], 0)
