"""The command line with the fake training loop in place of the real one; run as a process of its own."""

from __future__ import annotations

import fake_training

from ebft_study.training import prepare, recorded

recorded.LOOP = "fake_training:train"
prepare.prepare = fake_training.prepare

if __name__ == "__main__":
    from ebft_study.cli import main

    main()
