"""Data sets of users, by import path: a function of the settings that returns examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

from ebft_study import plugins
from ebft_study.data.examples import SPLITS, Example, TextDataset, build_dataset, digest, split_of
from ebft_study.errors import DataError, EbftError

if TYPE_CHECKING:
    from ebft_study.config import DataConfig

KEY = "data.dataset"
_OF_TABLES = ("dataset_config", "dataset_revision", "text_column", "prompt_column", "answer_column")


class DatasetFunction(Protocol):
    """Examples, or those of each split: `train`, `validation`, `heldout`.

    All of them have a prompt, or none has: raw text. Without splits each example's content decides about its own. Every
    process of a study calls it, and must get the same examples.
    """

    def __call__(self, config: DataConfig, /) -> Iterable[Example] | Mapping[str, Iterable[Example]]: ...


def load_imported(config: DataConfig) -> TextDataset:
    """The data set behind `package.module:name`.

    Raises:
        ConfigError: there is no such function, or it has raised an error.
        DataError: it has returned something else than examples.
    """
    path = config.dataset
    for name in _OF_TABLES:
        if getattr(config, name) is not None:
            raise DataError(f"data set {path!r}: {name}={getattr(config, name)!r} is for files and the hub. Remove it")
    function: DatasetFunction = plugins.load(path, key=KEY)
    try:
        returned = function(config)
        is_split = isinstance(returned, Mapping)
        given = {k: list(v) for k, v in returned.items()} if isinstance(returned, Mapping) else {"": list(returned)}
    except EbftError:
        raise
    except Exception as error:
        raise plugins.raised(KEY, path, error) from error
    if is_split and set(given) != set(SPLITS):
        raise DataError(f"data set {path!r}: has the splits {', '.join(map(str, given))}. Return {', '.join(SPLITS)}")
    examples = [example for each in given.values() for example in each]
    if not all(isinstance(example, Example) for example in examples):
        raise DataError(f"data set {path!r}: has returned no examples. Return ebft_study.data.Example objects")
    with_prompt = sum(bool(example.prompt.strip()) for example in examples)
    if with_prompt not in (0, len(examples)):
        raise DataError(
            f"data set {path!r}: {with_prompt} of {len(examples)} examples have a prompt. Give all of them one, or none"
        )
    return build_dataset(
        path,
        has_answers=with_prompt > 0,
        splits=given if is_split else _split(examples),
        provenance={"source": path, "split_by": "its own splits" if is_split else "content"},
        max_examples=config.max_examples,
    )


def _split(examples: Iterable[Example]) -> dict[str, list[Example]]:
    """Splits by content alone, as of files."""
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for example in examples:
        splits[split_of(digest(example.prompt, example.answer))].append(example)
    return splits
