"""Rows of tokens with their document boundaries and answers, and which rows an optimizer step uses."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch

from ebft_study.algorithm.losses import next_token_mask
from ebft_study.errors import DataError

PADDING_DOCUMENT = -1


@dataclass(frozen=True)
class Batch:
    """S rows of a `TokenDataset`; `indices` [S] are their row numbers there."""

    tokens: torch.Tensor
    document_ids: torch.Tensor
    answer_mask: torch.Tensor
    indices: torch.Tensor

    def select(self, rows: torch.Tensor) -> Batch:
        """The batch's rows with these numbers, repetitions allowed."""
        return Batch(self.tokens[rows], self.document_ids[rows], self.answer_mask[rows], self.indices[rows])

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return Batch(
            tokens=self.tokens.to(device),
            document_ids=self.document_ids.to(device),
            answer_mask=self.answer_mask.to(device),
            indices=self.indices.to(device),
        )

    def ce_mask(self, region: str) -> torch.Tensor:
        """Tokens of `region` (all or answer) that carry cross-entropy, [S, T-1]."""
        return next_token_mask(self.document_ids, self.answer_mask if region == "answer" else None)


@dataclass(frozen=True)
class TokenDataset:
    """M rows of T tokens, and what became of the examples.

    `tokens` [M, T] int64. `document_ids` [M, T] int64: 0, 1, 2.. within the row, -1 = padding (always at the end).
    `answer_mask` [M, T] bool: answer tokens and the EOS after them; all False for raw text.
    `dropped`: examples that left no token to learn. `truncated`: examples cut at T (prompt and answer only).
    """

    tokens: torch.Tensor
    document_ids: torch.Tensor
    answer_mask: torch.Tensor
    dropped: int = 0
    truncated: int = 0

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def rows(self, indices: torch.Tensor) -> Batch:
        """The rows with these numbers [S], repetitions allowed."""
        return Batch(self.tokens[indices], self.document_ids[indices], self.answer_mask[indices], indices)


def batch_indices(*, size: int, batch_size: int, step: int, seed: int) -> torch.Tensor:
    """Row numbers [batch_size] of optimizer step `step` (from 0): a pure function of its arguments.

    Every epoch is a fresh permutation of all `size` rows; a batch that reaches an epoch's end goes on with the next.
    """
    if size < 1:
        raise DataError("a data set without rows cannot be trained on. Use other data or a longer sequence_length")
    positions = range(step * batch_size, (step + 1) * batch_size)
    return torch.tensor([int(_permutation(size, position // size, seed)[position % size]) for position in positions])


@functools.lru_cache(maxsize=4)
def _permutation(size: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence([seed, epoch])).permutation(size)
