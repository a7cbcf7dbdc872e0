"""Whether the Hugging Face hub answers."""

from __future__ import annotations

import functools
import os
import sys
import urllib.error
import urllib.request

OFFLINE = "HF_HUB_OFFLINE"
SECONDS = 5.0


def settle() -> None:
    """Make libraries use what they have cached where the hub does not answer, here and in processes started from here.

    They would ask again and again for half a minute, for every file. Asks once per process.
    """
    if os.environ.get(OFFLINE) is None and not answers():
        os.environ[OFFLINE] = "1"
        # Each library reads the variable when it is imported.
        for name in ("huggingface_hub.constants", "datasets.config"):
            if name in sys.modules:
                setattr(sys.modules[name], OFFLINE, True)


def answers() -> bool:
    """Whether it does, or its mirror at HF_ENDPOINT."""
    return _answers(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))


@functools.cache
def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=SECONDS):
            return True
    except urllib.error.HTTPError:  # an answer, if not a page
        return True
    except (OSError, ValueError):
        return False
