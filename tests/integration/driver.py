"""The command line with the fake training loop in place of the real one; run as a process of its own."""

from __future__ import annotations

import sys
import types

import fake_training

from ebft_study.training import worker

worker.TRAIN = "fake_training:train"
sys.modules["ebft_study.training.prepare"] = types.ModuleType("ebft_study.training.prepare")
sys.modules["ebft_study.training.prepare"].prepare = fake_training.prepare  # type: ignore[attr-defined]

if __name__ == "__main__":
    from ebft_study.cli import main

    main()
