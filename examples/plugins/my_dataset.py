"""A data set: sums of two numbers in words."""

import itertools
from collections.abc import Iterator

from ebft_study.config import DataConfig
from ebft_study.data import Example

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def sums(config: DataConfig) -> Iterator[Example]:
    """The same examples in every process; the study divides them into training, validation and held-out ones."""
    for a, b, c in itertools.product(range(10), repeat=3):
        total = " ".join(DIGITS[int(digit)] for digit in str(a + b + c))
        yield Example(f"{DIGITS[a]} and {DIGITS[b]} and {DIGITS[c]} is ", f"{total} .", origin=f"{a}+{b}+{c}")
