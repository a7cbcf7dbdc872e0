"""Study files and overrides that nobody should write: each is a right answer or one line, soon and in little memory.

A few in every run of the tests; thousands by `make fuzz`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ebft_study import config
from ebft_study.errors import EbftError
from ebft_study.study.resolving.study_file import load_study
from tests.fuzz.outcomes import answer, inputs, places

FILES = sorted((Path(__file__).parents[2] / "search_spaces").glob("*.yaml"))
SCALARS = [
    "0x_", "2026-13-45", "2026-01-01", "1e400", "-1", "0", ".nan", ".inf", "null", "true", "'x'", "1" * 5000, "9" * 25,
    "1e-320", "1e-9", "10000000", "a" * 300, "1_000", "0b2", "12:30:45", "..", "/", "[red]x[/red]", "$\\frac{1}{$",
    '"\\x1b]0;title\\a"', "!!binary aGk=", "!!set {a}", "*a", "<<", "- 1", "? x",
]  # fmt: skip
VALUES = [
    *SCALARS, "[]", "{}", "{a: 1}", "{kind: asha}", "[null]", "[{a: 1}]", "[[1]]", "[1, 1]", "[" * 60 + "]" * 60,
    "{distribution: uniform, low: 1, high: 2, step: 1e-9}", "{distribution: integer, low: 0, high: 1e300}",
    "{distribution: uniform, low: 0, high: 1, step: 5.0e-324}", "{distribution: log_uniform, low: 0, high: 1}",
    "{values: [1, 2], when: {alpha: [0]}}", "&a [*a]", "{<<: {a: 1}, a: 2}",
]  # fmt: skip
KEYS = [
    "alpha", "sequence_length", "seeds", "seeds.0", "seeds.start", "scheduler", "scheduler.kind", "stopping.x",
    "stopping.divergence.margin", "objective.metric", "budget.max_hours", "resources.by.n_samples", "steps", "axes",
    "search.num_configurations", "run.steps", "model", "depths", "benchmarks", "verifier", "name", "learning_rate", "",
]  # fmt: skip
values = st.one_of(st.sampled_from(VALUES), st.text(max_size=8), st.integers().map(str), st.floats().map(str))


@functools.cache
def text_of(path: Path) -> str:
    return path.read_text()


def is_answered(kind: str, study: Any, profile: str | None, overrides: list[str]) -> None:
    """Whatever happens, it is a study or one line."""
    answer(kind, lambda: load_study(study, profile, overrides))


@inputs(300)
@given(st.data())
def test_settings_of_study_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Some values of a ready study are others."""
    file = data.draw(st.sampled_from(FILES))
    content = yaml.safe_load(text_of(file))
    for path in data.draw(st.lists(st.sampled_from(list(places(content))), min_size=1, max_size=2, unique=True)):
        value, node = data.draw(values), content
        try:
            for part in path[:-1]:
                node = node[part]
            node[path[-1]] = yaml.safe_load(value)
        except Exception:  # no YAML by itself, or its place is gone
            continue
    profile = data.draw(st.sampled_from([None, "cpu", "cluster"]))
    if data.draw(st.booleans()):
        is_answered("study_files", content, profile, [])
        return
    written = tmp_path_factory.mktemp("fuzz") / "study.yaml"
    written.write_text(yaml.safe_dump(content))
    is_answered("study_files", written, profile, [])


@inputs(200)
@given(st.data())
def test_texts_of_study_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Some characters of a ready study are others: mostly no YAML at all."""
    text = text_of(data.draw(st.sampled_from(FILES)))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = start + data.draw(st.integers(0, 30))
        text = text[:start] + data.draw(st.one_of(values, st.sampled_from(["\n", "  ", ": ", "\t", "- "]))) + text[end:]
    written = tmp_path_factory.mktemp("fuzz") / "study.yaml"
    written.write_bytes(text.encode("utf-8", "surrogatepass"))
    is_answered("study_files", written, "cpu", [])


@inputs(300)
@given(
    file=st.sampled_from(FILES), overrides=st.lists(st.tuples(st.sampled_from(KEYS), values), min_size=1, max_size=2)
)
def test_overrides(file: Path, overrides: list[tuple[str, str]]) -> None:
    is_answered("overrides", file, "cpu", [f"{key}={value}" for key, value in overrides])


BOMB = "b0: &b0 [x, x, x]\n" + "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]\n" for i in range(1, 9))
"""Ninety million values with all aliases written out."""


# --- what once went wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: {b: 1, b: 2}", "'b' is on lines 1 and 1, and only one can count"),
        ("axes: {alpha: [0]}\nrun: {steps: 1}\naxes: {gamma: [0]}", "'axes' is on lines 1 and 3"),
        ("a: 0x_", "invalid literal"),
        ("a: " + "1" * 5000, "4300"),
        ("a: 9223372036854775808", "too large for a whole number"),
        ("a: " + "[" * 60 + "]" * 60, "nested more than 50 levels deep"),
        (BOMB, "aliases"),
        ("a: &a [*a]", "aliases"),
        ("a: !!set {x}", "could not determine a constructor"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_yaml_that_is_refused(text: str, problem: str) -> None:
    with pytest.raises(EbftError) as caught:
        config.parse_yaml(text, source="s.yaml")
    assert str(caught.value).startswith("s.yaml: ")
    assert problem in str(caught.value)


def test_yaml_that_people_write_is_read_as_before() -> None:
    text = "x: &x {a: 1, b: [x, 0.5, 1e-4, null, yes]}\nc: {<<: *x, a: 2}\nd: 2026-01-01\ne: ~\nf: -9223372036854775807"
    read, plain = config.parse_yaml(text, source=""), yaml.safe_load(text)
    assert read.pop("d") == "2026-01-01"  # no setting is a date
    assert plain.pop("d") is not None
    assert read == plain


BASE = {"study": "s", "question": "q", "run": {"steps": 2}}
FINE = {"distribution": "uniform", "low": 0, "high": 1}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"axes": {"alpha": FINE | {"step": 1e-9}}}, "more than 100000 values"),
        ({"axes": {"alpha": FINE | {"step": 5e-324}}}, "more than 100000 values"),
        ({"axes": {"alpha": FINE}, "search": {"algorithm": "random", "num_configurations": 10**7}}, "100000"),
        ({"seeds": {"start": 1, "promote": [10**7]}}, "1000"),
        ({"study": "a" * 300}, "at most 100 characters"),
        ({"run": {"alpha": 1.0, "reward.alpha": 0.5}}, "alpha and reward.alpha: are one setting"),
        ({"run": {"alpha": 1.0, "reward": {"alpha": 0.5}}}, "alpha and reward: alpha: are one setting"),
        ({"axes": {"depths": [{"a": 1}, {"a": 1}]}}, "lists a value twice"),
    ],
)
def test_studies_that_would_take_all_memory_or_are_ambiguous(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(EbftError) as caught:
        load_study({**BASE, **changes})
    assert problem in str(caught.value)


def test_an_override_below_a_list_is_an_unknown_key(tmp_path: Path) -> None:
    with pytest.raises(EbftError, match="seeds"):
        load_study({**BASE, "seeds": [0, 1]}, None, ["seeds.0=1"])
