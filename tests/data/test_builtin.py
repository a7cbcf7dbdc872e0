"""The data sets that come with the project's dependencies."""

from __future__ import annotations

import ast
import platform
from pathlib import Path

import pytest

from ebft_study.config import DataConfig
from ebft_study.data import SPLITS, builtin, load_text
from ebft_study.data.examples import split_of
from ebft_study.data.functions import normalize
from ebft_study.errors import DataError

NAMES = ("stdlib", "unstructured", "qa")


@pytest.fixture(scope="module", autouse=True)
def _one_cache_for_this_file(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EBFT_STUDY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def datasets(_one_cache_for_this_file):
    return {name: load_text(DataConfig(dataset=name)) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_every_split_has_plenty_of_text(datasets, name):
    for split, least in (("train", 5_000_000), ("validation", 250_000), ("heldout", 250_000)):
        assert sum(len(item.prompt) + len(item.answer) for item in datasets[name].splits[split]) > least


@pytest.mark.parametrize("name", NAMES)
def test_loading_again_gives_the_same_examples_in_the_same_order(datasets, name):
    again = load_text(DataConfig(dataset=name))
    assert again == datasets[name]


@pytest.mark.parametrize("name", NAMES)
def test_no_text_occurs_twice_within_or_across_splits(datasets, name):
    texts = [item.prompt + item.answer for split in SPLITS for item in datasets[name].splits[split]]
    assert len(texts) == len(set(texts))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_lies_in_the_one_split_that_its_path_says(datasets, name):
    for split in SPLITS:
        for item in datasets[name].splits[split]:
            assert split_of(item.origin.split("::")[0]) == split
            assert not Path(item.origin).is_absolute()


def test_stdlib_holds_no_tests_nor_installed_packages(datasets):
    origins = [item.origin for split in SPLITS for item in datasets["stdlib"].splits[split]]
    parts = {part for origin in origins for part in origin.split("/")}
    assert parts.isdisjoint({"test", "tests", "idle_test", "site-packages", "__pycache__"})
    assert not [origin for origin in origins if "_sysconfigdata" in origin]
    assert {"dataclasses.py", "json/decoder.py"} <= set(origins)
    assert datasets["stdlib"].provenance["versions"] == {"python": platform.python_version()}


def test_unstructured_holds_only_test_suites_of_other_packages(datasets):
    for split in SPLITS:
        for item in datasets["unstructured"].splits[split]:
            assert "/tests/" in item.origin
            assert item.origin.split("/")[0] in ("numpy", "pandas")
            assert item.prompt == ""


def test_qa_pairs_are_valid_python_and_not_from_tests(datasets):
    assert datasets["qa"].has_answers
    for item in datasets["qa"].splits["heldout"]:
        (function,) = ast.parse(item.prompt + item.answer).body
        assert len(function.body) > 1
        assert "/tests/" not in item.origin


def test_qa_bodies_that_differ_only_in_literals_occur_once(datasets):
    bodies = [normalize(item.answer) for split in SPLITS for item in datasets["qa"].splits[split]]
    assert len(bodies) == len(set(bodies))
    assert datasets["qa"].provenance["copies_removed"] > 0


def test_the_cache_gives_what_extraction_gives(datasets, monkeypatch):
    monkeypatch.setattr(builtin, "function_pairs", lambda text: pytest.fail("extracted again"))
    assert load_text(DataConfig(dataset="qa")) == datasets["qa"]


def test_max_examples_limits_training_only(datasets):
    small = load_text(DataConfig(dataset="stdlib", max_examples=3))
    assert small.splits["train"] == datasets["stdlib"].splits["train"][:3]
    assert small.splits["heldout"] == datasets["stdlib"].splits["heldout"]


def test_a_package_without_its_tests_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(builtin, "_package_folder", lambda package: tmp_path)
    with pytest.raises(DataError, match="'numpy' is installed without its test suite"):
        load_text(DataConfig(dataset="unstructured"))


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(builtin, "TEST_PACKAGES", ("no_such_package_here",))
    with pytest.raises(DataError, match="'no_such_package_here' is not installed"):
        load_text(DataConfig(dataset="unstructured"))


@pytest.mark.parametrize("settings", [{"dataset_config": "de-en"}, {"dataset_revision": "main"}, {"text_column": "x"}])
def test_settings_that_do_not_apply_are_refused(settings):
    with pytest.raises(DataError, match=r"'stdlib': has .*Remove them"):
        load_text(DataConfig(dataset="stdlib", **settings))
