"""Benchmarks are read in the formats of their original distributions, or refused in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ebft_study.config import EvaluationConfig, VerifierConfig
from ebft_study.errors import DataError
from ebft_study.evaluation.downstream import foreign
from ebft_study.evaluation.downstream.benchmarks import load_benchmark, load_benchmarks
from ebft_study.evaluation.downstream.protocol import Protocol, failing_references, judges_of
from tests.evaluation.downstream import files

PROTOCOL = Protocol.from_config(EvaluationConfig())


def failing(name: str) -> dict[str, str]:
    benchmark = load_benchmark(name)
    judges = judges_of(benchmark, VerifierConfig(), PROTOCOL)
    try:
        return failing_references(benchmark, judges)
    finally:
        judges.close()


def test_humaneval(tmp_path: Path) -> None:
    benchmark = load_benchmark(files.humaneval(tmp_path))
    assert (benchmark.name, benchmark.kind, benchmark.numbers) == ("humaneval", "code", (0, 1))
    first = benchmark.items[0]
    assert first.id == "HumanEval/0"
    assert first.problem.prompt == files.HUMANEVAL[0]["prompt"]
    assert first.problem.tests is not None
    assert first.problem.tests.entry_points == ("quadruple", "double")
    assert first.problem.tests.assertions == ("check(quadruple)",)
    assert failing(files.humaneval(tmp_path)) == {}


def test_references_that_fail_their_tests_are_named(tmp_path: Path) -> None:
    rows = [files.HUMANEVAL[0], {**files.HUMANEVAL[1], "canonical_solution": "    return x[1]\n"}]
    path = files.write_lines(tmp_path / "h.jsonl", rows)
    assert failing(f"humaneval:{path}").keys() == {"HumanEval/1"}


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_mbpp_shows_three_tasks_and_asks_those_of_its_test_split(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"mbpp{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(files.MBPP), path)
    elif ending == ".json":
        path.write_text(json.dumps(files.MBPP))
    else:
        files.write_lines(path, files.MBPP)
    benchmark = load_benchmark(f"mbpp:{path}")
    assert [item.id for item in benchmark.items] == ["MBPP/11", "MBPP/510"]
    prompt = benchmark.items[0].problem.prompt
    parts = prompt.split("You are an expert Python programmer, and here is your task: ")[1:]
    assert [part[:26] for part in parts] == [f"Write a function to add {n}." for n in (2, 3, 4)] + [
        "Write a function to add 11"
    ]
    assert parts[0].endswith("[BEGIN]\ndef add_2(x):\n  return x + 2\n[DONE]\n\n")
    assert prompt.endswith("tests:\n\nassert add_11(1) == 12\nassert add_11(0) == 11\n[BEGIN]\n")
    assert benchmark.items[0].stops == ("[DONE]",)
    assert "add 2" not in benchmark.items[0].own_text[0]
    assert failing(f"mbpp:{path}") == {}


def test_the_sanitized_mbpp_has_other_names_for_its_fields(tmp_path: Path) -> None:
    rows = [
        {"prompt": r["text"], **{k: r[k] for k in ("task_id", "code")}, "test_imports": ["import math"],
         "test_list": [*r["test_list"], f"assert math.isclose(add_{r['task_id']}(0.0), {r['task_id']}.0)"]}
        for r in files.MBPP
    ]  # fmt: skip
    path = tmp_path / "sanitized-mbpp.json"
    path.write_text(json.dumps(rows))
    benchmark = load_benchmark(f"mbpp:{path}")
    assert benchmark.items[0].problem.tests is not None
    assert benchmark.items[0].problem.tests.setup == "import math"
    assert failing(f"mbpp:{path}") == {}


def test_mbpp_plus_tests_with_a_script(tmp_path: Path) -> None:
    script = (
        "import math\n\ndef assertion(out, exp):\n    assert out == exp\n\n"
        "inputs = [[1], [5]]\nresults = [{a}, {b}]\n"
        "for i, (inp, exp) in enumerate(zip(inputs, results)):\n    assertion(add_{n}(*inp), exp)\n"
    )
    rows = [
        {"task_id": f"Mbpp/{n}", "code": r["code"], "prompt": r["text"], "test_list": r["test_list"],
         "test": script.format(n=n, a=n + 1, b=n + 5)}
        for r in files.MBPP for n in [r["task_id"]]
    ]  # fmt: skip
    path = files.write_lines(tmp_path / "plus.jsonl", rows)
    benchmark = load_benchmark(f"mbpp_plus:{path}")
    assert [item.id for item in benchmark.items] == ["MBPP/1", "MBPP/11", "MBPP/510", "MBPP/511"]
    tests = benchmark.items[0].problem.tests
    assert tests is not None
    assert tests.assertions[0].startswith("for i, (inp, exp)")
    assert "def assertion" in tests.setup
    assert failing(f"mbpp_plus:{path}") == {}
    files.write_lines(path, [{**row, "test": row["test"].replace("results = [", "results = [0 * ")} for row in rows])
    assert len(failing(f"mbpp_plus:{path}")) == 4


def test_parallel_files_are_read_in_the_direction_of_the_one_that_is_given(tmp_path: Path) -> None:
    name = files.parallel(tmp_path)
    there, back = load_benchmark(name), load_benchmark(name.removesuffix("de") + "en")
    assert (there.name, back.name) == ("wmt22_de-en", "wmt22_en-de")
    assert there.items[0].problem.prompt == "Translate this from German to English:\nGerman: Guten Tag.\nEnglish:"
    assert there.items[0].problem.reference == "Good day."
    assert back.items[0].problem.prompt == "Translate this from English to German:\nEnglish: Good day.\nGerman:"
    assert there.bleu_tokenizer == "13a"


@pytest.mark.parametrize("column", ["translation", "en-zh"])
def test_translations_in_a_column_follow_the_name_of_the_file(tmp_path: Path, column: str) -> None:
    rows = [{column: {"zh": "好", "en": "good"}}]
    path = tmp_path / "test.en-zh.json"
    path.write_text(json.dumps(rows))
    benchmark = load_benchmark(f"opensubtitles:{path}")
    assert benchmark.name == "opensubtitles_en-zh"
    assert benchmark.items[0].problem.reference == "好"
    assert benchmark.bleu_tokenizer == "zh"
    other = files.write_lines(tmp_path / "test.jsonl", rows)
    assert load_benchmark(f"opensubtitles:{other}").name == "opensubtitles_zh-en"


def test_mtnt_is_a_table(tmp_path: Path) -> None:
    path = tmp_path / "test.en-fr.tsv"
    path.write_text("1\thello\tbonjour\n2\tgreat\tsuper\n")
    benchmark = load_benchmark(f"mtnt:{path}")
    assert benchmark.name == "mtnt_en-fr"
    assert [item.problem.reference for item in benchmark.items] == ["bonjour", "super"]
    assert benchmark.items[0].problem.prompt.endswith("English: hello\nFrench:")


@pytest.mark.parametrize(("name", "kind"), [("mini", "code"), ("mini_translation", "translation")])
def test_our_own_benchmarks_are_held_out_splits(name: str, kind: str) -> None:
    benchmark = load_benchmark(name)
    assert (benchmark.name, benchmark.kind) == (name, kind)
    assert len(benchmark.items) > 50
    limited = benchmark.limited(5)
    assert limited.numbers[0] == 0
    assert limited.numbers[-1] == len(benchmark.items) - 1
    assert [benchmark.items[number] for number in limited.numbers] == list(limited.items)
    assert len({benchmark.fingerprint, limited.fingerprint, benchmark.limited(4).fingerprint}) == 3
    validation = load_benchmark(f"{name}:validation")
    assert (validation.name, validation.kind) == (f"{name}_validation", kind)
    assert not {item.problem.prompt for item in validation.items} & {item.problem.prompt for item in benchmark.items}


def test_a_folder_is_read_as_far_as_its_languages_can_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for language in ("pl", "lua"):
        rows = [{**row, "language": language} for row in files.MULTIPL_E]
        files.write_lines(tmp_path / f"humaneval-{language}.jsonl", rows)
    monkeypatch.setattr(foreign, "obstacle", lambda language: "lua is not installed" if language == "lua" else None)
    benchmarks, skipped = load_benchmarks([f"multipl_e:{tmp_path}"])
    assert [benchmark.name for benchmark in benchmarks] == ["multipl_e_pl"]
    assert skipped == ("multipl_e_lua is skipped: lua is not installed",)
    with pytest.raises(DataError, match="multipl_e_lua: lua is not installed"):
        load_benchmarks([f"multipl_e:{tmp_path / 'humaneval-lua.jsonl'}"])


def changed(name: str, rows: list[dict[str, Any]], **changes: Any) -> Any:
    """A file whose second row has other values, or lacks those that are None."""

    def write(folder: Path) -> str:
        last = {k: v for k, v in {**rows[-1], **changes}.items() if v is not None}
        return f"{name}:{files.write_lines(folder / 'file.jsonl', [*rows[:-1], last])}"

    return write


def text(name: str, file: str, content: str) -> Any:
    def write(folder: Path) -> str:
        (folder / file).write_text(content)
        return f"{name}:{folder / file}"

    return write


@pytest.mark.parametrize(
    ("write", "parts"),
    [
        (changed("humaneval", files.HUMANEVAL, test=None), ["row 2", "no field 'test'", "task_id"]),
        (changed("humaneval", files.HUMANEVAL, prompt=3), ["row 2", "'prompt' is int"]),
        (changed("humaneval", files.HUMANEVAL, test="def check(:"), ["row 2", "tests do not compile"]),
        (changed("mbpp", files.MBPP[:5], test_list=["assert ("]), ["row 5", "tests do not compile"]),
        (changed("mbpp", files.MBPP[:5], test_list=["assert len([]) == 0"]), ["row 5", "call nothing"]),
        (changed("mbpp", files.MBPP[:5], test_list="assert"), ["row 5", "'test_list' is not a list of texts"]),
        (changed("mbpp", files.MBPP[:2]), ["lacks task 3", "whole file"]),
        (changed("mbpp", files.MBPP[:4]), ["holds no problem"]),
        (changed("mbpp", files.MBPP, task_id="x"), ["row 7", "task_id='x'"]),
        (changed("multipl_e", files.MULTIPL_E, stop_tokens=None), ["row 1", "no field 'stop_tokens'"]),
        (changed("wmt22", [{"text": "x"}]), ["row 1", "no column like translation", "text"]),
        (changed("wmt22", [{"translation": {"de": "x", "en": 3}}]), ["row 1", "text in 'en' is int"]),
        (changed("wmt22", [{"translation": {"de": "x", "xx": "y"}}]), ["language 'xx'"]),
        (text("wmt22", "test.txt", "x"), ["test.txt", "name says no languages"]),
        (text("wmt22", "test.de-en.de", "x"), ["test.de-en.en", "no such file"]),
        (text("mtnt", "test.en-fr.tsv", "1\tx\n"), ["row 1", "2 fields between tabs"]),
        (text("humaneval", "x.jsonl", "{half"), ["x.jsonl", "cannot be read"]),
        (text("humaneval", "x.jsonl", "[1]"), ["row 1", "list, not an object"]),
        (text("humaneval", "x.jsonl.gz", "no gzip"), ["x.jsonl.gz", "cannot be read"]),
        (lambda folder: "humaneval", ["no file is given", "humaneval:hub", "openai/openai_humaneval"]),
        (lambda folder: "mtnt", ["no file is given", "mtnt:/path"]),
        (lambda folder: "humanevl", ["unknown benchmark 'humanevl'", "Did you mean 'humaneval'"]),
        (lambda folder: "humaneval:/nowhere.jsonl", ["/nowhere.jsonl", "no such file"]),
    ],
)  # fmt: skip
def test_bad_files_are_refused_in_one_line(tmp_path: Path, write: Any, parts: list[str]) -> None:
    with pytest.raises(DataError) as refused:
        load_benchmark(write(tmp_path))
    assert "\n" not in str(refused.value)
    for part in parts:
        assert part in str(refused.value)


def test_two_benchmarks_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="another one is called 'mini'"):
        load_benchmarks(["mini", "mini"])


def test_nothing_is_downloaded_unless_the_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def read_hub(hub_id: str, config: str | None) -> list[dict[str, Any]]:
        asked.append((hub_id, config))
        first, second = str(config).split("-")
        return [{str(config): {first: "Guten Tag.", second: "Good day."}}]

    monkeypatch.setattr("ebft_study.evaluation.downstream.items.read_hub", read_hub)
    with pytest.raises(DataError, match="no file is given"):
        load_benchmark("wmt22")
    assert asked == []
    assert load_benchmark("wmt22:hub").name == "wmt22_de-en"
    assert load_benchmark("wmt22:hub:cs-en").source == "hub:haoranxu/WMT22-Test/cs-en"
    assert asked == [("haoranxu/WMT22-Test", "de-en"), ("haoranxu/WMT22-Test", "cs-en")]


def test_without_a_network_the_hub_is_refused_in_one_line() -> None:
    code = (
        "from ebft_study.evaluation.downstream.benchmarks import load_benchmark\n"
        "from ebft_study.errors import DataError\n"
        "try:\n    load_benchmark('humaneval:hub')\nexcept DataError as error:\n    print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "openai/openai_humaneval" in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1
