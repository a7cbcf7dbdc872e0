"""An interpolated trigram model: the baseline that a pretrained tiny model must clearly beat."""

from __future__ import annotations

import numpy as np

ORDER = 3


def _contexts(tokens: np.ndarray, order: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Packed (context, token) and context keys of every position >= ORDER - 1, for n-grams of `order`."""
    key = np.zeros(len(tokens) - ORDER + 1, dtype=np.int64)
    for back in range(order - 1, 0, -1):
        key = key * vocabulary + tokens[ORDER - 1 - back : len(tokens) - back]
    return key * vocabulary + tokens[ORDER - 1 :], key


class TrigramModel:
    """`p(w | u v) = sum_k lambda_k p_k(w | last k-1 tokens)` with a uniform floor (Jelinek-Mercer).

    The weights maximise the likelihood of held-back training tokens by expectation maximisation.
    """

    def __init__(self, train: np.ndarray, vocabulary: int, *, held_back: float = 0.05) -> None:
        split = int(len(train) * (1 - held_back))
        if split <= ORDER or len(train) - split <= ORDER:
            raise ValueError(f"a trigram model needs more than {ORDER} training tokens, but got {len(train)}")
        self.vocabulary = vocabulary
        self.counts = []
        for order in range(1, ORDER + 1):
            pairs, contexts = _contexts(train[:split], order, vocabulary)
            self.counts.append((np.unique(pairs, return_counts=True), np.unique(contexts, return_counts=True)))
        self.weights = self._fit(self._estimates(train[split:]))

    def _estimates(self, tokens: np.ndarray) -> np.ndarray:
        """Relative frequencies of each order at every position, the uniform one first: [ORDER + 1, positions]."""
        rows = [np.full(len(tokens) - ORDER + 1, 1.0 / self.vocabulary)]
        for order in range(1, ORDER + 1):
            pairs, contexts = _contexts(tokens, order, self.vocabulary)
            joint, marginal = self.counts[order - 1]
            numerator, denominator = _look_up(pairs, *joint), _look_up(contexts, *marginal)
            rows.append(numerator / np.maximum(denominator, 1))
        return np.stack(rows)

    @staticmethod
    def _fit(estimates: np.ndarray, iterations: int = 50) -> np.ndarray:
        weights = np.full(len(estimates), 1.0 / len(estimates))
        for _ in range(iterations):
            shares = weights[:, None] * estimates
            weights = (shares / shares.sum(axis=0)).mean(axis=1)
        return weights

    def cross_entropy(self, tokens: np.ndarray) -> float:
        """Mean negative log-probability in nats per token, from the third token on."""
        return float(-np.log(self.weights @ self._estimates(tokens)).mean())


def _look_up(keys: np.ndarray, counted: np.ndarray, counts: np.ndarray) -> np.ndarray:
    index = np.searchsorted(counted, keys).clip(max=len(counted) - 1)
    return np.where(counted[index] == keys, counts[index], 0)
