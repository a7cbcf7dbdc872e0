"""Asking Ray actors: by name, with a time limit, and with errors that say what happened."""

from __future__ import annotations

import time
from typing import Any

import ray

from ebft_study.errors import EbftError, ServiceError

_POLL_SECONDS = 0.2


def find(name: str, *, seconds: float) -> Any:
    """The actor of that name in this study; waits for another process to start it.

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
    """Until an actor with a method `process_id` answers: one that was killed is started again in the meantime.

    Raises:
        ServiceError: it does not within `seconds`, or is gone for good.
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
    """What an actor's call returns.

    Args:
        who: the actor, for people. setting: what allows it more than `seconds`, if anything does.

    Raises:
        ServiceError: the actor is gone, or silent for `seconds`.
        EbftError: what the actor wants a person to mend.
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
