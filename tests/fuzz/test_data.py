"""Data sets that nobody should write: the examples that another reader finds in them, or one line."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebft_study.config import DataConfig
from ebft_study.data import TextDataset, load_text, tokenize
from ebft_study.errors import DataError
from ebft_study.networks.loading import load_tokenizer
from tests.fuzz.outcomes import answer, check, flip, inputs, truncate
from tests.tiny_run import write_model

randoms = st.randoms(use_true_random=False)
LONG = b"in the range " * 80_000
"""A megabyte."""
HARMLESS = [
    b'{"text": "a\\u0000b"}', b'{"text": null}', b"{}", b'{"TEXT": "x", "text": "more of it"}', b"", b"   ",
    b'{"text": "y", "n": NaN}', b'{"text": "z", "n": 1e999}', b'{"n": 123456789012345678901234567890, "text": "x y"}',
    b'{"text": "with carriage return"}\r', b'{"text": ""}', b'{"text": "2026-01-01"}', b'{"text": "' + LONG + b'"}',
    '{"text": "é \U0001f600 \u2028"}'.encode(), b'{"text": "\\ud83d\\ude00"}', b'\t{"text" : "spaces"} ',
    b'{"text": "n", "n": ' + b"[" * 200 + b"]" * 200 + b"}",
]  # fmt: skip
HARMFUL = [
    b'{"text": 1}', b'{"text": true}', b'{"text": ["a"]}', b'{"text": {"a": 1}}', b'{"text": NaN}',
    b'{"text": Infinity}', b"[]", b"null", b"1", b'"x"', b'{"text": "\\ud800 x"}',
    b'{"text": "\xff\xfe"}', b'{"text": "a\x00b"}', b"\x00",
    b'{"text": ' + b"9" * 5000 + b"}", b'{"text": "a", "text": "b"}', b'{"text": "open', b'{"text":"\\x"}', b"// no",
    b'{"text": ' + b"[" * 20000 + b"]" * 20000 + b"}", b"[" * 50000, b'{"text": "x"} {"text": "y"}',
    b"{'text': 'x'}",
    b'{"text": "x", "y": ' + b'{"a":' * 5000 + b"1" + b"}" * 5005,
]  # fmt: skip
COLUMNS = {
    kind: pa.array(values, kind)
    for kind, values in (
        (pa.string(), [f"value {k} of the list" for k in range(8)]), (pa.large_string(), [f"a {k}" for k in range(8)]),
        (pa.string_view(), [f"b {k}" for k in range(8)]), (pa.int64(), range(8)), (pa.float32(), range(8)),
        (pa.bool_(), [True] * 8), (pa.binary(), [b"\xff"] * 8), (pa.null(), [None] * 8), (pa.timestamp("us"), range(8)),
        (pa.list_(pa.string()), [["a"]] * 8), (pa.struct([("a", pa.int8())]), [{"a": 1}] * 8),
        (pa.decimal128(5, 2), [1] * 8), (pa.dictionary(pa.int8(), pa.string()), [f"c {k}" for k in range(8)]),
        (pa.map_(pa.string(), pa.string()), [[("a", "b")]] * 8),
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(str(write_model(tmp_path_factory.mktemp("model"))))


def read(path: Path, tokenizer: Any, **columns: str) -> TextDataset:
    """The splits of a file, after all of them were tokenized."""
    data = load_text(DataConfig(dataset=str(path), **columns))
    for examples in data.splits.values():
        tokenize(examples, tokenizer, sequence_length=24, packing=True, has_answers=data.has_answers)
    return data


def texts(data: TextDataset) -> set[str]:
    return {example.answer for examples in data.splits.values() for example in examples}


@inputs(400)
@given(draw=randoms)
def test_json(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, draw: Random) -> None:
    lines = [b'{"text": "value %d in range of the list"}' % k for k in range(draw.choice([0, 3, 20]))]
    for line in draw.choices(HARMLESS, k=draw.choice([0, 1, 2])) + draw.choices(HARMFUL, k=draw.choice([0, 0, 1])):
        lines.insert(draw.randrange(len(lines) + 1), line)
    path = tmp_path_factory.mktemp("data") / draw.choice(["data.jsonl", "data.json"])
    ends = draw.choice([b"\n", b"\r\n"])
    path.write_bytes(draw.choice([b"", b"", b"\xef\xbb\xbf"]) + ends.join(lines) + draw.choice([b"", ends]))
    if draw.random() < 0.1:
        draw.choice([flip, truncate])(path, draw)
    data, _ = answer("json", lambda: read(path, tokenizer, **draw.choice([{}, {"text_column": "text"}])))
    if data is not None:
        content = path.read_bytes().decode("utf-8-sig")
        is_list = content.lstrip().startswith("[")
        rows = json.loads(content) if is_list else [json.loads(line) for line in content.split("\n") if line.strip()]
        expected = {row["text"] for row in rows if (row.get("text") or "").strip()}
        check(texts(data) == expected, "examples differ from those that are in the file")


@inputs(200)
@given(draw=randoms)
def test_parquet(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, draw: Random) -> None:
    path = tmp_path_factory.mktemp("data") / "data.parquet"
    names = draw.sample(["text", "a", "text", " text", ""], k=2)
    columns = [draw.choice([COLUMNS[pa.string()], *COLUMNS.values()]) for _ in names]
    length = draw.choice([0, 1, 8, 8, 8])
    table = pa.Table.from_arrays([column.slice(0, length) for column in columns], names=names)
    pq.write_table(table, path, row_group_size=draw.choice([2, 100]), write_page_checksum=True)
    harm = draw.choice([None, None, flip, truncate, lambda path, _: path.write_bytes(path.read_bytes() + b"x")])
    if harm is not None:
        harm(path, draw)
    wanted = draw.choice([{}, {"text_column": "text"}, {"prompt_column": "a", "answer_column": "text"}])
    data, _ = answer("parquet", lambda: read(path, tokenizer, **wanted))
    if data is not None and harm is None:
        check(texts(data) == set(pd.read_parquet(path)["text"].dropna()), "examples differ from those in the file")


# --- what once went wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"text": "x", "y": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "line 1 is nested too deeply"),
        (b'{"text": "x"}\nnull\n{"text": true}', "line 2 is not a JSON object"),  # ended the process in pyarrow
        (b'{"text": "a", "text": "b"}', "line 1 has 'text' twice"),
        (b'{"text": "\\ud800"}', "line 1 is not valid JSON"),
        (b'{"text": "x"}\n{"text": "\xff"}', "line 2 is not UTF-8"),
    ],
)
def test_json_that_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=problem):
        load_text(DataConfig(dataset=str(tmp_path / "data.jsonl")))


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    column = COLUMNS[pa.string()]
    pq.write_table(pa.Table.from_arrays([column, column], names=["text", "text"]), tmp_path / "data.parquet")
    with pytest.raises(DataError, match="has 2 columns 'text'"):
        load_text(DataConfig(dataset=str(tmp_path / "data.parquet")))


def test_what_looks_like_a_date_is_text(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("\n".join(f'{{"text": "2026-01-0{k}"}}' for k in range(1, 9)))
    assert "2026-01-03" in texts(load_text(DataConfig(dataset=str(tmp_path / "data.jsonl"))))
