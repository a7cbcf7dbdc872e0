"""The paper's data sets: where they are on the hub, and how one of their rows becomes a prompt and an answer.

A preset also reads a local file in the same format: `dataset: "open_code_instruct:/path/to/file.jsonl"`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ebft_study.errors import DataError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Mapped:
    """How rows become examples. `columns` must exist; `pair(row)` gives (prompt, answer), None for an absent text."""

    columns: tuple[str, ...]
    has_answers: bool
    pair: Callable[[Row], tuple[Any, Any]]


@dataclass(frozen=True)
class Preset:
    """A data set of the paper.

    `mapped(dataset_config)` gives the row mapping and `hub_config(dataset_config)` the configuration's name on the
    hub; None stands for the default. `config_maps_rows`: the configuration also matters for a local file.
    """

    hub_id: str
    default_config: str | None
    mapped: Callable[[str | None], Mapped]
    config_maps_rows: bool = False
    hub_config: Callable[[str | None], str | None] = lambda config: config


def raw_text(column: str) -> Mapped:
    """Rows whose `column` is a document."""
    return Mapped((column,), has_answers=False, pair=lambda row: ("", row[column]))


def prompt_and_answer(prompt: str, answer: str) -> Mapped:
    """Rows with a prompt and its answer in two columns, taken as they are."""
    return Mapped((prompt, answer), has_answers=True, pair=lambda row: (row[prompt], row[answer]))


def _open_code_instruct(config: str | None) -> Mapped:
    """The question in `input`, the solution in `output`; a blank line between them tells where the question ends."""

    def pair(row: Row) -> tuple[Any, Any]:
        question = row["input"]
        return (question.rstrip() + "\n\n" if isinstance(question, str) else question), row["output"]

    return Mapped(("input", "output"), has_answers=True, pair=pair)


LANGUAGES = {"cs": "Czech", "de": "German", "en": "English", "is": "Icelandic", "ru": "Russian", "zh": "Chinese"}


def _alma(config: str | None) -> Mapped:
    """`translation: {"de": ..., "en": ...}` as an instruction; config "en-de" translates the other way round."""
    source, target = _language_pair(config)
    instruction = f"Translate this from {LANGUAGES[source]} to {LANGUAGES[target]}:\n"

    def pair(row: Row) -> tuple[Any, Any]:
        texts = row["translation"]
        if not isinstance(texts, Mapping) or source not in texts or target not in texts:
            found = ", ".join(texts) if isinstance(texts, Mapping) else type(texts).__name__
            raise DataError(
                f"alma_human_parallel: column 'translation' needs {source!r} and {target!r} but holds {found}. "
                "Set dataset_config to its language pair, for example de-en"
            )
        if not isinstance(texts[source], str) or not isinstance(texts[target], str):
            return None, None
        prompt = f"{instruction}{LANGUAGES[source]}: {texts[source].strip()}\n{LANGUAGES[target]}:"
        return prompt, f" {texts[target].strip()}" if texts[target].strip() else None

    return Mapped(("translation",), has_answers=True, pair=pair)


def _language_pair(config: str | None) -> tuple[str, str]:
    source, _, target = (config or "de-en").partition("-")
    if source == target or "en" not in (source, target) or {source, target} - LANGUAGES.keys():
        others = sorted(LANGUAGES.keys() - {"en"})
        raise DataError(
            f"alma_human_parallel: dataset_config={config!r} is not one of its language pairs. "
            f"Use X-en or en-X with X one of {', '.join(others)}"
        )
    return source, target


def _alma_hub_config(config: str | None) -> str:
    """On the hub a pair is one configuration, English last, whatever the direction."""
    source, target = _language_pair(config)
    return f"{target}-en" if source == "en" else f"{source}-en"


PRESETS = {
    "open_code_instruct": Preset("nvidia/OpenCodeInstruct", None, _open_code_instruct),
    "swallow_code": Preset("tokyotech-llm/swallow-code", "swallow-code", lambda config: raw_text("text")),
    "alma_human_parallel": Preset(
        "haoranxu/ALMA-Human-Parallel", "de-en", _alma, config_maps_rows=True, hub_config=_alma_hub_config
    ),
}
