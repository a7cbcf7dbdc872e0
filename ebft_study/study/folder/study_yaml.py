"""`study.yaml` in a study's folder: the spec, its source, versions and provenance; comparing it with a file.

A hidden copy replaces a `study.yaml` that is missing or unreadable, and shows the changes made since the study began.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ebft_study.errors import ConfigError, ResultsError
from ebft_study.results import copies
from ebft_study.results.copies import read_mapping
from ebft_study.results.record import unreadable_parts
from ebft_study.storage import Location, storage_path
from ebft_study.study.spec import normalize
from ebft_study.study.spec.study_spec import StudySpec

NAME = "study.yaml"
INPUTS = ("data", "models", "benchmarks", "plugins")
"""Parts of the provenance whose hashes say whether two sessions see the same."""
PACKAGES = ("ebft-study", "torch", "ray", "transformers", "optuna", "tokenizers", "numpy", "pandas", "pyarrow")


@dataclass(frozen=True)
class StudySource:
    """The file that a study was read from, or the mapping that replaces it."""

    name: str
    """Name in error messages: a path."""
    sha256: str = ""
    profile: str | None = None

    @classmethod
    def from_content(cls, name: str, content: bytes, profile: str | None = None) -> StudySource:
        return cls(name, hashlib.sha256(content).hexdigest(), profile)


def write(folder: Location, spec: StudySpec, source: StudySource, *, provenance: Mapping[str, Any]) -> None:
    """Write study.yaml, complete or not at all; an existing study keeps the time of its creation."""
    before = _content_if_any(folder)
    new = {
        **normalize.dump(spec),
        "profile": source.profile,
        "created_at": before.get("created_at", _moment()),
        "file": {"name": Path(source.name).name, "sha256": source.sha256},
        "versions": versions(),
        "git_revision": git_revision(),
        "provenance": _plain(provenance),
    }
    if "former_provenance" in before:
        new["former_provenance"] = before["former_provenance"]
    _write(folder, new)


def changed_inputs(folder: Location, provenance: Mapping[str, Any]) -> list[str]:
    """Inputs that are not those recorded: `data qa: 3f2a04d1 -> 9c11e0b7`; none without record."""
    recorded = _content_if_any(folder).get("provenance") or {}
    return [
        f"{kind} {name}: {then[key][:8]} -> {now[key][:8]}"
        for kind in INPUTS
        for name, now in provenance.get(kind, {}).items()
        for then in [recorded.get(kind, {}).get(name, {})]
        for key in ("fingerprint", "files")
        if key in now and then.get(key, now[key]) != now[key]
    ]


def used_plugins(folder: Location) -> tuple[str | None, dict[str, str]]:
    """Where a study found the plug-ins that Python alone does not find, and their digests by import path."""
    used = (content(folder).get("provenance") or {}).get("plugins") or {}
    where = next((str(entry["folder"]) for entry in used.values() if entry.get("folder")), None)
    return where, {path: entry["fingerprint"] for path, entry in used.items() if "fingerprint" in entry}


def accept_inputs(folder: Location, provenance: Mapping[str, Any]) -> None:
    """Record other data and models of an existing study, and keep what was recorded before."""
    record = content(folder)
    earlier = {"until": _moment(), **(record.get("provenance") or {})}
    former = [*record.get("former_provenance", []), earlier]
    _write(folder, {**record, "provenance": _plain(provenance), "former_provenance": former})


def change_session(folder: Location, spec: StudySpec) -> None:
    """Record what each session of an existing study may set (`StudySpec.with_session_of`); everything else stays."""
    new = normalize.dump(read(folder).with_session_of(spec))
    _write(folder, {**content(folder), **{key: new[key] for key in ("budget", "resources")}})


def change_name(folder: Location, name: str) -> None:
    """Record another name of an existing study, and the first one, by which it draws at random."""
    spec = read(folder)
    first = {"first_name": spec.drawn_by} if spec.drawn_by != name else {}
    record = {key: value for key, value in content(folder).items() if key != "first_name"}
    _write(folder, {**record, "study": name, **first})


def _moment() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _plain(provenance: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(provenance, default=str))


def _write(folder: Location, record: Mapping[str, Any]) -> None:
    text = yaml.safe_dump(dict(record), sort_keys=False, allow_unicode=True, width=110)
    copies.write(storage_path(folder) / NAME, text.encode())


def read(folder: Location) -> StudySpec:
    """The spec of an existing study."""
    return normalize.from_record(content(folder), source=str(storage_path(folder) / NAME))


def content(folder: Location) -> dict[str, Any]:
    """All of study.yaml, or of its copy where it cannot be read."""
    try:
        record, problem = read_mapping(storage_path(folder) / NAME)
    except FileNotFoundError:
        raise ResultsError(
            f"{folder}: holds no {NAME}, so it is not a study. Check the name, or start it with 'study'"
        ) from None
    if record is None:
        raise ConfigError(f"{problem}, and neither can its copy. Restore it")
    for _, where in unreadable_parts(record):
        raise ConfigError(f"{storage_path(folder) / NAME}: {where}. Restore it")
    return record


def _content_if_any(folder: Location) -> dict[str, Any]:
    return content(folder) if copies.either_exists(storage_path(folder) / NAME) else {}


def changes(folder: Location) -> list[str]:
    """Problems with study.yaml, and changes made to it by hand since the study began; comments do not count."""
    path = storage_path(folder) / NAME
    record, problem = read_mapping(path)
    if problem or record is None:
        return [problem]
    saved = copies.read_copy(path)
    if saved is None:
        return []
    before = normalize.from_record(yaml.safe_load(saved), source=str(path))
    return [
        f"{path} was changed since the study began: {line}"
        for line in differences(before, normalize.from_record(record, source=str(path)))
    ]


def differences(old: StudySpec, new: StudySpec) -> list[str]:
    """Keys in which two specs differ, as `run.training.steps: 40 -> 80`."""
    before, after = _flat(normalize.dump(old)), _flat(normalize.dump(new))
    keys = [key for key in {**before, **after} if before.get(key, "absent") != after.get(key, "absent")]
    return [f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}" for key in keys]


def changed_versions(folder: Location) -> list[str]:
    """Packages that are not of the version that the study was started with."""
    then, now = content(folder).get("versions", {}), versions()
    return [f"{name} {then[name]} -> {now.get(name)}" for name in then if then[name] != now.get(name)]


def versions() -> dict[str, str]:
    """Python and the packages that results depend on."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def git_revision() -> str | None:
    """The commit of the checkout that this package runs from, marked where files differ from it."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        tracked = subprocess.run(
            ["git", "-C", str(here), "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() if tracked.returncode == 0 else None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}{key}.").items()}
    return {prefix.removesuffix("."): value}
