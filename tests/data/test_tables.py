"""Local files, hub data sets and the paper's presets."""

from __future__ import annotations

import json
import socket
import time

import datasets
import huggingface_hub
import pandas as pd
import pytest

from ebft_study.config import DataConfig
from ebft_study.data import SPLITS, load_text
from ebft_study.errors import DataError
from ebft_study.sandbox import Tests


@pytest.fixture(autouse=True)
def _own_cache_and_no_network(tmp_path, monkeypatch):
    def refuse(*arguments, **keywords):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setenv("EBFT_STUDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def write(path, rows):
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(dataset, **settings):
    return load_text(DataConfig(dataset=str(dataset), **settings))


def everything(dataset):
    return [item for split in SPLITS for item in dataset.splits[split]]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_raw_text_is_read_from_every_format(tmp_path, suffix):
    path = write(tmp_path / f"data{suffix}", [{"text": f"text {n}\n", "n": n} for n in range(200)])
    dataset = load(path)
    assert not dataset.has_answers
    assert {item.answer for item in everything(dataset)} == {f"text {n}\n" for n in range(200)}
    assert all(
        item.prompt == "" and len(dataset.splits[split]) > 0 for split in SPLITS for item in dataset.splits[split]
    )
    assert dataset.provenance["split_by"] == "content"


def test_columns_map_to_prompt_and_answer(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"q": f"q{n}", "a": f"a{n}", "text": "no"} for n in range(50)])
    dataset = load(path, prompt_column="q", answer_column="a")
    assert dataset.has_answers
    assert {(item.prompt, item.answer) for item in everything(dataset)} == {(f"q{n}", f"a{n}") for n in range(50)}


def test_text_column_chooses_another_column(tmp_path):
    path = write(tmp_path / "data.parquet", [{"code": f"c{n}", "text": "same"} for n in range(20)])
    assert {item.answer for item in everything(load(path, text_column="code"))} == {f"c{n}" for n in range(20)}


def test_the_split_depends_on_content_alone(tmp_path):
    rows = [{"text": f"text {n}"} for n in range(400)]
    first = load(write(tmp_path / "a.jsonl", rows))
    second = load(write(tmp_path / "b.parquet", [*rows[::-1], {"text": "one more"}]))
    for split in SPLITS:
        texts = [{item.answer for item in dataset.splits[split]} for dataset in (first, second)]
        assert texts[0] - texts[1] == set()
        assert texts[1] - texts[0] <= {"one more"}


def test_repeated_and_empty_rows_are_dropped_and_counted(tmp_path):
    rows = [{"text": text} for text in ("a", "b", "c", "a", "", None, " ")]
    assert load(write(tmp_path / "data.jsonl", rows)).provenance["dropped_examples"] == {"empty": 3, "repeated": 1}


def test_max_examples_is_a_prefix_of_the_whole(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"text": f"text {n}"} for n in range(300)])
    assert load(path, max_examples=10).splits["train"] == load(path).splits["train"][:10]


def test_reading_a_local_file_leaves_the_hub_cache_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    load(write(tmp_path / "data.jsonl", [{"text": f"text {n}"} for n in range(10)]))
    assert not (tmp_path / "hub").exists()


# --- presets on local files in the data sets' own format -------------------------------------------------------


def test_open_code_instruct_joins_question_and_solution(tmp_path):
    rows = [
        {"id": str(n), "input": f"Write f{n}.\n", "output": f"```python\ndef f{n}(): ...\n```", "domain": "generic",
         "generation_algorithm": "self-instruct", "llm_judgement": "{}", "unit_tests": "[]", "average_test_score": "1"}
        for n in range(30)
    ]  # fmt: skip
    dataset = load(f"open_code_instruct:{write(tmp_path / 'data.parquet', rows)}")
    assert dataset.has_answers
    assert len(everything(dataset)) == 30
    assert ("Write f7.\n\n", "```python\ndef f7(): ...\n```") in {(e.prompt, e.answer) for e in everything(dataset)}
    assert dataset.provenance["preset"] == "open_code_instruct"


def solved(number, unit_tests):
    answer = f"```python\nimport math\n\ndef f{number}(x):\n    return x\n\ndef unused(): ...\n```"
    return {"input": f"Write f{number}.", "output": answer, "unit_tests": unit_tests}


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_open_code_instruct_has_its_unit_tests(tmp_path, suffix, as_text):
    def column(number):
        items = [f"\nassert f{number}(1) == 1\n", f"assert len(str(f{number}(22))) == 2", "assert f(", ""]
        return json.dumps(items) if as_text else items

    path = write(tmp_path / f"data{suffix}", [solved(number, column(number)) for number in range(30)])
    for example in everything(load(f"open_code_instruct:{path}")):
        name = example.prompt.split()[1].rstrip(".")
        assert example.tests == Tests(
            assertions=(f"assert {name}(1) == 1", f"assert len(str({name}(22))) == 2"), entry_points=(name,)
        )
        assert "assert" not in example.prompt


@pytest.mark.parametrize("column", [None, "", "[]", '["assert other(1)"]'])
def test_rows_without_usable_tests_have_none(tmp_path, column):
    rows = [solved(number, column) for number in range(30)]
    dataset = load(f"open_code_instruct:{write(tmp_path / 'data.jsonl', rows)}")
    assert {example.tests for example in everything(dataset)} == {None}


def test_entry_points_are_found_in_an_answer_without_a_code_block(tmp_path):
    rows = [
        {"input": f"q{n}", "output": f"def f():\n    return {n}\nclass A: ...\n", "unit_tests": '["assert A and f()"]'}
        for n in range(30)
    ]
    dataset = load(f"open_code_instruct:{write(tmp_path / 'data.jsonl', rows)}")
    assert {example.tests.entry_points for example in everything(dataset)} == {("f", "A")}


@pytest.mark.parametrize(
    ("column", "problem"),
    [
        ("assert f(", "is neither a list nor its JSON text, but begins with 'assert f"),
        ('{"a": 1}', "must be a list of strings"),
        ("[1, 2]", "must be a list of strings"),
        (3, "is neither a list nor its JSON text"),
    ],
)
def test_malformed_tests_are_refused_in_one_line(tmp_path, column, problem):
    path = write(tmp_path / "data.jsonl", [solved(number, column) for number in range(30)])
    with pytest.raises(DataError, match=problem) as caught:
        load(f"open_code_instruct:{path}")
    assert str(caught.value).startswith(f"{path}: row 0: column 'unit_tests' ")
    assert "\n" not in str(caught.value)


def test_swallow_code_is_raw_text(tmp_path):
    rows = [{"text": f"import os\nprint({n})\n", "length": 20} for n in range(30)]
    dataset = load(f"swallow_code:{write(tmp_path / 'data.jsonl', rows)}")
    assert not dataset.has_answers
    assert "import os\nprint(3)\n" in {item.answer for item in everything(dataset)}


@pytest.mark.parametrize("suffix", [".parquet", ".json", ".jsonl"])
@pytest.mark.parametrize(
    ("config", "prompt", "answer"),
    [
        (None, "Translate this from German to English:\nGerman: Haus 5\nEnglish:", " house 5"),
        ("de-en", "Translate this from German to English:\nGerman: Haus 5\nEnglish:", " house 5"),
        ("en-de", "Translate this from English to German:\nEnglish: house 5\nGerman:", " Haus 5"),
    ],
)
def test_alma_translates_in_the_direction_of_its_configuration(tmp_path, suffix, config, prompt, answer):
    rows = [{"translation": {"de": f"Haus {n}", "en": f"house {n}"}} for n in range(30)]
    dataset = load(f"alma_human_parallel:{write(tmp_path / f'data{suffix}', rows)}", dataset_config=config)
    assert (prompt, answer) in {(item.prompt, item.answer) for item in everything(dataset)}


def test_alma_refuses_a_pair_that_it_does_not_have(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"translation": {"de": "Haus", "en": "house"}}])
    with pytest.raises(DataError, match=r"needs 'cs' and 'en' but holds de, en"):
        load(f"alma_human_parallel:{path}", dataset_config="cs-en")
    with pytest.raises(DataError, match=r"dataset_config='de-fr' is not one of its language pairs"):
        load(f"alma_human_parallel:{path}", dataset_config="de-fr")


def test_a_preset_names_the_column_that_a_file_lacks(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"question": "q", "output": "a"}])
    with pytest.raises(DataError, match=r"has no column 'input'; its columns are question, output"):
        load(f"open_code_instruct:{path}")


def test_a_preset_refuses_columns_of_ones_own(tmp_path):
    with pytest.raises(DataError, match="'swallow_code': has its own columns"):
        load("swallow_code", text_column="code")


# --- a fake hub -----------------------------------------------------------------------------------------


class Hub:
    """Fake of the hub: records its calls and streams rows from memory."""

    def __init__(self, monkeypatch, **splits):
        self.asked = []
        self.splits = splits
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: type("Info", (), {"sha": "c0ffee"}))
        monkeypatch.setattr(datasets, "load_dataset", self.load)

    def load(self, hub_id, config, *, revision, streaming):
        self.asked.append((hub_id, config, revision, streaming))
        return {split: datasets.Dataset.from_list(rows).to_iterable_dataset() for split, rows in self.splits.items()}


def texts(*numbers):
    return [{"text": f"text {n}"} for n in numbers]


def test_a_hub_data_set_is_read_once_at_one_commit(monkeypatch):
    hub = Hub(monkeypatch, train=texts(*range(100)))
    first, second = load("owner/name", dataset_config="small"), load("owner/name", dataset_config="small")
    assert hub.asked == [("owner/name", "small", "c0ffee", True)]
    assert first == second
    assert first.provenance["commit"] == "c0ffee"
    assert first.provenance["source"] == "hub:owner/name"


def test_a_presets_hub_id_and_configuration_are_used(monkeypatch):
    hub = Hub(monkeypatch, train=[{"translation": {"de": f"Haus {n}", "en": f"house {n}"}} for n in range(9)])
    dataset = load("alma_human_parallel", dataset_config="en-de")
    assert hub.asked == [("haoranxu/ALMA-Human-Parallel", "de-en", "c0ffee", True)]
    assert dataset.splits["train"][0].prompt.startswith("Translate this from English to German:")


def test_a_data_sets_own_splits_are_used(monkeypatch):
    Hub(monkeypatch, train=texts(1, 2, 3), validation=texts(4, 5), test=texts(6, 1))
    dataset = load("owner/name")
    found = {split: {item.answer for item in dataset.splits[split]} for split in SPLITS}
    assert found == {
        "train": {"text 2", "text 3"},  # text 1 is also in test
        "validation": {"text 4", "text 5"},
        "heldout": {"text 6", "text 1"},
    }
    assert dataset.provenance["split_by"] == "its own splits"


def test_one_evaluation_split_is_divided_into_two(monkeypatch):
    Hub(monkeypatch, train=texts(*range(50)), test=texts(*range(100, 200)))
    dataset = load("owner/name")
    numbers = {split: {int(item.answer.split()[1]) for item in dataset.splits[split]} for split in SPLITS}
    assert numbers["train"] == set(range(50))
    assert numbers["validation"] | numbers["heldout"] == set(range(100, 200))
    assert min(len(numbers["validation"]), len(numbers["heldout"])) > 20
    assert numbers["validation"].isdisjoint(numbers["heldout"])


def test_a_data_set_with_only_a_test_split_is_split_by_content(monkeypatch):
    Hub(monkeypatch, test=texts(*range(200)))
    dataset = load("owner/name")
    assert len(everything(dataset)) == 200
    assert len(dataset.splits["train"]) > 150


def test_max_examples_reads_only_part_of_a_large_data_set(monkeypatch):
    monkeypatch.setattr("ebft_study.data.tables.EVALUATION_ROWS", 100)
    monkeypatch.setattr("ebft_study.data.tables.SHUFFLE_BUFFER", 1000)
    Hub(monkeypatch, train=texts(*range(5000)))
    dataset = load("owner/name", max_examples=90)
    assert len(dataset.splits["train"]) == 90
    assert sum(len(dataset.splits[split]) for split in SPLITS) <= 200
    rows = [int(item.origin.split(":")[1]) for item in dataset.splits["train"]]
    assert max(rows) < 200
    assert max(int(item.answer.split()[1]) for item in dataset.splits["train"]) > 300  # mixed, not the first rows


def test_without_network_the_remedy_comes_quickly(monkeypatch):
    """A real refused connection: the hub's address is a port of this machine on which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    original = huggingface_hub.HfApi.__init__

    def elsewhere(self, **keywords):
        original(self, **{**keywords, "endpoint": closed})

    monkeypatch.setattr(huggingface_hub.HfApi, "__init__", elsewhere)
    start = time.monotonic()
    with pytest.raises(DataError, match=r"'owner/name': the hub .*Go online, or use a local file") as caught:
        load("owner/name")
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value)


def test_offline_mode_is_respected(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        load("open_code_instruct")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("RepositoryNotFoundError", "is not on the hub, or is private"),
        ("RevisionNotFoundError", "has no revision 'v9'"),
        ("GatedRepoError", "Accept its terms"),
        ("SomethingElse", "cannot be read"),
    ],
)
def test_what_the_hub_answers_becomes_one_line(monkeypatch, error, message):
    def refuse(*_, **__):
        raise type(error, (Exception,), {})("404\nsee the log")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(DataError, match=message) as caught:
        load("owner/name", dataset_revision="v9")
    assert "\n" not in str(caught.value)


def test_a_missing_configuration_is_named(monkeypatch):
    hub = Hub(monkeypatch)

    def refuse(*_, **__):
        raise ValueError("Config name is missing.\nPlease pick one among ['a', 'b']")

    monkeypatch.setattr(hub, "load", refuse)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"pick one among \['a', 'b'\]\. Set dataset_config"):
        load("owner/name")


# --- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "is empty"),
        ("blank.jsonl", b"\n \n", "is empty"),
        ("empty.parquet", b"", "is empty"),
        ("binary.jsonl", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is a binary file"),
        ("binary.parquet", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is not a Parquet file"),
        ("cut.parquet", b"PAR1\x15\x04\x15", "cannot be read"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2 is not UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": "b"\n', "line 2 is not valid JSON"),
        ("list.jsonl", b'{"text": "a"}\n[1, 2]\n', "line 2 is not a JSON object"),
        ("mixed.jsonl", b'{"text": "a"}\n{"text": {"b": 1}}\n', "row 1: text must be text, but one is dict|same types"),
        ("number.jsonl", b'{"text": 1}\n', "row 0: text must be text, but one is int"),
        ("column.jsonl", b'{"body": "a", "id": 1}\n', "has no column 'text'; its columns are body, id"),
        ("hollow.jsonl", b'{"text": ""}\n{"text": null}\n', r"yields no example \(2 empty\)"),
        ("data.csv", b"text\na\n", "is neither .jsonl nor .parquet"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path, capfd, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.jsonl: no such file"):
        load(tmp_path / "nothing.jsonl")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="is a folder"):
        load(tmp_path)


@pytest.mark.parametrize("settings", [{"dataset_config": "a"}, {"dataset_revision": "main"}])
def test_hub_settings_are_refused_for_local_files(tmp_path, settings):
    path = write(tmp_path / "data.jsonl", texts(1, 2, 3))
    with pytest.raises(DataError, match="is for hub data sets"):
        load(path, **settings)
    with pytest.raises(DataError, match="is for hub data sets"):
        load(f"swallow_code:{path}", **settings)


def test_a_misspelt_data_set_gets_the_nearest_name():
    with pytest.raises(DataError, match="unknown data set 'unstructred': did you mean 'unstructured'"):
        load("unstructred")
    with pytest.raises(DataError, match="unknown data set 'xyz': use stdlib, unstructured, qa"):
        load("xyz")
    with pytest.raises(DataError, match="did you mean 'open_code_instruct'"):
        load("open_code_instruction")
