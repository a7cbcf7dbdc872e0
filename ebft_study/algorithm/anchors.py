"""Anchors: where a sequence is cut into nested contexts and ground-truth completions (appendix F)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Anchors(NamedTuple):
    """Anchor `b` of a sequence: context = tokens before `positions[b]` of the same document."""

    positions: Tensor
    """[S, B] int64: index of the first completion token, 0 where not valid."""
    valid: Tensor
    """[S, B] bool: False pads sequences that have fewer anchors than the batch's largest B."""

    def padded(self, count: int) -> Anchors:
        """The same anchors as the first of `count` of each sequence."""
        more = count - self.positions.shape[1]
        return Anchors(*(torch.nn.functional.pad(values, (0, more)) for values in self))


def document_positions(document_ids: Tensor) -> Tensor:
    """Position of every token within its own document, [S, T] -> [S, T] int64, starting at 0.

    `document_ids` is constant within a document and changes at its end; -1 is padding (positions there are unused).
    """
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def find_anchors(
    document_ids: Tensor,
    *,
    completion_length: int,
    stride: int,
    first_context_length: int,
    answer_mask: Tensor | None = None,
) -> Anchors:
    """Anchors `a_b = C + b s` counted from each document's first token, ragged sequences padded.

    An anchor exists where its context has at least `first_context_length` (C) tokens and its completion of
    `completion_length` (G) tokens ends within the same document: never in padding, never across a boundary. With
    one document of T tokens this gives `B = floor((T - G - C) / s) + 1`; nothing has to divide anything.

    Args:
        document_ids: [S, T] int64, -1 marks padding.
        answer_mask: [S, T] bool; when given, every completion token must be an answer token (`anchor_region: answer`).

    Returns:
        Anchors with B = the most anchors any sequence has; B = 0 when no sequence has one.
    """
    n_tokens, G = document_ids.shape[1], completion_length
    offset = document_positions(document_ids)
    allowed = (offset >= first_context_length) & ((offset - first_context_length) % stride == 0) & (document_ids >= 0)
    # The completion a .. a+G-1 stays in the document exactly if its last token is G-1 positions further in it.
    last = (torch.arange(n_tokens, device=document_ids.device) + G - 1).clamp(max=n_tokens - 1).expand_as(offset)
    same_document = (document_ids.gather(1, last) == document_ids) & (offset.gather(1, last) == offset + G - 1)
    allowed &= same_document
    if answer_mask is not None:
        answers_before = torch.nn.functional.pad(answer_mask.long().cumsum(dim=1), (1, 0))
        allowed &= answers_before.gather(1, last + 1) - answers_before[:, :-1] == G
    return _pack(allowed)


def _pack(allowed: Tensor) -> Anchors:
    counts = allowed.sum(dim=1)
    B = int(counts.max()) if counts.numel() else 0
    # A stable sort on "not allowed" brings the allowed positions to the front, in order.
    positions = torch.sort((~allowed).to(torch.int8), dim=1, stable=True).indices[:, :B]
    valid = torch.arange(B, device=allowed.device) < counts[:, None]
    return Anchors(torch.where(valid, positions, 0), valid)


def completion_positions(anchors: Anchors, completion_length: int, n_tokens: int) -> Tensor:
    """Positions `a_b .. a_b + G - 1` in a sequence of `n_tokens`: [S, B] -> [S, B, G]; arbitrary where not valid."""
    offsets = torch.arange(completion_length, device=anchors.positions.device)
    return (anchors.positions[..., None] + offsets).clamp(max=n_tokens - 1)


def completions_at(tokens: Tensor, anchors: Anchors, completion_length: int) -> Tensor:
    """Ground-truth completions `y_b = x[a_b : a_b + G]`: [S, T] -> [S, B, G]; arbitrary tokens where not valid."""
    index = completion_positions(anchors, completion_length, tokens.shape[1])
    return tokens.gather(1, index.flatten(1)).view(index.shape)


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Rows of every sequence by their numbers: [S, M, X] and [S, ...] int64 -> [S, ..., X]."""
    chosen = rows.gather(1, index.flatten(1)[..., None].expand(-1, -1, rows.shape[-1]))
    return chosen.view(*index.shape, rows.shape[-1])


class Contexts(NamedTuple):
    """Prefix tokens that each completion block may attend to: positions `start .. end - 1` of its sequence."""

    start: Tensor
    """[S, N] int64: first token of the block's document."""
    end: Tensor
    """[S, N] int64: the anchor; equal to `start` where the anchor is not valid. `end - start` is the block's
    position in its document."""


def contexts_of(document_ids: Tensor, anchors: Anchors) -> Contexts:
    """Contexts of the B anchors (N = B), [S, T] -> [S, B]."""
    offset = document_positions(document_ids).gather(1, anchors.positions)
    end = torch.where(anchors.valid, anchors.positions, 0)
    return Contexts(torch.where(anchors.valid, anchors.positions - offset, 0), end)


def distinct_completions(completions: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """One of each set of identical completions of the same context; completions at invalid anchors are left out.

    Args:
        completions: [S, B, n, G].
        valid: [S, B] bool.

    Returns:
        Numbers in 0 .. B n - 1 of the chosen completions, [S, M], in order, with M the most any sequence needs
        (others repeat one of theirs), and where each completion is found among them, [S, B, n] (0 if not valid).
    """
    S, B, n = completions.shape[:3]
    if B == 0:
        return completions.new_empty(S, 0), completions.new_empty(S, 0, n)
    same = (completions[:, :, :, None] == completions[:, :, None]).all(dim=-1)
    first = same.to(torch.int8).argmax(dim=-1)
    chosen = (first == torch.arange(n, device=first.device)) & valid[..., None]
    flat = chosen.flatten(1)
    M = max(int(flat.sum(dim=1).max()), 1)
    order = torch.sort((~flat).to(torch.int8), dim=1, stable=True).indices[:, :M]
    slot = (flat.cumsum(dim=1) - 1).view(S, B, n)
    return order, torch.where(valid[..., None], slot.gather(2, first), 0)
