"""The command line with the fake training loop in place of the real one; run as a process of its own."""

from __future__ import annotations

import sys
import types

import fake_training

from ebft_study.training import recorded

recorded.LOOP = "fake_training:train"
# In place of the real modules, whose import alone takes seconds.
for name, stands_for in (("training.prepare", "prepare"), ("networks.loading", "read_config")):
    module = types.ModuleType(f"ebft_study.{name}")
    setattr(module, stands_for, getattr(fake_training, stands_for))
    sys.modules[module.__name__] = module

if __name__ == "__main__":
    from ebft_study.__main__ import main

    main()
