"""The benchmark's command line, with nothing that a bare GPU machine may lack.

`ebft-study bench` and `python -m benchmarks` are this one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import benchmarks
from benchmarks.options import Parser, positive
from benchmarks.programs import PROGRAMS
from benchmarks.programs import main as run_program
from benchmarks.settings import MODELS, SECTIONS, Settings
from ebft_study.errors import EbftError

if TYPE_CHECKING:
    from benchmarks.rows import Row

EXAMPLE = "example: ebft-study bench --section step profile --sequence-length 512 --threads 2 --json bench.json"
BESIDES = " ".join(
    f"`ebft-study bench {name}`: {program.description} (--help says more)." for name, program in PROGRAMS.items()
)


def parser() -> argparse.ArgumentParser:
    """All options; those that are settings are named like their fields."""
    description = (benchmarks.__doc__ or "").splitlines()[0]
    made = Parser(prog="ebft-study bench", description=description, epilog=f"{EXAMPLE}. {BESIDES}")
    made.add_argument(
        "--section", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="NAME", help=f"of {', '.join(SECTIONS)}"
    )
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--model", choices=tuple(MODELS), default=Settings.model, help="shape of the random model")
    made.add_argument(
        "--sequence-length",
        type=positive,
        nargs="+",
        dest="sequence_lengths",
        default=Settings.sequence_lengths,
        metavar="T",
        help="lengths for the section step; memory takes the last one, all others the first (512 1024)",
    )
    numbers = {
        "n-samples": "n, completions per context",
        "completion-length": "G, tokens per completion",
        "stride": "s, distance between anchors, and length of the first context",
        "batch-size": "sequences per step",
        "micro-batch-size": "sequences at a time in our step; the naive one takes one, n times over",
        "anchors-at-once": "anchors at a time in our step",
        "repeats": "timed rounds, after one to warm up",
        "threads": "of a CPU; default: PyTorch's choice",
    }
    for name, text in numbers.items():
        default = getattr(Settings, name.replace("-", "_"))
        text += "" if default is None else f" ({default})"
        made.add_argument(f"--{name}", type=positive, default=default, metavar="N", help=text)
    made.add_argument(
        "--naive-attention",
        choices=("sdpa", "eager"),
        default=Settings.naive_attention,
        help="of the naive side: fused, or matrices of probabilities as in the published code (sdpa)",
    )
    made.add_argument("--precision", choices=("float32", "bfloat16"), default=Settings.precision, help="of activations")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    made.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the step and its growth")
    return made


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings among the options."""
    chosen: dict[str, Any] = {f.name: getattr(options, f.name) for f in fields(Settings) if f.name in options}
    return Settings(**{**chosen, "sequence_lengths": tuple(chosen["sequence_lengths"])})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit code: 1 if the two sides disagree or a section could not be run.

    Args:
        arguments: the process's own by default. The first one may name another of the `PROGRAMS`.

    Raises:
        EbftError: options or settings that cannot be measured.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given and given[0] in PROGRAMS:
        return run_program(given[0], given[1:])
    options = parser().parse_args(given)
    rows: list[Row] = []

    def report(section: str, own: list[Row]) -> None:
        from benchmarks import output

        rows.extend(own)
        output.show(section, own)
        if options.json:
            output.write_json(rows, options.json)

    benchmarks.run(settings_of(options), options.section, report=report)
    if options.plot:
        from benchmarks import figure

        figure.draw(rows, options.plot)
    return 1 if any(row.failed for row in rows) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except EbftError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
