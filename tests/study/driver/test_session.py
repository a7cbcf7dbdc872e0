"""What a session does when it is asked to stop."""

from __future__ import annotations

import os
import signal

import pytest

from ebft_study.study.driver import session


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
