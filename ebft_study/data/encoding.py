"""From examples to rows of tokens: encoding, truncation, chunks, packing.

Prompt and answer are encoded separately and joined, so the answer mask is exact: no token straddles the border. Where
a tokenizer would merge characters across it, the tokens differ from those of the joined text; generation also starts
from the encoded prompt alone, so training and sampling agree.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ebft_study.data.cache import Facts, Tensors, cached_tensors
from ebft_study.data.examples import Example, content_hash
from ebft_study.data.tokens import PADDING_DOCUMENT, TokenDataset
from ebft_study.errors import DataError

CACHED_CHARACTERS = 1_000_000  # about a second of work on a laptop
TEXTS_AT_ONCE = 64  # the tokenizer's bookkeeping takes many times the memory of the token ids


@dataclass(frozen=True)
class _Piece:
    """Consecutive tokens of one document; the first `prompt_length` are not answer."""

    tokens: np.ndarray
    prompt_length: int


def tokenize(
    examples: Iterable[Example], tokenizer: Any, *, sequence_length: int, packing: bool, has_answers: bool
) -> TokenDataset:
    """Examples as rows of T = `sequence_length` tokens, in their order.

    Raw text: a document is cut into consecutive rows (a last row of one token has nothing to predict and is left
    out); with `packing`, documents, each followed by EOS, are joined and cut into rows, so that only the last row is
    padded. Prompt and answer: one example and EOS, truncated to T; an example whose prompt leaves no room for an
    answer token is dropped. With `packing`, a row takes whole examples: each goes to the fullest row that has room.

    Large inputs are cached by content, so that the trials of a study tokenize them once.
    """
    examples = list(examples)
    make = functools.partial(_tokenize, examples, tokenizer, sequence_length, packing, has_answers)
    if sum(len(example.prompt) + len(example.answer) for example in examples) < CACHED_CHARACTERS:
        tensors, facts = make()
    else:
        recipe = {
            "content": content_hash(examples),
            "tokenizer": [tokenizer.backend_tokenizer.to_str(), _start(tokenizer), _end(tokenizer), _pad(tokenizer)],
            "rows": [sequence_length, packing, has_answers],
        }
        tensors, facts = cached_tensors("tokens", recipe, make)
    return TokenDataset(
        tokens=tensors["tokens"].long(),
        document_ids=tensors["document_ids"].long(),
        answer_mask=tensors["answer_mask"],
        dropped=facts["dropped"],
        truncated=facts["truncated"],
    )


def _tokenize(
    examples: list[Example], tokenizer: Any, length: int, packing: bool, has_answers: bool
) -> tuple[Tensors, Facts]:
    if has_answers:
        pieces, facts = _pairs(examples, tokenizer, length)
        rows = _packed_whole(pieces, length) if packing else [[piece] for piece in pieces]
    else:
        documents, facts = _documents(examples, tokenizer, end=_end(tokenizer) if packing else [])
        rows = _packed_stream(documents, length) if packing else _chunks(documents, length)
    if not rows:
        reason = "every prompt fills the whole sequence" if has_answers else "no document has two tokens"
        raise DataError(
            f"sequence_length={length}: none of {len(examples)} examples gives a training sequence ({reason}). "
            "Use a longer sequence_length or other data"
        )
    return _tensors(rows, length, padding=_pad(tokenizer), has_answers=has_answers), facts


def _pairs(examples: list[Example], tokenizer: Any, length: int) -> tuple[list[_Piece], Facts]:
    """One piece of at most `length` tokens per example that has room for an answer."""
    start, end = _start(tokenizer), _end(tokenizer)
    prompts = _encode(tokenizer, [example.prompt for example in examples])
    answers = _encode(tokenizer, [example.answer for example in examples])
    pieces, truncated = [], 0
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = [*start, *prompt, *answer, *end]
        prompt_length = len(start) + len(prompt)
        if prompt_length < length and answer:
            truncated += len(tokens) > length
            pieces.append(_Piece(np.array(tokens[:length]), prompt_length))
    return pieces, {"dropped": len(examples) - len(pieces), "truncated": truncated}


def _documents(examples: list[Example], tokenizer: Any, *, end: list[int]) -> tuple[list[np.ndarray], Facts]:
    """The tokens of each document, whole."""
    start = _start(tokenizer)
    encoded = _encode(tokenizer, [example.answer for example in examples])
    documents = [np.array([*start, *tokens, *end]) for tokens in encoded if tokens]
    return documents, {"dropped": len(examples) - len(documents), "truncated": 0}


def _chunks(documents: list[np.ndarray], length: int) -> list[list[_Piece]]:
    """Rows of consecutive tokens of one document."""
    chunks = (document[begin : begin + length] for document in documents for begin in range(0, len(document), length))
    return [[_Piece(chunk, 0)] for chunk in chunks if len(chunk) > 1]


def _packed_stream(documents: list[np.ndarray], length: int) -> list[list[_Piece]]:
    """Documents end to end, cut wherever a row is full."""
    rows: list[list[_Piece]] = []
    room = 0
    for document in documents:
        begin = 0
        while begin < len(document):
            if room == 0:
                rows.append([])
                room = length
            piece = document[begin : begin + room]
            rows[-1].append(_Piece(piece, 0))
            begin, room = begin + len(piece), room - len(piece)
    return rows


def _packed_whole(pieces: list[_Piece], length: int) -> list[list[_Piece]]:
    """Whole pieces, each in the row with the least room that still holds it (best fit)."""
    rows: list[list[_Piece]] = []
    rooms: list[tuple[int, int]] = []  # (room, row), sorted
    for piece in pieces:
        size = len(piece.tokens)
        place = bisect.bisect_left(rooms, (size, 0))
        if place < len(rooms):
            room, row = rooms.pop(place)
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(piece)
        bisect.insort(rooms, (room - size, row))
    return rows


def _tensors(rows: list[list[_Piece]], length: int, *, padding: int, has_answers: bool) -> Tensors:
    """Rows as [M, T] tensors; int32 halves what the cache holds."""
    tokens = np.full((len(rows), length), padding, dtype=np.int32)
    document_ids = np.full((len(rows), length), PADDING_DOCUMENT, dtype=np.int32)
    answer_mask = np.zeros((len(rows), length), dtype=bool)
    for index, row in enumerate(rows):
        begin = 0
        for number, piece in enumerate(row):
            stop = begin + len(piece.tokens)
            tokens[index, begin:stop] = piece.tokens
            document_ids[index, begin:stop] = number
            answer_mask[index, begin + piece.prompt_length : stop] = has_answers
            begin = stop
    arrays = {"tokens": tokens, "document_ids": document_ids, "answer_mask": answer_mask}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _encode(tokenizer: Any, texts: list[str]) -> Iterator[list[int]]:
    """Token ids per text, without special tokens. `verbose` warns of texts longer than the model's maximum."""
    for begin in range(0, len(texts), TEXTS_AT_ONCE):
        yield from tokenizer(
            texts[begin : begin + TEXTS_AT_ONCE],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]


def _start(tokenizer: Any) -> list[int]:
    """BOS where the tokenizer puts one in front of every text (Llama), nothing elsewhere (Qwen)."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _pad(tokenizer: Any) -> int:
    """The padding token, or EOS, or 0: padding is neither attended to nor learnt."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
