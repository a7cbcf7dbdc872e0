"""Contamination: problems of a benchmark whose text occurs in the training data, by n-grams of words."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch

from ebft_study.data import TextDataset
from ebft_study.evaluation import Scores
from ebft_study.evaluation.downstream.benchmarks import Benchmark

N = 13
"""Words of an n-gram (Brown et al. 2020, appendix C); shorter texts are compared as a whole."""
FEWEST = 5
"""Words of a text that its occurrence says anything about."""
_WORD = re.compile(r"\w+")


def overlap(benchmark: Benchmark, text: TextDataset) -> Scores:
    """Whether the training split repeats the text of each problem; no value for problems that are too short."""
    training = (f"{example.prompt}\n{example.answer}" for example in text.splits["train"])
    repeated = contaminated([item.own_text for item in benchmark.items], training)
    scores = Scores.zeros(torch.tensor(benchmark.numbers))
    values = torch.tensor([[bool(each)] for each in repeated]).double()
    scores.add(torch.arange(len(repeated)), values, torch.tensor([[each is not None] for each in repeated]))
    return scores


def contaminated(problems: Sequence[Sequence[str]], training: Iterable[str]) -> list[bool | None]:
    """Whether the training texts repeat an n-gram of each problem, given by its texts; None: all are too short."""
    wanted: dict[int, dict[tuple[str, ...], set[int]]] = defaultdict(lambda: defaultdict(set))
    repeated: list[bool | None] = [None] * len(problems)
    for number, texts in enumerate(problems):
        for words in map(words_of, texts):
            n = min(N, len(words))
            if n >= FEWEST:
                repeated[number] = False
                for gram in ngrams(words, n):
                    wanted[n][gram].add(number)
    for text in training:
        words = words_of(text)
        for n, grams in wanted.items():
            for gram in ngrams(words, n):
                for number in grams.get(gram, ()):
                    repeated[number] = True
    return repeated


def words_of(text: str) -> list[str]:
    """The words of a text in lower case: letters, digits and underscores; all else separates them."""
    return _WORD.findall(text.lower())


def ngrams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """All runs of n words."""
    return zip(*(words[k:] for k in range(n)), strict=False)
