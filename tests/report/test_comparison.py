"""The page that compares studies, and the command that writes it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import ebft_study
from ebft_study.report.comparison import counts, different_records, different_settings, sentences
from tests.report.test_page import SMALL, Page
from tests.synthetic_study import write_study


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    write_study(folder / "first", effects=SMALL, with_scores=True)
    worse = {key: (ce + 0.05, cfm) for key, (ce, cfm) in SMALL.items()}
    write_study(folder / "second", effects=worse, noise=0.0021, with_scores=True)
    shutil.copytree(folder / "first", folder / "copy")
    spec = yaml.safe_load((folder / "second" / "study.yaml").read_text())
    spec["versions"]["torch"], spec["question"] = "2.14.0", "Another <question>?"
    (folder / "second" / "study.yaml").write_text(yaml.safe_dump(spec))
    return folder


def test_the_page_is_whole_and_says_what_the_comparison_says(storage: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    compared = ebft_study.compare(["first", "second", "copy"], storage=storage, output=target)
    page = Page(target)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert not {reference for reference in page.references if not reference.startswith(("#", "data:"))}
    for sentence in sentences(compared):
        assert sentence in page.text
    for each in compared.differences:
        assert each.shared in page.text
    assert "2.14.0" in page.text


def test_sentences_count_what_is_clear_and_name_the_worse(storage: Path) -> None:
    about_second, about_copy = sentences(ebft_study.compare(["first", "second", "copy"], storage=storage))
    assert "4 of 8 differences are clear after Holm's correction for 8 differences" in about_second
    assert "CE of γ=0 is higher by +0.05" in about_second
    assert "no difference. They hold the same trials" in about_copy


def test_rulings_are_counted_without_averages_and_coloured_by_what_is_better(storage: Path) -> None:
    compared = ebft_study.compare(["first", "second"], storage=storage)
    assert counts(compared) == [("higher: worse", "disagrees", 3), ("cannot tell", "cannot-tell", 3)]
    back = ebft_study.compare(["second", "first"], storage=storage)
    assert counts(back) == [("lower: better", "agrees", 3), ("cannot tell", "cannot-tell", 3)]


def test_what_the_intervals_leave_possible_is_said_where_nothing_is_clear(storage: Path, tmp_path: Path) -> None:
    write_study(tmp_path / "again", effects=SMALL, noise=0.003, with_scores=True)
    compared = ebft_study.compare([storage / "first", tmp_path / "again"])
    (sentence,) = sentences(compared)
    assert "cannot tell after Holm's correction for 8 differences" in sentence
    of_ce = [each.interval for each in compared.differences if each.metric == "ce_loss" and not each.is_average]
    # Intervals that hold together are wider than each of them alone.
    largest = max(max(abs(interval.low), abs(interval.high)) for interval in of_ce)
    assert float(sentence.partition("CE ±")[2].split(" ")[0]) > largest


def test_only_records_and_settings_that_differ_are_listed(storage: Path, tmp_path: Path) -> None:
    compared = ebft_study.compare(["first", "second"], storage=storage)
    assert different_settings(compared.studies) == []
    assert different_records(compared.studies) == [("versions: torch", ["2.13.0", "2.14.0"])]
    other = write_study(
        tmp_path / "other",
        effects=SMALL,
        settings=lambda key: {"alpha": key[0], "gamma": key[1], "eval_every_steps": 10},
    )
    compared = ebft_study.compare([storage / "first", other])
    assert different_settings(compared.studies) == [("eval_every_steps", ["50", "10"])]


def test_the_command_writes_a_page_and_refuses_in_one_line(storage: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ebft_study", "compare", *arguments, "--storage", str(storage)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600, check=False)

    done = run("first", "copy")
    assert done.returncode == 0
    assert "no difference" in done.stdout
    assert done.stdout.splitlines()[-1] == "comparison_first_copy.html"
    assert (tmp_path / "comparison_first_copy.html").exists()
    for arguments, part in ((("first", "first"), "is given twice"), (("first", "nothing"), "neither a study")):
        refused = run(*arguments)
        assert refused.returncode == 2
        assert part in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
