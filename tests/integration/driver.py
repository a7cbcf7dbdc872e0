"""The command line with the fake training loop in place of the real one; run as a process of its own."""

from __future__ import annotations

import sys
import types

import fake_training

from ebft_study.training import recorded

recorded.LOOP = "fake_training:train"
# In place of the real module, whose import alone takes seconds.
preparing = types.ModuleType("ebft_study.training.prepare")
preparing.prepare = fake_training.prepare  # type: ignore[attr-defined]
sys.modules[preparing.__name__] = preparing

if __name__ == "__main__":
    from ebft_study.__main__ import main

    main()
