"""The benchmarks that need Ray: their options, and how they are run. Nothing heavy is imported before they are.

ebft-study bench rollouts     `engines.py`
ebft-study bench features     `services.py`
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.options import Parser, fraction, positive
from benchmarks.settings import MODELS, Settings
from ebft_study.errors import ServiceError

if TYPE_CHECKING:
    from benchmarks.rows import Row

Sections = Iterator["tuple[str, list[Row]]"]


@dataclass(frozen=True)
class Program:
    """One benchmark with options of its own."""

    description: str
    add_options: Callable[[argparse.ArgumentParser], None]
    sections: Callable[[argparse.Namespace], Sections]
    """Titles and rows, as soon as they are there."""
    conclude: Callable[[Sequence[Row]], str]
    """What all rows together say; empty for nothing."""


def main(name: str, arguments: Sequence[str]) -> int:
    """Measure, print, write; returns 1 if what is compared differs, or an engine or a service is lost on the way.

    Raises:
        EbftError: options that cannot be measured, or something that is not installed.
    """
    program = PROGRAMS[name]
    options = _parser(name, program).parse_args(arguments)
    from benchmarks import output

    rows: list[Row] = []
    for title, own in _until_lost(name, program.sections(options)):
        rows += own
        output.show(title, own)
        if options.json:
            output.write_json(rows, options.json)
    conclusion = program.conclude(rows)
    if conclusion:
        print(conclusion)
    return 1 if any(row.failed for row in rows) else 0


def _until_lost(name: str, sections: Sections) -> Sections:
    from benchmarks.rows import Row

    try:
        yield from sections
    except ServiceError as error:
        yield name, [Row(f"{name}/failed", " ".join(str(error).split())[:300], failed=True)]


def _parser(name: str, program: Program) -> Parser:
    made = Parser(prog=f"ebft-study bench {name}", description=f"{program.description}.")
    made.add_argument("--model", choices=tuple(MODELS), default=Settings.model, help="shape of the random model")
    numbers = {
        "sequence-length": (512, "T, tokens of a sequence"),
        "n-samples": (Settings.n_samples, "n, completions per context"),
        "batch-size": (Settings.batch_size, "sequences at a time"),
        "threads": (1, "of PyTorch, in this process and in the service; an engine on a CPU always has one"),
    }
    for option, (default, text) in numbers.items():
        made.add_argument(f"--{option}", type=positive, default=default, metavar="N", help=f"{text} ({default})")
    program.add_options(made)
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    return made


def _settings(options: argparse.Namespace) -> Settings:
    """What both programs have options for."""
    return Settings(
        model=options.model,
        sequence_lengths=(options.sequence_length,),
        n_samples=options.n_samples,
        batch_size=options.batch_size,
        threads=options.threads,
    )


# --- rollouts --------------------------------------------------------------------------------------------------


def _rollout_options(made: argparse.ArgumentParser) -> None:
    lengths = (8, 32, 128)
    shown = " ".join(map(str, lengths))
    made.add_argument(
        "--lengths",
        type=positive,
        nargs="+",
        default=lengths,
        metavar="G",
        help=f"tokens per completion, and between anchors ({shown})",
    )
    made.add_argument("--repeats", type=positive, default=3, metavar="N", help="timed rounds, after one to warm up (3)")


def _rollout_sections(options: argparse.Namespace) -> Sections:
    from benchmarks import engines

    return engines.sections(replace(_settings(options), repeats=options.repeats), sorted(set(options.lengths)))


def _rollout_conclusion(rows: Sequence[Row]) -> str:
    from benchmarks import engines

    return engines.crossover(rows)


# --- features --------------------------------------------------------------------------------------------------


def _feature_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--trials", type=positive, default=9, metavar="N", help="of the grid (9)")
    made.add_argument("--steps", type=positive, default=3, metavar="N", help="batches of an epoch; there are two (3)")
    made.add_argument(
        "--completion-length", type=positive, default=8, metavar="G", help="tokens per completion and stride (8)"
    )
    made.add_argument(
        "--shared-completions",
        type=fraction,
        default=0.25,
        metavar="SHARE",
        help="of a step's completions that are the same in all trials (0.25)",
    )


def _feature_sections(options: argparse.Namespace) -> Sections:
    from benchmarks import services

    G = options.completion_length
    settings = replace(_settings(options), completion_length=G, stride=G)
    return services.sections(services.Grid(settings, options.trials, options.steps, options.shared_completions))


PROGRAMS = {
    "rollouts": Program(
        "Strided rollouts in process against those of a vLLM engine",
        _rollout_options,
        _rollout_sections,
        _rollout_conclusion,
    ),
    "features": Program(
        "The feature networks of a grid of trials against one service for all of them",
        _feature_options,
        _feature_sections,
        lambda _: "",
    ),
}
