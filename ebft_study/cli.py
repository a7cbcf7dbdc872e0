"""The command line: arguments, a call of `api`, and text. Imports nothing heavy, so that --help is instant."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ebft_study import api, paths
from ebft_study.errors import ConfigError, EbftError
from ebft_study.terminal import Terminal, one_line

if TYPE_CHECKING:
    from ebft_study.study.driver.runner import StudyResult

app = typer.Typer(
    name="ebft-study",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,  # locals may hold secrets of the environment
)

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings as [bold]key=value[/bold], for example steps=20 learning_rate=1e-4")
]
Storage = Annotated[str, typer.Option(help="Folder or URL (s3://bucket/prefix?...) that holds the studies.")]
Address = Annotated[
    str | None,
    typer.Option(
        help="Use an existing Ray cluster: auto, or host:port of its head.", show_default="RAY_ADDRESS, else none"
    ),
]
Profile = Annotated[str | None, typer.Option(help="Which of the file's profiles: cpu, gpu, ...")]
AcceptChanges = Annotated[
    bool,
    typer.Option("--accept-changes", help="Continue with data or models that have changed, and record the change."),
]


def _names_here() -> list[str]:
    """Names of the studies in ./studies, for the shell's completion."""
    return sorted(file.parent.name for file in Path(api.STUDIES).glob("*/study.yaml"))


def _ready_names() -> list[str]:
    return list(paths.ready_studies())


StudyName = Annotated[str, typer.Argument(help="A study's name, its folder, or its URL.", autocompletion=_names_here)]


def _show_version(wanted: bool) -> None:
    if wanted:
        from ebft_study import __version__

        typer.echo(f"ebft-study {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Studies of Energy-Based Fine-Tuning (EBFT) of language models."""


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="A ready study.", autocompletion=_ready_names)] = "quickstart",
    show_list: Annotated[bool, typer.Option("--list", help="Show the ready studies with their questions.")] = False,
) -> None:
    """Copy a ready study file into the current folder, to run it or to change it first.

    [dim]ebft-study init quickstart[/dim]
    """
    if show_list:
        table = Table("study", "question", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for ready, question in api.ready_studies().items():
            table.add_row(ready, question)
        Terminal().print(table)
        return
    file = api.init(name)
    typer.echo(f"{file}: written. Its cost: ebft-study plan {file} --profile cpu")
    typer.echo(f"Run it: ebft-study study {file} --profile cpu")


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="A study file; for ready ones see init --list.")],
    overrides: Overrides = None,
    profile: Profile = None,
    name: Annotated[str | None, typer.Option(help="Run it under another name.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Start it, or continue it where it stopped.")] = False,
    extend: Annotated[
        bool,
        typer.Option("--extend", help="Run the values, seeds, baselines and steps that the file has gained."),
    ] = False,
    what_if: Annotated[
        bool, typer.Option("--what-if", help="Replay the finished study under early stopping; trains nothing.")
    ] = False,
    accept_changes: AcceptChanges = False,
    storage: Storage = api.STUDIES,
    address: Address = None,
) -> None:
    """Run a study: one trial per configuration and seed.

    [dim]ebft-study study alpha_gamma.yaml --profile cpu steps=40[/dim]

    [dim]ebft-study study alpha_gamma.yaml --profile cpu budget.max_hours=1[/dim]

    [dim]ebft-study study alpha_gamma.yaml --what-if scheduler.kind=asha[/dim]
    """
    if what_if:
        from ebft_study.study.view import replay_table

        if resume or extend:
            raise ConfigError("command line: --what-if: runs nothing. Drop it, or --resume and --extend")
        replay_table.show(api.replay(file, profile, overrides or [], name=name, storage=storage), Terminal())
        return
    if extend and resume:
        raise ConfigError("command line: --extend: changes a study and continues it. Drop --resume")
    console = Terminal()
    again = "repeat the command" if extend or resume else "add --resume to the same command"
    with _interruptible(again):
        loaded = api.load(file, profile, overrides or [], name=name)
        more: dict[str, Any] = {"storage": storage, "address": address, "accept_changes": accept_changes}
        if extend:
            _finish(api.extend(loaded, console=console, **more), console)
        _finish(api.run(loaded, resume=resume, console=console, **more), console)


@app.command()
def plan(
    file: Annotated[Path, typer.Argument(help="A study file; for ready ones see init --list.")],
    overrides: Overrides = None,
    profile: Profile = None,
    memory_gib: Annotated[
        float | None,
        typer.Option(help="Memory of one GPU or CPU worker.", show_default="79, or this machine's"),
    ] = None,
    storage: Storage = api.STUDIES,
) -> None:
    """Predict the cost of a study: trials, memory, work, hours. Starts nothing.

    [dim]ebft-study plan alpha_gamma.yaml --profile cpu[/dim]
    """
    planned = api.plan(api.load(file, profile, overrides or []), storage=storage, memory_gib=memory_gib)
    from ebft_study.study.forecast.plan import show  # takes seconds, which a mistake in the file should not

    show(planned, Terminal())
    raise typer.Exit(0 if planned.fits else 1)


@app.command()
def resume(
    name: StudyName,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="[bold]budget.max_hours=8[/bold], resources.max_failures=3, ..."),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Also run trials again that failed.")] = False,
    accept_changes: AcceptChanges = False,
    storage: Storage = api.STUDIES,
    address: Address = None,
) -> None:
    """Continue a study that was interrupted or killed.

    [dim]ebft-study resume alpha_gamma[/dim]

    [dim]ebft-study resume alpha_gamma budget.max_hours=8[/dim]
    """
    console = Terminal()
    with _interruptible("repeat the command"):
        resumed = api.resume(
            name,
            overrides or [],
            storage=storage,
            retry_failed=retry_failed,
            accept_changes=accept_changes,
            address=address,
            console=console,
        )
        _finish(resumed, console)


@app.command("list")
def list_studies(storage: Storage = api.STUDIES) -> None:
    """List the studies of a folder: state, trials, start, and the best configuration so far.

    [dim]ebft-study list --storage studies[/dim]
    """
    from ebft_study.study.view.listing import show

    show(api.studies(storage), storage, Terminal())


@app.command()
def status(
    name: StudyName,
    watch: Annotated[bool, typer.Option("--watch", help="Keep showing it until nobody runs it any more.")] = False,
    storage: Storage = api.STUDIES,
) -> None:
    """Show the trials of a running or finished study, with their states and problems.

    [dim]ebft-study status alpha_gamma --watch[/dim]
    """
    folder = api.find(name, storage)
    from ebft_study.study.view import status

    with _interruptible("the study runs on; repeat the command"):
        (status.watch if watch else status.show)(folder, Terminal())


@app.command()
def stop(name: StudyName, storage: Storage = api.STUDIES) -> None:
    """Stop a running study as Ctrl-C does, wherever it runs, and wait for its end. 'resume' continues it.

    [dim]ebft-study stop alpha_gamma[/dim]
    """
    folder = api.stop(name, storage=storage)
    from ebft_study.study.view import status

    typer.echo(f"{folder}: asked its driver to stop; waiting for its end")
    with _interruptible("the request stands; repeat the command"):
        status.watch(folder, Terminal())


@app.command()
def delete(
    name: StudyName,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    storage: Storage = api.STUDIES,
) -> None:
    """Remove a study with its results and checkpoints.

    [dim]ebft-study delete alpha_gamma[/dim]
    """
    folder = api.find(name, storage)
    from ebft_study.study.folder.housekeeping import search_began_with

    if users := search_began_with(folder):
        typer.echo(f"note: the search of {', '.join(users)} began with its results, of which it keeps a copy")
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError("command line: delete: nobody is there to confirm it. Add --yes")
        typer.confirm(f"Remove {folder} with its results and checkpoints?", abort=True)
    api.delete(folder)
    typer.echo(f"{folder}: removed")


@app.command()
def rename(
    name: StudyName,
    new: Annotated[str, typer.Argument(help="The new name.")],
    storage: Storage = api.STUDIES,
) -> None:
    """Give a study and its folder another name.

    [dim]ebft-study rename alpha_gamma first_try[/dim]
    """
    folder = api.rename(name, new, storage=storage)
    typer.echo(f"{folder}: renamed. Its report has the name of before: write it again with 'ebft-study report'")


@app.command()
def report(name: StudyName, storage: Storage = api.STUDIES) -> None:
    """Write the report of a study from its results; it may still be running.

    [dim]ebft-study report alpha_gamma[/dim]
    """
    typer.echo(str(api.write_report(name, storage=storage)))


@app.command()
def serve(
    storage: Annotated[str, typer.Argument(help="Folder or URL that holds the studies.")] = api.STUDIES,
    port: Annotated[int, typer.Option(help="Of this machine; 0 for any that is free.")] = 8760,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but loopback shows the studies to a network.")
    ] = "127.0.0.1",
) -> None:
    """Show the reports of all studies of a folder in a browser, refreshed while they run. Ends with Ctrl-C.

    [dim]ebft-study serve[/dim]
    """
    from ebft_study.study.view.server import server

    serving = server(storage, host=host, port=port)
    typer.echo(serving.url)
    with contextlib.suppress(KeyboardInterrupt), serving:
        serving.serve_forever()


@app.command()
def compare(
    names: Annotated[list[str], typer.Argument(help="Studies, by name, folder or URL; the first is the reference.")],
    across: Annotated[
        list[str] | None, typer.Option(help="A setting that is compared: configurations may differ in it.")
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="The page.", show_default="comparison_<first>_<second>_....html")
    ] = None,
    storage: Storage = api.STUDIES,
) -> None:
    """Compare studies: configurations that they have in common, and what else differs.

    [dim]ebft-study compare alpha_gamma alpha_gamma_again[/dim]

    [dim]ebft-study compare alpha_gamma alpha_gamma_k3 --across kl_estimator[/dim]
    """
    target = output or f"comparison_{'_'.join(Path(name.partition('?')[0]).name for name in names)}.html"
    compared = api.compare(names, across or (), storage=storage, output=target)
    from ebft_study.report.comparison import sentences

    for sentence in sentences(compared):
        typer.echo(sentence)
    typer.echo(target)


@app.command()
def bundle(
    name: Annotated[str | None, typer.Argument(help="A study's name, its folder, or its URL.")] = None,
    to: Annotated[Path | None, typer.Option(help="The archive.", show_default="<study>.zip")] = None,
    notebook: Annotated[list[Path] | None, typer.Option(help="An executed notebook to put in; repeatable.")] = None,
    check: Annotated[Path | None, typer.Option(help="Verify this archive instead.")] = None,
    storage: Storage = api.STUDIES,
) -> None:
    """Write a study as one archive for others, without checkpoints, or verify one.

    [dim]ebft-study bundle alpha_gamma --to alpha_gamma.zip[/dim]

    [dim]ebft-study bundle --check alpha_gamma.zip[/dim]
    """
    if (name is None) == (check is None):
        raise ConfigError("command line: bundle: takes a study, or --check and an archive. Give one of them")
    if check is not None:
        typer.echo(api.check_bundle(check).in_words())
    elif name is not None:
        typer.echo(str(api.bundle(name, to, notebooks=notebook or [], storage=storage)))


@app.command()
def evaluate(
    name: StudyName,
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Trials (default: all finished ones) and settings as key=value.")
    ] = None,
    benchmark: Annotated[str, typer.Option(help="Benchmarks, with commas between; see docs/downstream.md.")] = "mini",
    check: Annotated[bool, typer.Option("--check", help="Run the solutions that benchmarks bring first.")] = False,
    checkpoint: Annotated[str, typer.Option(help="last, best, or a step.")] = "last",
    storage: Storage = api.STUDIES,
) -> None:
    """Evaluate trained models on benchmarks, and add the scores to the study's results.

    [dim]ebft-study evaluate alpha_gamma t0003 --benchmark mini,humaneval:HumanEval.jsonl.gz benchmark_samples=4[/dim]
    """
    given = arguments or []
    rows, skipped = api.evaluate(
        name,
        benchmark.split(","),
        [argument for argument in given if "=" not in argument],
        [argument for argument in given if "=" in argument],
        storage=storage,
        checkpoint=checkpoint,
        check=check,
    )
    shown = [
        {
            **row,
            "metric": row["metric"] if row["position"] is None else row["metric"].replace("_k", f"_{row['position']}"),
            "score": f"{row['value']:.3f} ± {row['standard_error']:.3f}",
            "problems": row["count"],
        }
        for row in rows
    ]
    columns = ["trial", "step", "benchmark", "metric", "score", "problems"]
    _table("Scores ± standard error over problems", columns, shown)
    for remark in skipped:
        typer.echo(remark)


@app.command()
def export(
    name: StudyName,
    to: Annotated[Path, typer.Option(help="A new folder.")],
    trial: Annotated[str, typer.Argument(help="A trial, or best: by the validation objective.")] = "best",
    checkpoint: Annotated[str, typer.Option(help="last, best, or a step.")] = "last",
    merge: Annotated[bool, typer.Option("--merge", help="Write adapters and base model as one model.")] = False,
    push: Annotated[str | None, typer.Option(help="Also put it into this repository of the hub: owner/name.")] = None,
    storage: Storage = api.STUDIES,
) -> None:
    """Write a trained model as a Hugging Face folder, with tokenizer and model card.

    [dim]ebft-study export alpha_gamma --to models/best[/dim]

    [dim]ebft-study export alpha_gamma t0003 --to models/t0003 --merge --push owner/name[/dim]
    """
    exported = api.export(name, trial, to=to, checkpoint=checkpoint, merge=merge, push=push, storage=storage)
    typer.echo(exported.in_words())


@app.command()
def train(
    file: Annotated[Path, typer.Argument(help="A file with the settings of one run.")],
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the results.", show_default="runs/<name>")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
) -> None:
    """Run a single configuration in this process, without Ray.

    [dim]ebft-study train run.yaml method=sft steps=100[/dim]
    """
    with _interruptible("add --resume to the same command"):
        result = api.train(file, overrides or [], output=output, resume=resume)
    raise typer.Exit(0 if result.status == "finished" else 1)


@app.command()
def doctor() -> None:
    """Show what works on this machine, and the remedy for what does not. Takes two minutes at most.

    [dim]ebft-study doctor[/dim]
    """
    from ebft_study import doctor

    console, found = Terminal(), doctor.findings()
    for each in found:
        console.print(f"{each.state:6}  {each.name}: {each.text}", soft_wrap=True)
    raise typer.Exit(int(any(each.state == "broken" for each in found)))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Time one EBFT step, and compare it with the published way of computing it. Options: see its own --help.

    [dim]ebft-study bench --section step --json bench.json[/dim]
    """
    try:
        from benchmarks.cli import app as bench_app
    except ModuleNotFoundError as error:
        if error.name != "benchmarks":
            raise
        raise ConfigError(
            "bench: benchmarks are part of the source checkout. Run pip install -e '.[dev]' there"
        ) from None
    bench_app(context.args, prog_name="ebft-study bench")


@app.command("gradient-noise")
def gradient_noise(
    file: Annotated[Path, typer.Argument(help="A file with the settings of one run.")],
    overrides: Overrides = None,
    draws: Annotated[int, typer.Option(help="Independent gradients per setting.")] = 16,
) -> None:
    """Compare how much signal one gradient holds with and without whitening, for several numbers of samples.

    [dim]ebft-study gradient-noise run.yaml --draws 32[/dim]
    """
    from ebft_study import config
    from ebft_study.training import gradient_noise

    rows = gradient_noise.gradient_noise(
        config.load_run(file, overrides or []),
        whitenings=("none", "variant_i", "variant_iii", "reference_code"),
        n_samples=(4, 16),
        draws=draws,
    )
    _table(f"{draws} gradients per setting", list(rows[0]), rows)


def _table(title: str, columns: list[str], rows: list[dict[str, Any]]) -> None:
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(
            *(
                f"{row[name]:.4g}" if isinstance(row[name], float) else ("" if row[name] is None else str(row[name]))
                for name in columns
            )
        )
    Terminal().print(table)


@contextlib.contextmanager
def _interruptible(remedy: str) -> Iterator[None]:
    """Context in which Ctrl-C and SIGTERM end the command with a line that says how to continue.

    A session of a study has its own handlers: they end it in order.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"interrupted; {remedy} to continue", err=True)
        raise typer.Exit(130) from None


def _finish(ended: StudyResult, console: Console) -> None:
    """Print the result of a session, and end the process with its exit code."""
    from ebft_study.study.view import display

    states = list(ended.states.values())
    lines = [] if console.is_terminal else [display.summary(states, display.Plan(0))]  # the table shows it
    if ended.report:
        lines.append(f"report: {ended.report}")
    if ended.reason:
        lines.append(ended.how_to_resume)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(ended.exit_code)


def main() -> None:
    """Entry point: an error that a user can repair is one line on stderr and exit code 2."""
    # Threads that wait spinning for long make everything several times slower as soon as another process wants the
    # cores; this many rounds are enough to lose nothing when they are free.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except EbftError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
