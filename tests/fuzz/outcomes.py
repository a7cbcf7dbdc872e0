"""What inputs lead to, counted: a right answer, or an error of one line. Anything else fails."""

from __future__ import annotations

import contextlib
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import pytest
from hypothesis import settings

from ebft_study.errors import EbftError
from ebft_study.terminal import one_line, printable

T = TypeVar("T")
MOST_SECONDS, MOST_BYTES = 20.0, 2 * 2**30
"""Of one input: seconds of processor time, and growth of the process."""
INPUTS: Counter[str] = Counter()
FAILURES = Counter({"tracebacks": 0, "hangs": 0, "over_memory": 0, "silently_wrong": 0})


def inputs(number: int) -> settings:
    """As many inputs with the profile `fuzz`, and some of them in every run of the tests."""
    return settings(max_examples=max(number * settings.default.max_examples // 100, 1))


class HangError(BaseException):
    """An input that takes far too long."""


def answer(kind: str, ask: Callable[[], T]) -> tuple[T | None, str]:
    """What `ask` returns, or the line of its error."""
    INPUTS[kind] += 1
    before = _peak_bytes()
    try:
        with _limited():
            return ask(), ""
    except EbftError as error:
        line = one_line(str(error))
        if "\n" in line or line != printable(line) or len(line) > 2010 or error.exit_code != 2:
            FAILURES["tracebacks"] += 1
            pytest.fail(f"not one line: {error}")
        return None, line
    except HangError:
        FAILURES["hangs"] += 1
        raise
    except MemoryError:
        FAILURES["over_memory"] += 1
        raise
    except Exception:
        FAILURES["tracebacks"] += 1
        raise
    finally:
        if _peak_bytes() - before > MOST_BYTES:
            FAILURES["over_memory"] += 1
            pytest.fail("takes more memory than an input may")


def check(is_right: bool, what: str) -> None:
    """Fail where an answer is wrong and nothing says so."""
    if not is_right:
        FAILURES["silently_wrong"] += 1
        pytest.fail(what)


def places(node: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything in nested mappings and lists."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in inner:
        yield (*above, key)
        yield from places(child, (*above, key))


def flip(path: Path, draw: Random, *, most: int = 4) -> None:
    """Flip a few bits of a file."""
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 1, most]) if content else 0):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, draw: Random) -> None:
    """Cut off the end of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))] if content else b"")


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Context that ends with an error after `MOST_SECONDS` of processor time, or on an idle wait of minutes."""

    def end(number: int, frame: Any) -> None:
        raise HangError

    timers = {
        signal.ITIMER_PROF: (signal.SIGPROF, MOST_SECONDS),
        signal.ITIMER_REAL: (signal.SIGALRM, 15 * MOST_SECONDS),
    }
    before = {number: signal.signal(number, end) for number, _ in timers.values()}
    for timer, (_, seconds) in timers.items():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _peak_bytes() -> int:
    """The most memory that this process has ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
