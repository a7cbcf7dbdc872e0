"""Calls of Ray actors: found by name, with a time limit, and with errors that name the cause."""

from __future__ import annotations

import time
from typing import Any

import ray

from ebft_study.errors import EbftError, ServiceError

_POLL_SECONDS = 0.2


def find(name: str, *, seconds: float) -> Any:
    """Return the actor of that name in this study; waits for another process to start it.

    Raises:
        ServiceError: there is none after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return ray.get_actor(name)
        except ValueError:
            if time.monotonic() > deadline:
                raise ServiceError(f"{name}: not found after {seconds:.0f} seconds") from None
            time.sleep(_POLL_SECONDS)


def wait_for(handle: Any, *, who: str, seconds: float) -> None:
    """Wait until an actor with a method `process_id` answers, while Ray restarts a killed one.

    Raises:
        ServiceError: it does not answer within `seconds`, or has ended for good.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            ray.get(handle.process_id.remote(), timeout=seconds)
            return
        except ray.exceptions.ActorUnavailableError:
            if time.monotonic() > deadline:
                raise ServiceError(f"{who} did not come back within {seconds:.0f} seconds") from None
            time.sleep(_POLL_SECONDS)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError) as error:
            raise ServiceError(f"{who} is gone ({type(error).__name__})") from None


def answer(reference: Any, *, who: str, seconds: float, setting: str = "") -> Any:
    """Return the result of an actor's call.

    Args:
        who: the actor, for messages. setting: the setting that allows more than `seconds`, if there is one.

    Raises:
        ServiceError: the actor is gone, or silent for `seconds`.
        EbftError: the error that the actor reports to the user.
    """
    try:
        return ray.get(reference, timeout=seconds)
    except ray.exceptions.GetTimeoutError:
        more = f"; raise {setting} if it only needs more time" if setting else ""
        raise ServiceError(f"{who} did not answer within {seconds:.0f} seconds{more}") from None
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, EbftError | ServiceError):
            raise error.cause from None
        raise
    except ray.exceptions.RayActorError as error:
        reason = str(error).strip().splitlines()[0].strip(" .:")
        raise ServiceError(f"{who} is gone ({reason})") from None
