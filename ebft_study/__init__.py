"""Hyperparameter and scaling studies of Energy-Based Fine-Tuning (EBFT) of language models. Start with `api`."""

from ebft_study.api import (
    bundle,
    catalog,
    check_bundle,
    compare,
    extend,
    load,
    plan,
    read_results,
    replay,
    resume,
    run,
    tables,
    train,
    write_report,
)

__version__ = "0.2.0"
__all__ = [
    "bundle",
    "catalog",
    "check_bundle",
    "compare",
    "extend",
    "load",
    "plan",
    "read_results",
    "replay",
    "resume",
    "run",
    "tables",
    "train",
    "write_report",
]
