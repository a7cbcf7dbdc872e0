"""The analysis notebook: valid, without stored outputs, and its code runs on a study."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from tests.synthetic_study import PAPER_LIKE, write_study

NOTEBOOK = Path(__file__).parents[2] / "analysis" / "study.ipynb"


def test_the_notebook_stores_no_outputs() -> None:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    for cell in content["cells"]:
        assert cell["cell_type"] in ("code", "markdown")
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(tmp_path / "studies" / "quickstart", effects={k: PAPER_LIKE[k] for k in ((1.0, 0.0), None)})
    monkeypatch.chdir(tmp_path)
    shown: list[object] = []
    display = types.ModuleType("IPython.display")
    display.display = shown.append  # type: ignore[attr-defined]
    ipython = types.ModuleType("IPython")
    ipython.version_info = (9, 0)  # type: ignore[attr-defined]  # the first figure of a process asks
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    names: dict[str, object] = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert len(shown) >= 4
    assert "EBFT (α=1) lowers" in capsys.readouterr().out
