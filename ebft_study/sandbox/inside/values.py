"""Values as plain data between the process of a program and the process that judges it.

Numbers, texts and containers travel as JSON, with a tag where JSON lacks the type; no pickle. Any other object stays
where it is, and the other side gets its number. Subclasses travel as their plain base, so that no method of the
program's ever reaches the judge.
"""

from __future__ import annotations

import collections
import decimal
import fractions
import json
import socket
import struct
from collections.abc import Callable, Iterable
from typing import Any

MESSAGE_BYTES = 4 << 20
"""Longest message, in either direction."""
TOTAL_BYTES = 64 << 20
"""Most that one side reads from the other in all."""
DEPTH = 60
ITERATOR_ITEMS = 10_000

CONTAINERS: list[tuple[str, Any]] = [("l", list), ("t", tuple), ("s", set), ("z", frozenset), ("q", collections.deque)]
NUMBERS: dict[str, Any] = {"Decimal": decimal.Decimal, "Fraction": fractions.Fraction}
TYPES: list[Any] = [int, float, complex, bool, str, bytes, list, tuple, dict, set, frozenset, range, object]
VIEWS: tuple[Any, ...] = (type({}.keys()), type({}.values()), type({}.items()))

Data = Any
"""What `json` reads and writes."""


def pack(value: Any, keep: Callable[[object], int | str], depth: int = 0) -> Data:
    """Make data of a value. `keep` stores an object without a plain form and returns its number or name."""
    if depth > DEPTH:
        raise ValueError("the value is nested too deeply")
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        plain = int.__add__(value, 0)
        return plain if -(2**53) < plain < 2**53 else ["i", hex(plain)]
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return ["f", float.hex(value)]
    if isinstance(value, complex):
        return ["c", float.hex(value.real), float.hex(value.imag)]
    if isinstance(value, (bytes, bytearray)):
        return ["b" if isinstance(value, bytes) else "B", bytes(value).hex()]
    if isinstance(value, range):
        return ["r", value.start, value.stop, value.step]
    if isinstance(value, dict):
        return ["d", [[pack(key, keep, depth + 1), pack(item, keep, depth + 1)] for key, item in dict.items(value)]]
    for tag, kind in CONTAINERS:
        if isinstance(value, kind):
            return [tag, [pack(item, keep, depth + 1) for item in kind.__iter__(value)]]
    if isinstance(value, type) and value in TYPES:
        return ["T", TYPES.index(value)]
    name = type(value).__name__
    if type(value) is NUMBERS.get(name):
        return ["n", name, str(value)]
    if hasattr(type(value), "__next__") or isinstance(value, VIEWS):
        items = []
        for item in value:
            items.append(pack(item, keep, depth + 1))
            if len(items) > ITERATOR_ITEMS:
                raise ValueError("the iterator is too long")
        return ["g" if hasattr(type(value), "__next__") else "l", items]
    return ["h", keep(value)]


def unpack(data: Data, kept: Callable[[int | str], Any], depth: int = 0) -> Any:
    """Rebuild a value; `kept` gives the object of a number or name. Raises some `Exception` for malformed data."""
    if depth > DEPTH + 1:
        raise ValueError("the value is nested too deeply")
    if data is None or isinstance(data, (bool, int, str)):
        return data

    def items(column: Iterable[Data]) -> list:
        return [unpack(item, kept, depth + 1) for item in column]

    tag, *rest = data
    for container_tag, kind in CONTAINERS:
        if tag == container_tag:
            return kind(items(rest[0]))
    match tag:
        case "d":
            return {unpack(key, kept, depth + 1): unpack(item, kept, depth + 1) for key, item in rest[0]}
        case "f":
            return float.fromhex(rest[0])
        case "i":
            return int(rest[0], 16)
        case "c":
            return complex(float.fromhex(rest[0]), float.fromhex(rest[1]))
        case "b":
            return bytes.fromhex(rest[0])
        case "B":
            return bytearray.fromhex(rest[0])
        case "r":
            return range(*rest)
        case "g":
            return iter(items(rest[0]))
        case "n":
            return NUMBERS[rest[0]](str(rest[1]))
        case "T":
            return TYPES[rest[0]]
        case "h":
            return kept(rest[0])
    raise ValueError("malformed value")


class Channel:
    """Messages over a socket: four bytes of length, then JSON."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.bytes_left = connection, TOTAL_BYTES

    def send(self, message: Data) -> None:
        body = json.dumps(message, separators=(",", ":")).encode()
        if len(body) > MESSAGE_BYTES:
            raise ValueError("the value is too large")
        self.connection.sendall(struct.pack(">I", len(body)) + body)

    def receive(self) -> Data:
        """Raises `EOFError`, `OSError` or `ValueError` where no whole message comes."""
        (length,) = struct.unpack(">I", self._exactly(4))
        self.bytes_left -= length
        if length > MESSAGE_BYTES or self.bytes_left < 0:
            raise ValueError("the value is too large")
        return json.loads(self._exactly(length))

    def _exactly(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = self.connection.recv(min(count - len(parts), 1 << 16))
            if not part:
                raise EOFError("the other side is gone")
            parts += part
        return bytes(parts)
