"""Tokenization: rows of tokens with document boundaries and answer masks, and the rows of each optimizer step.

Prompt and answer are encoded separately and concatenated, so the answer mask is exact: no token straddles the boundary.
Where a tokenizer would merge characters across it, the tokens differ from those of the concatenated text; generation
also starts from the encoded prompt alone, so training and sampling agree.
"""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ebft_study.algorithm.losses import next_token_mask
from ebft_study.data.cache import Facts, Tensors, cached_tensors
from ebft_study.data.examples import Example, content_hash
from ebft_study.errors import DataError

PADDING_DOCUMENT = -1
CACHED_CHARACTERS = 1_000_000  # about a second of work on a laptop
TEXTS_PER_CALL = 64  # the tokenizer's bookkeeping takes many times the memory of the token ids: 300 bytes per token
CHARACTERS_PER_CALL = 2**17
_WORD = re.compile(r"(?<=\w) (?=\w)")


@dataclass(frozen=True)
class Batch:
    """S rows of a `TokenDataset`; `indices` [S] are their row numbers there."""

    tokens: torch.Tensor
    document_ids: torch.Tensor
    answer_mask: torch.Tensor
    indices: torch.Tensor

    def select(self, rows: torch.Tensor) -> Batch:
        """Return the rows with these numbers, repetitions allowed."""
        return Batch(self.tokens[rows], self.document_ids[rows], self.answer_mask[rows], self.indices[rows])

    def padded(self, count: int) -> Batch:
        """The same rows as the first of `count`; the others are padding from their first to their last token."""
        own = len(self.indices)
        batch = self.select(torch.arange(count, device=self.indices.device).clamp(max=own - 1))
        batch.document_ids[own:], batch.answer_mask[own:] = PADDING_DOCUMENT, False
        return batch

    def to(self, device: torch.device | str) -> Batch:
        """Copy the batch to `device`."""
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))

    def ce_mask(self, region: str) -> torch.Tensor:
        """Tokens of `region` (all or answer) that carry cross-entropy, [S, T-1]."""
        return next_token_mask(self.document_ids, self.answer_mask if region == "answer" else None)


@dataclass(frozen=True)
class TokenDataset:
    """M rows of T tokens, with counts of examples that were dropped or truncated.

    `tokens` [M, T] int64. `document_ids` [M, T] int64: 0, 1, 2.. within the row, -1 = padding (always at the end).
    `answer_mask` [M, T] bool: answer tokens and the EOS after them; all False for raw text.
    `examples` [M] int64: number of the row's example within its split; -1 where packing put several into the row.
    `dropped`: examples that left no token to learn. `truncated`: examples cut at T (prompt and answer only).
    """

    tokens: torch.Tensor
    document_ids: torch.Tensor
    answer_mask: torch.Tensor
    examples: torch.Tensor
    dropped: int = 0
    truncated: int = 0

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def rows(self, indices: torch.Tensor) -> Batch:
        """Return the rows with these numbers [S], repetitions allowed."""
        return Batch(self.tokens[indices], self.document_ids[indices], self.answer_mask[indices], indices)


def batch_indices(*, size: int, batch_size: int, step: int, seed: int) -> torch.Tensor:
    """Row numbers [batch_size] of optimizer step `step` (from 0): a pure function of its arguments.

    Every epoch is a fresh permutation of all `size` rows; a batch that reaches an epoch's end continues into the next.
    """
    if size < 1:
        raise DataError("a data set without rows cannot be trained on. Use other data or a longer sequence_length")
    positions = range(step * batch_size, (step + 1) * batch_size)
    return torch.tensor([int(_permutation(size, position // size, seed)[position % size]) for position in positions])


@functools.lru_cache(maxsize=4)
def _permutation(size: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence([seed, epoch])).permutation(size)


def tokenize(
    examples: Iterable[Example], tokenizer: Any, *, sequence_length: int, packing: bool, has_answers: bool
) -> TokenDataset:
    """Tokenize examples into rows of T = `sequence_length` tokens, in their order.

    Raw text: a document is cut into consecutive rows (a last row of one token has nothing to predict and is left
    out); with `packing`, documents, each followed by EOS, are concatenated and cut into rows, so that only the last row
    is padded. Prompt and answer: one example and EOS, truncated to T; an example whose prompt leaves no room for an
    answer token is dropped. With `packing`, a row takes whole examples: each goes to the fullest row that has room.

    Large inputs are cached by content, so that the trials of a study tokenize them once.
    """
    examples = list(examples)
    special = _SpecialTokens.from_tokenizer(tokenizer)
    make = functools.partial(_tokenize, examples, tokenizer, special, sequence_length, packing, has_answers)
    if sum(len(example.prompt) + len(example.answer) for example in examples) < CACHED_CHARACTERS:
        tensors, facts = make()
    else:
        recipe = {
            "content": content_hash(examples),
            "tokenizer": [tokenizer.backend_tokenizer.to_str(), special.start, special.end, special.padding],
            "rows": [sequence_length, packing, has_answers],
        }
        tensors, facts = cached_tensors("tokens", recipe, make)
    return TokenDataset(
        tokens=tensors["tokens"].long(),
        document_ids=tensors["document_ids"].long(),
        answer_mask=tensors["answer_mask"],
        examples=tensors["examples"].long(),
        dropped=facts["dropped"],
        truncated=facts["truncated"],
    )


@dataclass(frozen=True)
class _SpecialTokens:
    """Tokens around a document.

    `start`: BOS where the tokenizer puts one in front of every text (Llama), nothing elsewhere (Qwen). `end`: EOS if
    there is one. `padding`: the padding token, or EOS, or 0; it is neither attended to nor learnt.
    """

    start: list[int]
    end: list[int]
    padding: int

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> _SpecialTokens:
        bos, eos, padding = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        return cls(
            start=[bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else [],
            end=[] if eos is None else [eos],
            padding=next((int(token) for token in (padding, eos) if token is not None), 0),
        )


@dataclass(frozen=True)
class _Piece:
    """Consecutive tokens of example number `example`; the first `prompt_length` are not answer."""

    tokens: np.ndarray
    example: int
    prompt_length: int = 0


def _tokenize(
    examples: list[Example], tokenizer: Any, special: _SpecialTokens, length: int, packing: bool, has_answers: bool
) -> tuple[Tensors, Facts]:
    if has_answers:
        pieces, truncated = _pairs(examples, tokenizer, special, length)
        dropped = len(examples) - len(pieces)
        rows = _pack_pieces(pieces, length) if packing else [[piece] for piece in pieces]
    else:
        end = special.end if packing else []
        encoded = _encode(tokenizer, [example.answer for example in examples])
        documents = [
            _Piece(np.array([*special.start, *tokens, *end]), number) for number, tokens in enumerate(encoded) if tokens
        ]
        dropped, truncated = len(examples) - len(documents), 0
        rows = _pack_documents(documents, length) if packing else _chunk_documents(documents, length)
    if not rows:
        reason = "every prompt fills the whole sequence" if has_answers else "no document has two tokens"
        raise DataError(
            f"sequence_length={length}: none of {len(examples)} examples gives a training sequence ({reason}). "
            "Use a longer sequence_length or other data"
        )
    tensors = _tensors(rows, length, padding=special.padding, has_answers=has_answers)
    return tensors, {"dropped": dropped, "truncated": truncated}


def _pairs(examples: list[Example], tokenizer: Any, special: _SpecialTokens, length: int) -> tuple[list[_Piece], int]:
    """One piece of at most `length` tokens per example that has room for an answer, and how many were truncated."""
    prompts = _encode(tokenizer, [example.prompt for example in examples])
    answers = _encode(tokenizer, [example.answer for example in examples])
    pieces, truncated = [], 0
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens = [*special.start, *prompt, *answer, *special.end]
        prompt_length = len(special.start) + len(prompt)
        if prompt_length < length and answer:
            truncated += len(tokens) > length
            pieces.append(_Piece(np.array(tokens[:length]), number, prompt_length))
    return pieces, truncated


def _encode(tokenizer: Any, texts: list[str]) -> Iterator[list[int]]:
    """Token ids per text, without special tokens; `verbose=False` silences warnings about long texts."""
    encode = functools.partial(tokenizer, add_special_tokens=False, return_attention_mask=False, verbose=False)
    for batch in _batches(texts):
        if len(batch[0]) > CHARACTERS_PER_CALL and _may_be_cut(tokenizer):
            yield [token for part in _parts(batch[0]) for token in encode([part])["input_ids"][0]]
        else:
            yield from encode(batch)["input_ids"]


def _batches(texts: list[str]) -> Iterator[list[str]]:
    """Consecutive texts, so few that their tokens take little memory; a long one is alone."""
    batch, size = list[str](), 0
    for text in texts:
        if batch and (len(batch) == TEXTS_PER_CALL or size + len(text) > CHARACTERS_PER_CALL):
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def _may_be_cut(tokenizer: Any) -> bool:
    """Whether tokens never reach over the beginning of a word, and nothing is put in front of a text."""
    whole, *parts = tokenizer(["one two", "one", " two"], add_special_tokens=False)["input_ids"]
    return bool(whole == [*parts[0], *parts[1]])


def _parts(text: str) -> Iterator[str]:
    """A text cut before words."""
    begin = 0
    while cut := _WORD.search(text, begin + CHARACTERS_PER_CALL):
        yield text[begin : cut.start()]
        begin = cut.start()
    yield text[begin:]


def _chunk_documents(documents: list[_Piece], length: int) -> list[list[_Piece]]:
    """Rows of consecutive tokens of one document each."""
    return [
        [_Piece(chunk, document.example)]
        for document in documents
        for begin in range(0, len(document.tokens), length)
        if len(chunk := document.tokens[begin : begin + length]) > 1
    ]


def _pack_documents(documents: list[_Piece], length: int) -> list[list[_Piece]]:
    """Rows of documents end to end, cut wherever a row is full."""
    rows: list[list[_Piece]] = []
    room = 0
    for document in documents:
        begin = 0
        while begin < len(document.tokens):
            if room == 0:
                rows.append([])
                room = length
            tokens = document.tokens[begin : begin + room]
            rows[-1].append(_Piece(tokens, document.example))
            begin, room = begin + len(tokens), room - len(tokens)
    return rows


def _pack_pieces(pieces: list[_Piece], length: int) -> list[list[_Piece]]:
    """Rows of whole pieces, each in the row with the least room that still holds it (best fit)."""
    rows: list[list[_Piece]] = []
    rooms: list[tuple[int, int]] = []  # (room, row), sorted
    for piece in pieces:
        size = len(piece.tokens)
        position = bisect.bisect_left(rooms, (size, 0))
        if position < len(rooms):
            room, row = rooms.pop(position)
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(piece)
        bisect.insort(rooms, (room - size, row))
    return rows


def _tensors(rows: list[list[_Piece]], length: int, *, padding: int, has_answers: bool) -> Tensors:
    """Rows as [M, T] tensors; int32 halves the size of the cached file."""
    tokens = np.full((len(rows), length), padding, dtype=np.int32)
    document_ids = np.full((len(rows), length), PADDING_DOCUMENT, dtype=np.int32)
    answer_mask = np.zeros((len(rows), length), dtype=bool)
    examples_of_rows = [{piece.example for piece in row} for row in rows]
    examples = np.array([numbers.pop() if len(numbers) == 1 else -1 for numbers in examples_of_rows], dtype=np.int32)
    for index, row in enumerate(rows):
        begin = 0
        for number, piece in enumerate(row):
            stop = begin + len(piece.tokens)
            tokens[index, begin:stop] = piece.tokens
            document_ids[index, begin:stop] = number
            answer_mask[index, begin + piece.prompt_length : stop] = has_answers
            begin = stop
    arrays = {"tokens": tokens, "document_ids": document_ids, "answer_mask": answer_mask, "examples": examples}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def encode_prompts(tokenizer: Any, prompts: Iterable[str]) -> list[list[int]]:
    """Token ids of prompts, as training sees them."""
    start = _SpecialTokens.from_tokenizer(tokenizer).start
    return [[*start, *tokens] for tokens in _encode(tokenizer, list(prompts))]
