"""Run `ebft-study bench`."""

import sys

from ebft_study.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    main()
