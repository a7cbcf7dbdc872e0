"""The types of those parts of study.yaml that are read as they are: reports and notes must not stumble over them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

if TYPE_CHECKING:
    from pydantic import TypeAdapter


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


_PARTS: dict[str, Any] = {
    "provenance": _Provenance | None,
    "former_provenance": list[dict[str, Any]],
    "versions": dict[str, str | None],
    "resources": _Resources,
    "warm_start": list[_Told] | None,
}


@functools.cache
def _expected() -> dict[str, TypeAdapter[Any]]:
    from pydantic import TypeAdapter  # which the benchmarks on a bare machine do without

    return {key: TypeAdapter(expected) for key, expected in _PARTS.items()}


def unreadable_parts(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys of study.yaml whose content is of another type than ever written, and where."""
    from pydantic import ValidationError

    for key, expected in _expected().items():
        if key not in record:
            continue
        try:
            expected.validate_python(record[key])
        except ValidationError as error:
            first = error.errors()[0]
            yield key, f"{'.'.join(map(str, (key, *first['loc'])))}: {first['msg']}"
