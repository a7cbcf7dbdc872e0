"""The notebooks: executed in kernels on studies of known answers, and in this process on studies that have none."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from ebft_study.analysis.summary import StudySummary, summarize
from ebft_study.errors import ResultsError
from ebft_study.report import answers
from ebft_study.report.notebooks import answer, execute, page
from ebft_study.results import load
from tests import notebooks
from tests.notebooks import FOLDER, MADE_UP, NOTEBOOKS, default_study
from tests.synthetic_study import PAPER_LIKE, write_study

ANSWERS: dict[str, Callable[[StudySummary], str]] = {
    "01_reading_results": answers.reading,
    "02_alpha_gamma": answers.alpha_gamma,
    "03_feature_matching_by_length": answers.by_length,
    "04_feature_networks": answers.feature_networks,
    "05_methods": answers.methods,
    "06_scaling": answers.scaling_laws,
    "07_search_and_early_stopping": answers.search,
    "08_paper_tables": answers.paper_tables,
}
INTERACTIVE = ("01", "02", "04", "05", "07")


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The study of each notebook."""
    root = tmp_path_factory.mktemp("studies")
    made = {make: make(root / make.__name__) for make in dict.fromkeys(MADE_UP.values())}
    return {name: made[make] for name, make in MADE_UP.items()}


def test_there_is_a_notebook_for_each_question() -> None:
    assert [path.stem for path in NOTEBOOKS] == list(MADE_UP) == list(ANSWERS)
    index = (FOLDER / "README.md").read_text()
    assert all(f"]({path.name})" in index for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs_from_question_to_answer(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    cells = content["cells"]
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in cells}) == len(cells)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert re.match(r"# .*\?\n", "".join(cells[0]["source"]))
    assert f"answers.{ANSWERS[path.stem].__name__}(study)" in "".join(cells[-1]["source"])
    assert (FOLDER.parent / "search_spaces" / f"{default_study(path)}.yaml").exists()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_figures_and_the_answer(path: Path, made_up: dict[str, Path]) -> None:
    node = execute(path, made_up[path.stem])
    nbformat.validate(node)
    outputs = [output for cell in node.cells if cell.cell_type == "code" for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"display_data", "execute_result"}
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.data]
    assert pictures
    assert all(len(picture) > 5_000 for picture in pictures)
    assert not any("<Figure" in str(output.data) for output in outputs)
    hovered = [output.data["text/html"] for output in outputs if "vegaEmbed" in output.data.get("text/html", "")]
    assert bool(hovered) == path.name.startswith(INTERACTIVE)
    found = answer(node)
    assert found.strip() == ANSWERS[path.stem](summarize(load(made_up[path.stem]))).strip()
    assert "cannot answer" not in found
    html = page(node, path.stem)
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//|@import|url\(http""", _without_library(html))
    assert len(re.findall(r"<img ", html)) >= len(pictures)
    assert "&lt;without&gt;" in html


def _without_library(html: str) -> str:
    return re.sub(r"<script>if \(!window\.vegaEmbed\).*?</script>", "", html, flags=re.DOTALL)


@pytest.mark.parametrize("trials", ["pending", "failed", "one"])
def test_a_notebook_says_what_a_study_lacks(
    trials: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cells run in this process, where what is shown is printed as text."""
    effects = {(1.0, 0.0): PAPER_LIKE[1.0, 0.0], (1.0, 0.1): PAPER_LIKE[1.0, 0.1]}
    statuses = {} if trials == "one" else {(key, 0): trials for key in effects}
    chosen = {(1.0, 0.0): (0.0, 0.0)} if trials == "one" else effects
    write_study(tmp_path / "study", effects=chosen, statuses=statuses, seeds=(0,))
    monkeypatch.setenv("EBFT_STUDY", str(tmp_path / "study"))
    shown: list[Any] = []
    monkeypatch.setattr("IPython.display.display", lambda value, **options: shown.append(value))
    lacking = []
    for path in NOTEBOOKS:
        names: dict[str, Any] = {}
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
        if shown[-1].data.startswith("This study cannot answer it: "):
            lacking.append(path.stem[:2])
    # One trial is a study with a best configuration, but without comparisons.
    assert lacking == (
        ["02", "03", "04", "05", "06", "08"] if trials == "one" else [path.stem[:2] for path in NOTEBOOKS]
    )


def test_a_notebook_of_no_study_is_refused_before_a_kernel_starts(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="neither a study's folder nor the name of one"):
        execute(NOTEBOOKS[0], tmp_path / "none")


def test_a_cell_that_fails_is_named(tmp_path: Path, made_up: dict[str, Path]) -> None:
    node = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("import os\nraise ValueError(os.environ['EBFT_STUDY'])")]
    )
    nbformat.write(node, tmp_path / "broken.ipynb")
    study = made_up["01_reading_results"]
    with pytest.raises(ResultsError, match=rf"broken\.ipynb: a cell failed on {study}: ValueError: {study}"):
        execute(tmp_path / "broken.ipynb", study)


def test_a_missing_package_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nbclient", None)
    with pytest.raises(ResultsError, match=r"needs the package nbclient.*pip install 'ebft-study\[dev\]'"):
        execute(NOTEBOOKS[0], "study")


def test_the_command_writes_pages_of_every_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one notebook, whose own study is there, another is, or none is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(notebooks, "NOTEBOOKS", [FOLDER / "06_scaling.ipynb"])
    monkeypatch.setattr("sys.argv", ["notebooks", "nowhere"])
    assert notebooks.main() == 2
    assert "nowhere: is neither" in capsys.readouterr().err
    used = list[str]()
    monkeypatch.setattr(notebooks, "_write", lambda notebook, study, out: used.append(Path(str(study)).name))
    monkeypatch.setattr("sys.argv", ["notebooks"])
    assert notebooks.main() == 0
    write_study(
        tmp_path / "studies" / default_study(FOLDER / "06_scaling.ipynb"), effects={None: (0.0, 0.0)}, seeds=(0,)
    )
    assert notebooks.main() == 0
    write_study(tmp_path / "studies" / "other", effects={None: (0.0, 0.0)}, seeds=(0,))
    monkeypatch.setattr("sys.argv", ["notebooks", "other"])
    assert notebooks.main() == 0
    assert used == ["made_up_scaling", default_study(FOLDER / "06_scaling.ipynb"), "other"]
