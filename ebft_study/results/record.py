"""The types of those parts of study.yaml that are read as they are: reports and notes must not stumble over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict


class _Inputs(TypedDict, total=False):
    fingerprint: str | None
    files: str | None


class _Plugin(_Inputs, total=False):
    folder: str | None


class _Provenance(TypedDict, total=False):
    data: dict[str, _Inputs]
    models: dict[str, _Inputs]
    benchmarks: dict[str, _Inputs]
    plugins: dict[str, _Plugin]


class _Resources(TypedDict, total=False):
    workers_per_trial: int
    cpus_per_worker: float
    gpus_per_worker: float


class _Told(TypedDict):
    study: str
    points: list[Any]


_PARTS: Mapping[str, TypeAdapter[Any]] = {
    "provenance": TypeAdapter(_Provenance | None),
    "former_provenance": TypeAdapter(list[dict[str, Any]]),
    "versions": TypeAdapter(dict[str, str | None]),
    "resources": TypeAdapter(_Resources),
    "warm_start": TypeAdapter(list[_Told] | None),
}


def unreadable_parts(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys of study.yaml whose content is of another type than ever written, and where."""
    for key, expected in _PARTS.items():
        if key not in record:
            continue
        try:
            expected.validate_python(record[key])
        except ValidationError as error:
            first = error.errors()[0]
            yield key, f"{'.'.join(map(str, (key, *first['loc'])))}: {first['msg']}"
