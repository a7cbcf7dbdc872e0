"""Plug-ins: how they are named, found, refused, recorded; who imports them and who never does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

import ebft_study as ebft
from ebft_study import plugins, results
from ebft_study.config import DataConfig, RunConfig, VerifierConfig
from ebft_study.config.sections import DATASETS
from ebft_study.data import SPLITS, load_text
from ebft_study.data.builtin import SOURCES
from ebft_study.data.presets import PRESETS
from ebft_study.errors import ConfigError, DataError, EbftError, ResultsError
from ebft_study.results import METRICS
from ebft_study.study.driver import runner, single_run
from ebft_study.study.folder.study_yaml import StudySource
from ebft_study.study.resolving.study_file import load_study
from ebft_study.study.view import status
from tests.plugin_files import forget, forgotten, write_module
from tests.tiny_run import tiny_config

__all__ = ["forgotten"]

pytestmark = pytest.mark.usefixtures("forgotten")
METRIC = """
from ebft_study.evaluation.extra_metrics import metric

@metric(direction="max", unit="tokens", description="positions")
def my_positions(evaluated):
    return evaluated.anchors.positions.float()
"""


# --- names -----------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with entry points, which no test may import unasked."""
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("raise AssertionError('was imported')\n")
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[ebft_study.plugins]\nshort = my_package.rewards:Short.score\nbleu = my_package:other\nqa = my_package:data\n"
        "tpe = my_package:sampler\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def study(**more: Any) -> dict[str, Any]:
    return {"study": "s", "question": "?", "run": {"steps": 4}, "axes": {"gamma": [0.0, 0.1]}, **more}


def optuna(**more: Any) -> dict[str, Any]:
    return study(search={"algorithm": "optuna", "num_configurations": 2, **more})


def test_an_entry_point_is_its_import_path_and_is_not_imported(package: Path) -> None:
    assert VerifierConfig(verifier="short").verifier == "my_package.rewards:Short.score"
    assert DataConfig(dataset="short").dataset == "my_package.rewards:Short.score"
    assert plugins.name_of("my_package.rewards:Short.score") == "score"


def test_names_of_ours_mean_ours_whatever_is_installed(package: Path) -> None:
    assert VerifierConfig(verifier="bleu").verifier == "bleu"
    assert DataConfig(dataset="qa").dataset == "qa"
    assert set(DATASETS) == {*SOURCES, *PRESETS}
    assert plugins.choice(("tpe", "gp"))("tpe") == "tpe"


def test_an_entry_point_of_two_packages_is_refused(package: Path) -> None:
    info = package / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ebft_study.plugins]\nshort = other:short\n")
    with pytest.raises(ValueError, match=r"several packages: my_package.rewards:Short.score, other:short. Use one"):
        plugins.expanded("short")


@pytest.mark.parametrize("name", ["file.jsonl", "owner/name", "open_code_instruct:/tmp/x.jsonl", "a:b.c/d", ":f", "m:"])
def test_files_and_hub_ids_are_no_import_paths(name: str) -> None:
    assert not plugins.is_path(name)
    assert plugins.expanded(name) == name


# --- importing -------------------------------------------------------------------------------------------------


def test_modules_are_found_beside_the_study_file_after_installed_ones(tmp_path: Path) -> None:
    write_module(tmp_path, "my_module", "def f(): return 1\n")
    write_module(tmp_path, "json", "def dumps(): return 'mine'\n")
    with pytest.raises(ConfigError, match=r"there is no module 'my_module' where Python looks. Put it into the folder"):
        plugins.load("my_module:f", key="k")
    plugins.search_in(tmp_path)
    assert plugins.load("my_module:f", key="k")() == 1
    assert plugins.load("json:dumps", key="k")(1) == "1"
    plugins.search_in(None)
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("my_module:ff", "my_module has no ff. Did you mean 'f'?"),
        ("my_module:xyz", "my_module has no xyz. Repair the name"),
        ("my_module:constant", "is no function and no class, but int. Name one"),
        ("my_missing:f", "its module imports 'my_absent', which is missing. Install it"),
        ("my_broken:f", "cannot be imported (ZeroDivisionError: division by zero). Repair its module"),
        ("my_module:f:g", "is no import path. Write package.module:name"),
    ],
)
def test_what_cannot_be_imported_is_refused_in_one_line(path: str, rule: str, tmp_path: Path) -> None:
    write_module(tmp_path, "my_module", "def f(): return 1\nconstant = 3\n")
    write_module(tmp_path, "my_missing", "import my_absent\n")
    write_module(tmp_path, "my_broken", "1 / 0\n")
    plugins.search_in(tmp_path)
    with pytest.raises(ConfigError) as refused:
        plugins.load(path, key="search.sampler")
    assert str(refused.value) == f"search.sampler={path!r}: {rule}"


def test_a_module_of_the_same_name_in_another_folder_is_not_taken_for_it(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_module(tmp_path / folder, "my_module", f"def f(): return {folder!r}\n")
    plugins.search_in(tmp_path / "a")
    assert plugins.load("my_module:f", key="k")() == "a"
    plugins.search_in(tmp_path / "b")
    with pytest.raises(ConfigError, match=r"has imported another module 'my_module' from .*Restart Python"):
        plugins.load("my_module:f", key="k")


def test_code_that_changed_under_the_process_or_since_the_study_began_is_refused(tmp_path: Path) -> None:
    write_module(tmp_path, "my_module", "def f(): return 1\n")
    plugins.search_in(tmp_path)
    plugins.load("my_module:f", key="k")
    began = plugins.fingerprint("my_module:f")
    write_module(tmp_path, "my_module", "def f(): return 2\n")
    with pytest.raises(ConfigError, match=r"have changed since this process imported them. Restart Python"):
        plugins.load("my_module:f", key="k")
    del sys.modules["my_module"]
    assert plugins.load("my_module:f", key="k")
    plugins.search_in(tmp_path, {"my_module:f": began})
    with pytest.raises(ConfigError, match=f"is not what the study began with \\({began[:8]} -> "):
        plugins.load("my_module:f", key="k")


def test_the_digest_of_a_package_covers_all_its_modules(tmp_path: Path) -> None:
    (tmp_path / "my_package").mkdir()
    for name in ("__init__", "plugin", "helper"):
        (tmp_path / "my_package" / f"{name}.py").write_text("def f(): return 1\n")
    plugins.search_in(tmp_path)
    plugins.load("my_package.plugin:f", key="k")
    before = plugins.fingerprint("my_package.plugin:f")
    (tmp_path / "my_package" / "helper.py").write_text("def f(): return 2\n")
    assert plugins.fingerprint("my_package.plugin:f") != before


# --- a study file that names them ------------------------------------------------------------------------------

MODULE = """
class Callback:
    def __init__(self, where): pass
    def on_report(self, trial): pass

class Nothing: pass
class Raises:
    def __init__(self): raise OSError("no such server")

def rule(history, limit): return ""
def data(config): return []
def data_without_arguments(): return []
def sampler(n): return n
def metric(evaluated): return None
"""


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (optuna(sampler="tpee"), "search.sampler='tpee': is no known one. Did you mean 'tpe'? Use tpe, gp"),
        (optuna(sampler="my_module:no"), "search.sampler='my_module:no': my_module has no no. "),
        (optuna(sampler="my_module:sampler"), "cannot be called as sampler(): missing a required argument: 'n'. Its"),
        (
            optuna(sampler="tpe", sampler_options={"n": 1}),
            "only a package.module:name has any, and not tpe",
        ),
        (
            study(scheduler={"kind": "my_module:Nothing"}),
            "an object without group, is_due, judged, standard, is_behind",
        ),
        (study(scheduler={"kind": "my_module:Raises"}), "it has raised OSError: no such server. Repair it"),
        (
            study(scheduler={"kind": "asha", "options": {"a": 1}}),
            "options={'a': 1}: is a setting of package.module:name",
        ),
        (study(scheduler={"kind": "ashaa"}), "scheduler.kind='ashaa': is no known one. Did you mean 'asha'?"),
        (study(stopping={"functions": {"my_module:rule": {}}}), "called as rule(history): missing a required argument"),
        (study(stopping={"functions": {"nowhere": {}}}), "'nowhere' is no import path, and no package has a plug-in"),
        (study(callbacks={"my_module:Callback": {"x": 1}}), "cannot be called as Callback(x=1): "),
        (study(callbacks={"my_module:Nothing": {}}), "an object without any hook. Give it some of on_study_start"),
        (
            study(run={"dataset": "my_module:data_without_arguments"}),
            "data_without_arguments(config): too many positional",
        ),
        (study(run={"extra_metrics": ["my_module:metric"]}), "its unit and direction are not declared. Decorate it"),
        (study(objective={"metric": "my_module:metric"}), "its unit and direction are not declared. Decorate it"),
        (
            study(objective={"metric": "my_metrics:my_positions"}),
            "the better my_positions is the maximum. Use mode: max",
        ),
    ],
)
def test_a_plugin_that_does_not_fit_is_refused_when_the_study_is_read(
    content: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    write_module(tmp_path, "my_module", MODULE)
    write_module(tmp_path, "my_metrics", METRIC)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as refused:
        load_study(path)
    assert problem in str(refused.value)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)


def test_an_objective_by_import_path_is_measured_and_has_the_name_of_its_function(tmp_path: Path) -> None:
    write_module(tmp_path, "my_metrics", METRIC)
    path = tmp_path / "study.yaml"
    by_path = study(objective={"metric": "my_metrics:my_positions", "mode": "max"})
    run = {"steps": 4, "extra_metrics": ["my_metrics:my_positions"]}
    by_name = study(run=run, objective={"metric": "my_positions", "mode": "max"})
    path.write_text(yaml.safe_dump(by_path))
    first = load_study(path)
    path.write_text(yaml.safe_dump(by_name))
    assert first.spec == load_study(path).spec
    assert first.spec.objective.metric == "my_positions"
    assert {run.evaluation.extra_metrics for run in first.runs} == {("my_metrics:my_positions",)}
    assert METRICS["my_positions"].unit == "tokens"


def test_a_metric_with_a_name_of_ours_is_refused(tmp_path: Path) -> None:
    write_module(tmp_path, "my_metrics", METRIC.replace("my_positions", "ce_loss"))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study(run={"extra_metrics": ["my_metrics:ce_loss"]})))
    with pytest.raises(ConfigError, match=r"'ce_loss': this name is taken. Give yours another one"):
        load_study(tmp_path / "study.yaml")


def test_a_metric_of_completions_does_not_compare_across_temperatures(tmp_path: Path) -> None:
    write_module(tmp_path, "my_metrics", METRIC)
    content = optuna() | {"objective": {"metric": "my_metrics:my_positions", "mode": "max"}}
    content["axes"] = {"temperature": [0.6, 1.0]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"my_positions'.* at different temperature measure different"):
        load_study(tmp_path / "study.yaml")


# --- data sets -------------------------------------------------------------------------------------------------

DATA = """
import itertools
from ebft_study.data import Example
calls = itertools.count()

def raw(config): return (Example("", f"text {n} of mine " * 9, str(n)) for n in range(60))
def examples(split): return [Example("q ", f"{split} {n}", str(n)) for n in range(3)]
def split(config): return {split: examples(split) for split in ("train", "validation", "heldout")}
def mixed(config): return [Example("q" if n else "", f"a{n}", "") for n in range(9)]
def strings(config): return ["a", "b"]
def two_splits(config): return {"train": [], "test": []}
def raises(config): raise KeyError("a\\nb")
def changing(config): return [Example("", f"call {next(calls)} text {n} " * 9, str(n)) for n in range(60)]
"""


def test_a_data_set_is_divided_by_content_or_has_splits_of_its_own(tmp_path: Path) -> None:
    write_module(tmp_path, "my_data", DATA)
    plugins.search_in(tmp_path)
    raw = load_text(DataConfig(dataset="my_data:raw", max_examples=10))
    assert not raw.has_answers
    assert len(raw.splits["train"]) == 10
    texts = [{example.answer for example in raw.splits[split]} for split in SPLITS]
    assert all(texts)
    assert not texts[0] & texts[1] | texts[1] & texts[2] | texts[0] & texts[2]
    own = load_text(DataConfig(dataset="my_data:split"))
    assert own.has_answers
    assert {split: {e.answer for e in own.splits[split]} for split in SPLITS} == {
        split: {f"{split} {n}" for n in range(3)} for split in SPLITS
    }


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"dataset": "my_data:mixed"}, "8 of 9 examples have a prompt"),
        ({"dataset": "my_data:strings"}, "has returned no examples. Return ebft_study.data.Example objects"),
        ({"dataset": "my_data:two_splits"}, "has the splits train, test. Return train, validation, heldout"),
        ({"dataset": "my_data:raises"}, "it has raised KeyError: 'a"),
        ({"dataset": "my_data:raw", "text_column": "text"}, "text_column='text' is for files and the hub. Remove it"),
    ],
)
def test_a_data_set_that_breaks_its_contract_is_refused(settings: dict[str, Any], problem: str, tmp_path: Path) -> None:
    write_module(tmp_path, "my_data", DATA)
    plugins.search_in(tmp_path)
    with pytest.raises(EbftError) as refused:
        load_text(DataConfig(**settings))
    assert problem in str(refused.value)
    assert "\n" not in str(refused.value)


# --- records ---------------------------------------------------------------------------------------------------


def settings(run: RunConfig) -> dict[str, Any]:
    return run.model_dump(mode="json", exclude={"name", "seed"})


def test_a_changed_plugin_is_refused_as_changed_data_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "run_session", lambda *_: "stopped")
    monkeypatch.setattr(runner, "_report", lambda *_: None)
    code, at = tmp_path / "code", set(sys.modules)
    code.mkdir()
    write_module(code, "my_metrics", METRIC)
    write_module(code, "my_module", MODULE)
    run = settings(tiny_config(tmp_path, extra_metrics=["my_metrics:my_positions"]))
    content = study(run=run) | {"callbacks": {"my_module:Callback": {"where": "x"}}, "axes": {}}
    (code / "study.yaml").write_text(yaml.safe_dump(content))
    runner.run(load_study(code / "study.yaml"), storage=tmp_path, console=Console())
    record = yaml.safe_load((tmp_path / "s" / "study.yaml").read_text())["provenance"]["plugins"]
    assert record["my_metrics:my_positions"]["folder"] == str(code)
    assert record["my_metrics:my_positions"]["metric"]["direction"] == "max"

    forget(at)
    write_module(code, "my_module", MODULE + "\n")  # a callback changes no result
    runner.resume(tmp_path / "s", console=Console())  # finds the folder again
    forget(at)
    write_module(code, "my_metrics", METRIC.replace("float()", "double()"))
    with pytest.raises(ResultsError, match=r"plugins my_metrics:my_positions: \w{8} -> \w{8}: the study began with"):
        runner.resume(tmp_path / "s", console=Console())
    runner.resume(tmp_path / "s", console=Console(), accept_changes=True)
    runner.resume(tmp_path / "s", console=Console())


def test_a_data_set_that_is_another_one_each_time_is_refused(tmp_path: Path) -> None:
    write_module(tmp_path, "my_data", DATA)
    plugins.search_in(tmp_path)
    run = tiny_config(tmp_path, dataset="my_data:changing", text_column=None)
    from ebft_study.training.prepare import prepare

    with pytest.raises(DataError, match="my_data:changing': returns other examples each time"):
        prepare([run])


def test_what_reads_a_study_imports_no_plugin_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, at = tmp_path / "code", set(sys.modules)
    code.mkdir()
    write_module(code, "my_metrics", METRIC)
    run = tiny_config(tmp_path, extra_metrics=["my_metrics:my_positions"], steps=2)
    (code / "run.yaml").write_text("")
    source, folder = StudySource(str(code / "run.yaml")), tmp_path / "out"
    single_run.run_single(run, source, folder=folder, resume=False, console=Console())
    curve = results.load(folder).metrics.set_index("step")["my_positions"].dropna()
    assert len(curve) == 2

    forget(at)
    write_module(code, "my_metrics", "raise SystemExit('was imported')\n")
    monkeypatch.syspath_prepend(code)
    status.show(folder, Console())
    forget(at)
    page = ebft.write_report(folder)
    assert "my_positions" in Path(str(page)).read_text()
    forget(at)
    archive = ebft.bundle(folder, tmp_path / "s.zip")
    forget(at)
    ebft.check_bundle(archive)
    assert ebft.read_results(folder).metrics["my_positions"].notna().any()
    assert METRICS["my_positions"].direction == "max"
    ebft.catalog(tmp_path)
    assert "my_metrics" not in sys.modules


@pytest.mark.parametrize(
    "damage",
    [{"direction": "up"}, {"unit": 3}, {"further": 1}, {"comparable_within": [[]]}, {"comparable_within": 3}],
)
def test_a_damaged_record_of_a_metric_is_a_problem_and_no_error(damage: dict[str, Any], tmp_path: Path) -> None:
    declared = {"unit": "", "description": "", "direction": "min", "comparable_within": []}
    for path, metric in (("my_module:f", declared | damage), ("my_module:ce_loss", declared), ("a:<b>", declared)):
        record = {"provenance": {"plugins": {path: {"metric": metric}}}}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(record))
        assert any("metric of" in problem for problem in results.load(tmp_path).problems)
    assert not {"f", "<b>"} & METRICS.keys()
    assert not METRICS["ce_loss"].plugin


@pytest.mark.parametrize("name", [-1, None, 0.5, ["a:b"], "plain", "a.b", ":x", "x:"])
def test_what_is_no_text_with_a_colon_is_no_import_path(name: object) -> None:
    assert not plugins.is_path(name)
