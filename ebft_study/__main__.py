"""`python -m ebft_study` is the command line."""

from ebft_study.cli import main

main()
