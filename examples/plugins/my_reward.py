"""A reward: how well the words of an answer fit those of the ground truth."""

from collections import Counter
from collections.abc import Sequence

from ebft_study.verifiers import Problem


def word_overlap(problems: Sequence[Problem], completions: Sequence[str]) -> list[float | None]:
    """F1 of words, from 0 to 1; None where there is nothing to compare with."""
    pairs = zip(problems, completions, strict=True)
    return [_f1(completion.split(), problem.reference.split()) for problem, completion in pairs]


def _f1(words: list[str], wanted: list[str]) -> float | None:
    if not wanted:
        return None
    shared = sum((Counter(words) & Counter(wanted)).values())
    return 2 * shared / (len(words) + len(wanted))
