"""A miniature translation task: sentences of a toy language, and their translations into simple English.

The toy language puts the verb last and marks number and tense by endings, so a translator must reorder and inflect.
Every word has two translations, and an adverb two places: one sentence has many right translations, of which the
reference is one. A reference keeps to a register, plain or lofty, in most of its words: its choices hang together.
"""

from __future__ import annotations

from dataclasses import dataclass

from ebft_study.data.draws import MEANINGS_PERCENT, Draws
from ebft_study.data.examples import Example, split_of

SENTENCES = {"train": 1000, "validation": 320, "heldout": 320}  # distinct meanings
TRAIN_EXAMPLES_PER_SENTENCE = 2  # other translations
REGISTER = 0.85  # how often a word is of its sentence's register

# toy word: (plain, lofty)
NOUNS = {
    "kavo": ("dog", "hound"), "milu": ("cat", "feline"), "bero": ("house", "home"), "tasi": ("friend", "ally"),
    "nolu": ("child", "kid"), "pira": ("road", "path"), "sedo": ("teacher", "master"), "lumi": ("light", "lamp"),
    "goran": ("king", "ruler"), "fela": ("song", "tune"), "duvo": ("rock", "stone"), "hani": ("boat", "ship"),
    "rosu": ("garden", "field"), "veka": ("letter", "note"), "zamo": ("thief", "robber"), "toli": ("book", "volume"),
}  # fmt: skip
ADJECTIVES = {
    "sol": ("old", "ancient"), "min": ("small", "little"), "gar": ("big", "large"), "vel": ("fast", "quick"),
    "nox": ("dark", "dim"), "lia": ("nice", "fine"), "tor": ("strong", "mighty"), "pel": ("quiet", "silent"),
}  # fmt: skip
VERBS = {
    "vid": ("see", "watch"), "am": ("love", "adore"), "kap": ("take", "grab"), "led": ("lead", "guide"),
    "fin": ("find", "discover"), "mov": ("move", "shift"), "hal": ("help", "assist"), "ser": ("want", "desire"),
    "rup": ("break", "destroy"), "dok": ("show", "present"),
}  # fmt: skip
ADVERBS = {
    "hoda": ("today", "this day"), "semu": ("always", "at all times"), "rapi": ("quickly", "in haste"),
    "nuku": ("at night", "by night"), "ofta": ("often", "many times"), "sola": ("alone", "without help"),
}  # fmt: skip


@dataclass(frozen=True)
class NounPhrase:
    """Toy words: `noun`, and perhaps `adjective`."""

    noun: str
    adjective: str | None
    is_plural: bool
    is_definite: bool

    def toy(self) -> list[str]:
        ending = "n" if self.is_plural else ""
        article = "la" if self.is_definite else "un"
        return [article, self.noun + ending, *([self.adjective + ending] if self.adjective else [])]


@dataclass(frozen=True)
class Sentence:
    """Subject, object, verb, tense ("past" or "future") and perhaps an adverb."""

    subject: NounPhrase
    object: NounPhrase
    verb: str
    tense: str
    adverb: str | None

    def toy(self) -> str:
        verb = self.verb + {"past": "it", "future": "ura"}[self.tense]
        words = [*self.subject.toy(), *self.object.toy(), *([self.adverb] if self.adverb else []), verb]
        return " ".join(words)


def read_examples() -> list[Example]:
    """All examples, with origin "sentence::number"."""
    examples = []
    for split, count in SENTENCES.items():
        for sentence in _sentences(split, count):
            source = sentence.toy()
            for number in range(TRAIN_EXAMPLES_PER_SENTENCE if split == "train" else 1):
                translation = translate(sentence, Draws("mini_translation", source, str(number)))
                examples.append(Example(f"{source} =", f" {translation}\n", f"{source}::{number}"))
    return examples


def translate(sentence: Sentence, draws: Draws) -> str:
    """One of a sentence's right translations: register, words and the adverb's place are drawn."""
    register = draws.between(0, 1)

    def word(translations: tuple[str, str]) -> str:
        return translations[register if draws.chance(REGISTER) else 1 - register]

    def phrase(part: NounPhrase) -> list[str]:
        adjective = [word(ADJECTIVES[part.adjective])] if part.adjective else []
        noun = word(NOUNS[part.noun]) + ("s" if part.is_plural else "")
        article = "the" if part.is_definite else "some" if part.is_plural else "one"
        return [article, *adjective, noun]

    verb = ["did" if sentence.tense == "past" else "will", word(VERBS[sentence.verb])]
    clause = [*phrase(sentence.subject), *verb, *phrase(sentence.object)]
    if sentence.adverb is None:
        return " ".join(clause)
    adverb = word(ADVERBS[sentence.adverb])
    return " ".join([adverb, *clause] if draws.chance(0.5) else [*clause, adverb])


def _sentences(split: str, count: int) -> list[Sentence]:
    """The first `count` sentences of a split, all different."""
    sentences: dict[str, Sentence] = {}
    draws = Draws("mini_translation", split)
    while len(sentences) < count:
        sentence = _draw_sentence(draws)
        if split_of(sentence.toy(), percent=MEANINGS_PERCENT) == split:
            sentences.setdefault(sentence.toy(), sentence)
    return list(sentences.values())


def draw_plain(draws: Draws) -> Sentence:
    """A sentence of the training split, made of the first half of all words."""
    while True:
        sentence = _draw_sentence(draws, words=0.5)
        if split_of(sentence.toy(), percent=MEANINGS_PERCENT) == "train":
            return sentence


def _draw_sentence(draws: Draws, words: float = 1.0) -> Sentence:
    nouns, adjectives, verbs, adverbs = (
        list(lexicon)[: round(words * len(lexicon))] for lexicon in (NOUNS, ADJECTIVES, VERBS, ADVERBS)
    )
    subject, target = (
        NounPhrase(
            noun,
            adjective=draws.pick(adjectives) if draws.chance(0.5) else None,
            is_plural=draws.chance(0.4),
            is_definite=draws.chance(0.6),
        )
        for noun in draws.sample(nouns, 2)
    )
    adverb = draws.pick(adverbs) if draws.chance(0.6) else None
    return Sentence(subject, target, draws.pick(verbs), draws.pick(("past", "future")), adverb)
