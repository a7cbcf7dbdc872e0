"""What every source of text yields, and how examples become a data set with three disjoint splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ebft_study.errors import DataError

SPLITS = ("train", "validation", "heldout")


@dataclass(frozen=True)
class Example:
    """One document. Raw text has an empty `prompt` and the text in `answer`; `origin` names its file or row."""

    prompt: str
    answer: str
    origin: str


@dataclass(frozen=True)
class TextDataset:
    """Text in three splits that share no example.

    `splits`: "train" | "validation" | "heldout" -> examples, in an order that is arbitrary but the same everywhere.
    `provenance`: where it came from, with versions and counts. `fingerprint`: SHA-256 (hex) of all splits' content.
    """

    name: str
    has_answers: bool
    splits: dict[str, tuple[Example, ...]]
    provenance: dict[str, object]
    fingerprint: str


def digest(*parts: str) -> str:
    """SHA-256 (hex) of strings, each preceded by its length so that ("ab", "c") differs from ("a", "bc")."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def content_hash(examples: Iterable[Example]) -> str:
    """SHA-256 (hex) of all that examples hold, in their order."""
    return digest(*(part for example in examples for part in (example.prompt, example.answer, example.origin)))


def split_of(key: str) -> str:
    """The split of a file path or content hash: 90 % train, 5 % validation, 5 % heldout, by hash alone."""
    bucket = int(digest(key)[:8], 16) % 100
    return "train" if bucket < 90 else "validation" if bucket < 95 else "heldout"


def shuffled(examples: Iterable[Example]) -> list[Example]:
    """Examples in the order of their content hash: mixes files, and depends on nothing else."""
    return sorted(examples, key=lambda example: (digest(example.prompt, example.answer), example.origin))


def fingerprint_of(splits: Mapping[str, Iterable[Example]]) -> str:
    """SHA-256 (hex) of the content of all splits, in their order."""
    return digest(*(content_hash(splits[name]) for name in SPLITS))


def build_dataset(
    name: str,
    *,
    has_answers: bool,
    splits: Mapping[str, Iterable[Example]],
    provenance: Mapping[str, object],
    max_examples: int | None,
) -> TextDataset:
    """A checked data set: no empty and no repeated example, within a split or across splits, and no empty split.

    An example that occurs in several splits stays in the first of heldout, validation, train: what is evaluated on
    does not depend on what is trained on. `max_examples` keeps the first training examples in hash order.
    """
    seen: set[str] = set()
    kept: dict[str, tuple[Example, ...]] = {}
    counts = {"empty": 0, "repeated": 0}
    for split in reversed(SPLITS):
        chosen = []
        for example in splits[split]:
            key = digest(example.prompt, example.answer)
            if not example.answer.strip() or (has_answers and not example.prompt.strip()):
                counts["empty"] += 1
            elif key in seen:
                counts["repeated"] += 1
            else:
                seen.add(key)
                chosen.append(example)
        kept[split] = tuple(shuffled(chosen))
    if not any(kept.values()):
        raise DataError(
            f"data set {name!r}: yields no example ({counts['empty']} empty). Check its columns and content"
        )
    kept = _without_empty_splits(name, kept)
    kept["train"] = kept["train"][:max_examples]
    sizes = {split: len(kept[split]) for split in SPLITS}
    return TextDataset(
        name=name,
        has_answers=has_answers,
        splits={split: kept[split] for split in SPLITS},
        provenance={**provenance, "examples": sizes, "dropped_examples": counts},
        fingerprint=fingerprint_of(kept),
    )


def _without_empty_splits(name: str, splits: dict[str, tuple[Example, ...]]) -> dict[str, tuple[Example, ...]]:
    """In a small file the hash can leave a split empty: it then takes one example from the largest split."""
    filled = dict(splits)
    for split in SPLITS:
        if not filled[split]:
            largest = max(SPLITS, key=lambda candidate: len(filled[candidate]))
            if len(filled[largest]) < 2:
                total = sum(len(examples) for examples in splits.values())
                raise DataError(
                    f"data set {name!r}: has {total} distinct examples, and train, validation and heldout "
                    "need one each. Give at least 3"
                )
            filled[split], filled[largest] = filled[largest][:1], filled[largest][1:]
    return filled
