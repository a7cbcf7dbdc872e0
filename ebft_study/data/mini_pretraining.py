"""Text that half prepares for the miniatures' tasks: `mini-1m` is pretrained on it.

As a model of real size knows the languages of its tasks, but not all of their words: functions are described in the
first wording of each operation, sentences consist of the first half of all words. No function has the meaning of a
problem of validation or of the held-out split, and no sentence is one of theirs.
"""

from __future__ import annotations

from ebft_study.data import mini_functions, mini_translation
from ebft_study.data.draws import Draws
from ebft_study.data.examples import Example

DOCUMENTS = 80000
LENGTHS = (1, 1, 1, 1, 1, 2)
"""Operations of a function. From short ones a model learns sooner to copy constants and names."""


def read_examples() -> list[Example]:
    """All documents: two of three are a function, the others a sentence and its translation; many functions repeat."""
    return [Example("", _document(number), f"document {number}") for number in range(DOCUMENTS)]


def _document(number: int) -> str:
    draws = Draws("mini_pretraining", str(number))
    if number % 3 < 2:
        function = mini_functions.write_plain(draws, LENGTHS)
        return function.prompt + function.body
    sentence = mini_translation.draw_plain(draws)
    return f"{sentence.toy()} = {mini_translation.translate(sentence, draws)}\n"
