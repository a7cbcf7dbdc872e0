"""The command line of the benchmarks: options -> settings -> rows. Imports no torch, so that --help is instant."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import benchmarks
from benchmarks.rows import Row, report
from benchmarks.settings import Attention, Model, Precision, Section, Settings
from ebft_study.errors import ConfigError

REMEDIES = {"ray": "Run make setup", "vllm": "Run make setup, or pip install 'ebft-study[vllm]' on a GPU machine"}


class _SeveralValues(TyperGroup):
    """Let an option take several values, as in `--section step profile`, which typer wants it repeated for."""

    options = ("--section", "--sequence-length", "--lengths")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeated: list[str] = []
        option = ""
        for argument in args:
            if argument.startswith("-"):
                option = argument if argument in self.options else ""
            elif option and repeated[-1] != option:
                repeated.append(option)
            repeated.append(argument)
        return super().parse_args(ctx, repeated)


app = typer.Typer(
    cls=_SeveralValues,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help=(benchmarks.__doc__ or "").splitlines()[0],
    epilog="example: ebft-study bench --section step profile --sequence-length 512 --threads 2 --json bench.json",
)


def number(text: str) -> Any:
    """An option for a number of things, at least one."""
    return typer.Option(min=1, metavar="N", help=text)


ModelName = Annotated[Model, typer.Option(help="Shape of the random model.")]
Samples = Annotated[int, number("n, completions per context.")]
BatchSize = Annotated[int, number("Sequences at a time.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the rows to this file.")]
SequenceLength = Annotated[int, number("T, tokens of a sequence.")]
Threads = Annotated[int, number("Threads of PyTorch, here and in the service; an engine on a CPU always has one.")]


@app.callback()
def step(
    context: typer.Context,
    section: Annotated[
        list[Section] | None, typer.Option(metavar="NAME...", help=f"Any of {', '.join(Section)}.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = Settings.device,
    model: ModelName = "7m",
    sequence_lengths: Annotated[
        list[int] | None,
        typer.Option(
            "--sequence-length",
            min=1,
            metavar="T...",
            show_default="512 1024",
            help="Lengths for the section step; memory takes the last one, all others the first.",
        ),
    ] = None,
    n_samples: Samples = Settings.n_samples,
    completion_length: Annotated[int, number("G, tokens per completion.")] = Settings.completion_length,
    stride: Annotated[int, number("s, distance between anchors, and length of the first context.")] = Settings.stride,
    batch_size: BatchSize = Settings.batch_size,
    micro_batch_size: Annotated[
        int | None, number("Sequences at a time in our step; the naive one takes one, n times over.")
    ] = None,
    anchors_at_once: Annotated[int | None, number("Anchors at a time in our step.")] = None,
    repeats: Annotated[int, number("Timed rounds, after one to warm up.")] = Settings.repeats,
    threads: Annotated[int | None, number("Threads of a CPU; default: PyTorch's choice.")] = None,
    naive_attention: Annotated[
        Attention, typer.Option(help="The naive contender's: fused, or the published code's probability matrices.")
    ] = Settings.naive_attention,
    precision: Annotated[Precision, typer.Option(help="Of activations.")] = Settings.precision,
    weight_dtype: Annotated[Precision, typer.Option(help="Of trained weights.")] = Settings.weight_dtype,
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="Keep the inputs of layers only.")
    ] = Settings.activation_checkpointing,
    lora_rank: Annotated[int, typer.Option(min=0, metavar="N", help="Rank of adapters; 0 trains all weights.")] = 0,
    json: Json = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Also draw the step's phases and its scaling.")
    ] = None,
) -> None:
    """Measure sections of one step; exit code 1 if the contenders disagree or a section cannot be run."""
    if context.invoked_subcommand:
        return
    from benchmarks import sections

    settings = _settings(context, sequence_lengths=tuple(sequence_lengths or Settings.sequence_lengths))
    rows = report("step", sections.run(settings, section or list(Section)), json)
    if plot:
        from benchmarks import figure

        figure.draw(rows, plot)
    _finish(rows)


@app.command()
def rollouts(
    context: typer.Context,
    model: ModelName = "7m",
    sequence_length: SequenceLength = 512,
    n_samples: Samples = Settings.n_samples,
    batch_size: BatchSize = Settings.batch_size,
    threads: Threads = 1,
    lengths: Annotated[
        list[int] | None,
        typer.Option(
            min=1, metavar="G...", show_default="8 32 128", help="Tokens per completion, and between anchors."
        ),
    ] = None,
    repeats: Annotated[int, number("Timed rounds, after one to warm up.")] = 3,
    json: Json = None,
) -> None:
    """Strided rollouts in process against those of a vLLM engine."""
    _require("rollouts", "ray", "vllm")
    from benchmarks import engines

    settings = _settings(context, sequence_lengths=(sequence_length,))
    rows = report("rollouts", engines.tables(settings, sorted(set(lengths or (8, 32, 128)))), json)
    if conclusion := engines.crossover(rows):
        print(conclusion)
    _finish(rows)


@app.command()
def features(
    context: typer.Context,
    model: ModelName = "7m",
    sequence_length: SequenceLength = 512,
    n_samples: Samples = Settings.n_samples,
    batch_size: BatchSize = Settings.batch_size,
    threads: Threads = 1,
    trials: Annotated[int, number("Trials of the grid.")] = 9,
    steps: Annotated[int, number("Batches of an epoch; there are two epochs.")] = 3,
    completion_length: Annotated[int, number("Tokens per completion, and stride.")] = 8,
    shared_completions: Annotated[
        float, typer.Option(min=0, max=1, metavar="SHARE", help="Share of completions that are the same in all trials.")
    ] = 0.25,
    json: Json = None,
) -> None:
    """The feature networks of a grid of trials against one service for all of them."""
    _require("features", "ray")
    from benchmarks import services

    settings = _settings(context, sequence_lengths=(sequence_length,), stride=completion_length)
    grid = services.Grid(settings, trials, steps, shared_completions)
    _finish(report("features", services.tables(grid), json))


@app.command()
def weights(
    context: typer.Context,
    model: ModelName = "1.5b",
    weight_dtype: Annotated[Precision, typer.Option(help="Of the weights in memory.")] = "bfloat16",
    threads: Threads = 1,
    json: Json = None,
) -> None:
    """Seconds, bytes and memory of a start, a checkpoint with all weights trained, and a resume, on a CPU."""
    from benchmarks import weights

    _finish(report("weights", weights.tables(_settings(context)), json))


@app.command()
def rounding(
    model: Annotated[str, typer.Option(help="A model of the ladder, a hub id, or a folder.")] = "tiny-4m",
    steps: Annotated[int, number("Updates.")] = 20,
    learning_rate: Annotated[float, typer.Option(help="Of these updates.")] = 1e-6,
    threads: Threads = 1,
    json: Json = None,
) -> None:
    """What updates change in weights of bfloat16, rounded to nearest and stochastically, and of float32."""
    from benchmarks import weights

    tables = weights.rounding_tables(model, steps=steps, learning_rate=learning_rate, threads=threads)
    _finish(report("rounding", tables, json))


def _settings(context: typer.Context, **changes: Any) -> Settings:
    """The settings among a command's options, which have their names; `changes` are those that differ in form."""
    chosen = {f.name: context.params[f.name] for f in fields(Settings) if f.name in context.params}
    return Settings(**{**chosen, **changes})


def _require(command: str, *modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"bench {command}: {module} is not installed. {REMEDIES[module]}")


def _finish(rows: Sequence[Row]) -> None:
    raise typer.Exit(1 if any(row.failed for row in rows) else 0)
