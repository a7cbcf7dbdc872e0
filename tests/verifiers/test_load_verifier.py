"""Choosing a verifier, checking it before anything starts, rates of its judgements, and its page in the docs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from ebft_study.config import VerifierConfig, build_run, nest, read_run
from ebft_study.config.sections import VERIFIERS
from ebft_study.errors import ConfigError
from ebft_study.training.prepare import prepare
from ebft_study.verifiers import Judgement, Problem, check_verifiers, failure_rate, load_verifier, unparsed_rate
from ebft_study.verifiers.parsing import RULES
from tests.tiny_run import tiny_config

PAGE = (Path(__file__).parents[2] / "docs" / "verifiers.md").read_text()


def test_a_broken_verifier_is_refused_before_data_and_models_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ebft_study.training.prepare.Run", None)
    whole, broken = tiny_config(tmp_path, verifier="bleu"), tiny_config(tmp_path, verifier="no.module:f")
    with pytest.raises(ConfigError, match=r"'no\.module:f': there is no module 'no'"):
        prepare([whole, broken])


def test_each_verifier_is_checked_once_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Loaded:
        def close(self) -> None:
            calls.append("close")

    monkeypatch.setattr("ebft_study.verifiers.load_verifier", lambda config: calls.append(config.verifier) or Loaded())
    names = ["bleu", None, "exact_match", "bleu"]
    check_verifiers(tiny_config(tmp_path, verifier=name, seed=seed) for seed in (0, 1) for name in names)
    assert calls == ["bleu", "close", "exact_match", "close"]


def test_rates_count_completions() -> None:
    judgements = [Judgement(0.0, False, "unparsed"), Judgement(None, True, "sandbox: ..."), Judgement(0.0, True, "")]
    assert unparsed_rate(judgements) == failure_rate(judgements) == 1 / 3
    assert unparsed_rate(judgements[:1]) == 1.0
    assert failure_rate(judgements[:1]) == 0.0


def test_a_verifier_can_be_named_where_its_section_could_be() -> None:
    """`verifier` is the name of a section and of its first setting."""
    for settings in ({"verifier": "bleu"}, {"verifier": {"verifier": "bleu"}}, {"verifier.verifier": "bleu"}):
        assert build_run(nest(settings, source="run"), source="run").verifier == VerifierConfig(verifier="bleu")
    run = read_run({"verifier": {"parse_rule": "text"}}, ["verifier=bleu"], source="run")
    assert run.verifier == VerifierConfig(verifier="bleu", parse_rule="text")


def test_the_page_describes_every_verifier_rule_and_setting() -> None:
    rows = re.findall(r"^\| `([a-z_.:]+)` \|", PAGE, flags=re.MULTILINE)
    assert rows == ["verifier", *VERIFIERS, "package.module:name", "parse_rule", *RULES]
    for setting in VerifierConfig.model_fields.keys() - {"verifier_workers", "test_cpu_seconds", "test_memory_mib"}:
        assert f"`{setting}" in PAGE or f"{setting}=" in PAGE
    # The limits of programs are described with the sandbox.


def test_the_examples_of_the_page_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (settings,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    assert read_run(yaml.safe_load(settings), source="docs").verifier.stop_strings == ("\n# Example",)
    (function,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (tmp_path / "example_of_the_page.py").write_text(function)
    monkeypatch.syspath_prepend(tmp_path)
    verifier = load_verifier(VerifierConfig(verifier="example_of_the_page:ends_like_the_reference"))
    assert [j.reward for j in verifier.judge([Problem("", "ab")] * 2, ["b", "a"])] == [1.0, 0.0]
    assert load_verifier(VerifierConfig(verifier="bleu")).name in PAGE
