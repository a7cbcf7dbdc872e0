"""Every mutation of `mutants.yaml` still applies to the tree; `make mutants` tries them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants import ROOT, Mutant, read_mutants


@pytest.mark.parametrize("mutant", read_mutants(), ids=str)
def test_a_mutation_applies_and_compiles_and_its_tests_exist(mutant: Mutant) -> None:
    mutated = mutant.mutated(ROOT)
    compile(mutated, mutant.file, "exec")
    assert mutated != (ROOT / mutant.file).read_text()
    for test in mutant.tests:
        path, _, name = test.partition("::")
        assert (ROOT / path).exists(), test
        assert not name or f"def {name}(" in (ROOT / path).read_text(), test


def test_a_text_that_does_not_occur_once_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("a = 1\nb = 1\n")
    for text in ("1", "c"):
        with pytest.raises(ValueError, match="not once"):
            Mutant("module.py", text, "2", ()).mutated(tmp_path)
