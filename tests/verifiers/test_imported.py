"""Verifiers of the user."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebft_study.config import VerifierConfig
from ebft_study.errors import ConfigError, DataError
from ebft_study.verifiers import Judgement, Problem, Verifier, load_verifier
from tests.contracts.verifiers import Case, VerifierContract

MODULE = """
from ebft_study.errors import DataError
from ebft_study.verifiers import Judgement

def length(problems, completions):
    return [min(len(text) / len(p.reference), 1.0) if text < "z" else 0 for p, text in zip(problems, completions)]

def with_option(problems, completions, weight=0.5):
    return [weight for _ in completions]

def nothing(problems, completions): return [None] * len(completions)
def too_few(problems, completions): return []
def too_much(problems, completions): return [1.5] * len(completions)
def not_a_number(problems, completions): return [float("nan")] * len(completions)
def raises(problems, completions): raise KeyError("key\\nof two lines")
def one_argument(problems): return []

class Verifier:
    name, lowest, highest = "mine", -1.0, 1.0
    def judge(self, problems, completions):
        return [Judgement(-1.0, False, "unparsed") for _ in completions]
    def close(self): pass
    class Inner:
        pass

def factory(): return Verifier()
def bad_factory(): return 7
def raising_factory(): raise OSError("no such server")
def refusing_factory(): raise DataError("needs data")
constant = 3
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "my_verifiers.py").write_text(MODULE)
    (tmp_path / "broken_verifiers.py").write_text("import math\nmath.no_such_function()\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("my_verifiers", "broken_verifiers"):
        sys.modules.pop(name, None)


def load(name: str, module: str = "my_verifiers") -> Verifier:
    return load_verifier(VerifierConfig(verifier=f"{module}:{name}"))


class TestFunction(VerifierContract):
    @pytest.fixture
    def verifier(self) -> Verifier:
        return load("length")

    @pytest.fixture
    def cases(self) -> list[Case]:
        problem = Problem("", "abcd")
        return [(problem, "ab", 0.5), (problem, " abc\n", 0.75), (problem, "abcdef", 1.0), (problem, "z", 0.0)]


def test_the_function_gets_answers_after_stop_strings_and_parse_rule() -> None:
    config = VerifierConfig(verifier="my_verifiers:length", parse_rule="code_block", stop_strings=("!",))
    judged = load_verifier(config).judge([Problem("", "abcd")] * 2, ["so\n```\nab!c\n```", "ab"])
    assert [judgement.reward for judgement in judged] == [0.5, 0.0]
    assert [judgement.parsed for judgement in judged] == [True, False]


def test_a_function_may_have_options_and_may_fail_on_an_answer() -> None:
    assert load("with_option").judge([Problem("", "")], ["a"]) == [Judgement(0.5, True, "scored")]
    assert load("nothing").judge([Problem("", "")], ["a"])[0].reward is None


@pytest.mark.parametrize("name", ["factory", "Verifier"])
def test_a_factory_returns_a_verifier_of_its_own_range(name: str) -> None:
    verifier = load(name)
    assert (verifier.name, verifier.lowest, verifier.highest) == ("mine", -1.0, 1.0)
    assert verifier.judge([Problem("", "")], ["a"]) == [Judgement(-1.0, False, "unparsed")]


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("my_verifiers:no_such", "my_verifiers has no no_such. Did you mean 'too_much'?"),
        ("my_verifiers:", "is no import path. Write package.module:name"),
        (":length", "is no import path"),
        ("no.such.module:f", "there is no module 'no' where Python looks. Put it into the folder of the study file"),
        ("broken_verifiers:f", "cannot be imported (AttributeError"),
        ("my_verifiers:constant", "is no function and no class, but int. Name one"),
        ("my_verifiers:one_argument", "takes 1 arguments. Name a function"),
        ("my_verifiers:bad_factory", "it has made an object without name, lowest, highest, judge, close. Make"),
        ("my_verifiers:Verifier.Inner", "it has made an object without name"),
        ("my_verifiers:raising_factory", "it has raised OSError: no such server. Repair it"),
    ],
)
def test_what_is_no_verifier_is_refused_in_one_line(path: str, rule: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_verifier(VerifierConfig(verifier=path))
    assert str(refused.value).startswith(f"verifier.verifier={path!r}: {rule}")
    assert "\n" not in str(refused.value)


def test_errors_of_ours_pass_through() -> None:
    with pytest.raises(DataError, match="needs data"):
        load("refusing_factory")


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("too_few", "it has returned 0 scores for 2 answers"),
        ("too_much", "it has returned the score 1.5. Return numbers from 0 to 1, or None"),
        ("not_a_number", "it has returned the score nan"),
        ("raises", "it has raised KeyError: 'key"),
    ],
)
def test_a_function_that_breaks_its_contract_is_named(name: str, rule: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(name).judge([Problem("", "")] * 3, ["a", "", "b"])
    assert f"verifier.verifier='my_verifiers:{name}': {rule}" in str(refused.value)
    assert "\n" not in str(refused.value)
