"""What a session does when it is asked to stop."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ebft_study.errors import StorageError
from ebft_study.results import Fence
from ebft_study.storage import LocalPath
from ebft_study.study.driver import session
from ebft_study.study.folder.history import History
from ebft_study.study.folder.lock import LockHandle
from tests.studies import resolved


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "Ctrl-C (terminated)")], ids=["int", "term"]
)
def test_the_first_signal_is_a_wish_and_the_next_ctrl_c_ends_the_process(number: int, reason: str) -> None:
    before, wishes = signal.getsignal(number), list[str]()
    with session._signals(wishes.append):
        os.kill(os.getpid(), number)
        assert wishes == [reason]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(number) is before


def test_inner_handlers_give_way_to_the_outer_ones() -> None:
    outer, inner = list[str](), list[str]()
    with session._signals(outer.append):
        with session._signals(inner.append):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert (inner, outer) == (["Ctrl-C (terminated)"], ["Ctrl-C (terminated)"])


@pytest.mark.parametrize("behind", [StorageError("metrics: cannot be written (No space left on device)"), ValueError()])
def test_storage_that_fails_inside_tune_ends_the_session_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: Exception
) -> None:
    """Tune gives an error of its own for that of a callback, with the traceback for a message."""

    def tune(*_: object) -> None:
        try:
            raise behind
        except Exception:
            raise RuntimeError("Traceback of everything")  # noqa: B904 (as Tune does)

    monkeypatch.setattr(session, "_tune", tune)
    study = resolved({"study": "s", "question": "?", "run": {"steps": 1}})
    handle = LockHandle(Fence(LocalPath(tmp_path)))
    arguments: Any = (LocalPath(tmp_path), study, History({}, {}, {}), Console(file=io.StringIO()), handle)
    if isinstance(behind, StorageError):
        assert session.run_session(*arguments) == f"the study's storage failed: {behind}"
    else:
        with pytest.raises(RuntimeError):
            session.run_session(*arguments)
