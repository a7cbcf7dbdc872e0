"""The Python API: everything that the command line does, for scripts and notebooks.

    import ebft_study as ebft

    study = ebft.load("search_spaces/quickstart.yaml", profile="cpu")   # or a mapping of the same content
    print(ebft.plan(study).hours)
    result = ebft.run(study)
    ebft.read_results("quickstart").trials

Heavy modules are imported by the function that needs them, so that importing this one is instant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebft_study.errors import ConfigError, ResultsError

if TYPE_CHECKING:
    import duckdb
    from rich.console import Console

    from ebft_study.analysis.comparison import Comparison
    from ebft_study.config import RunConfig
    from ebft_study.report.bundle import BundleCheck
    from ebft_study.report.table import Table
    from ebft_study.results import Results
    from ebft_study.storage import Location, StoragePath
    from ebft_study.study.driver.export import Exported
    from ebft_study.study.driver.runner import StudyResult
    from ebft_study.study.forecast.plan import StudyPlan
    from ebft_study.study.resolving.resolved import ResolvedStudy
    from ebft_study.study.view.listing import ListedStudy
    from ebft_study.study.view.replay_table import StudyReplays
    from ebft_study.training import RunResult

STUDIES = "studies"
"""The folder of studies where none is named."""


def ready_studies() -> dict[str, str]:
    """The study files that come with the package, by name, each with its question."""
    from ebft_study import config, paths

    return {name: " ".join(config.read_yaml(file)["question"].split()) for name, file in paths.ready_studies().items()}


def init(name: str, folder: str | Path = ".") -> Path:
    """Copy a ready study file into a folder, to run it or to change it first. Returns the file.

    Raises:
        ConfigError: there is no such ready file, or the folder has a file of this name.
    """
    from ebft_study import paths

    ready, file = paths.ready_studies(), Path(folder, f"{name}.yaml")
    if name not in ready:
        raise ConfigError(f"init: {name!r}: is no ready study. There are: {', '.join(ready)}")
    if file.exists():
        raise ConfigError(f"{file}: exists. Remove it, or go to another folder")
    try:
        file.write_bytes(ready[name].read_bytes())
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written ({error.strerror}). Go to another folder") from None
    return file


def load(
    study: str | Path | Mapping[str, Any],
    profile: str | None = None,
    overrides: Sequence[str] = (),
    *,
    name: str | None = None,
) -> ResolvedStudy:
    """Load and check a study; nothing is started.

    Args:
        study: a study file, or a mapping of the same content.
        profile: one of the file's profiles, such as `cpu`.
        overrides: `key=value` for settings of the runs and sections of the file: `steps=40`, `budget.max_hours=1`.
        name: runs the study under another name.

    Raises:
        ConfigError: a rule is broken, in one line that says which, and what to do.
    """
    from ebft_study.study.resolving.study_file import load_study

    return load_study(Path(study) if isinstance(study, str) else study, profile, overrides, name=name)


def plan(study: ResolvedStudy, *, storage: Location = STUDIES, memory_gib: float | None = None) -> StudyPlan:
    """Trials, memory and hours of a study; starts nothing.

    Args:
        storage: the folder of earlier studies, whose trials show this machine's throughput.
        memory_gib: of a GPU, or of the machine for one worker; default: 79 ("80 GB") on a GPU, else this machine's.
    """
    from ebft_study.study.forecast.plan import plan

    return plan(study, storage=storage, memory_gib=memory_gib)


def run(
    study: ResolvedStudy,
    *,
    storage: Location = STUDIES,
    resume: bool = False,
    accept_changes: bool = False,
    address: str | None = None,
    console: Console | None = None,
) -> StudyResult:
    """Run a study to its end, or until Ctrl-C.

    Args:
        storage: a folder or a URL (`s3://bucket/studies`) that holds the studies.
        resume: continue a study of this name that stopped earlier; its budget may be another one now.
        accept_changes: continue it with data or models that have changed since it began, and record the change.
        address: of an existing Ray cluster (`auto`, `host:port`); default: one of the study's own on this machine.
        console: where progress is shown; default: the terminal.

    Raises:
        EbftError: something that a user must change, before any trial starts.
    """
    from ebft_study.study.driver import runner

    return runner.run(
        study,
        storage=storage,
        console=_console(console),
        resume_existing=resume,
        accept_changes=accept_changes,
        address=address,
    )


def extend(
    study: ResolvedStudy,
    *,
    storage: Location = STUDIES,
    accept_changes: bool = False,
    address: str | None = None,
    console: Console | None = None,
) -> StudyResult:
    """Run the values, seeds, baselines and steps of a study file that its study does not have yet."""
    from ebft_study.study.driver import runner

    return runner.extend(
        study, storage=storage, console=_console(console), accept_changes=accept_changes, address=address
    )


def resume(
    study: Location,
    overrides: Sequence[str] = (),
    *,
    storage: Location = STUDIES,
    retry_failed: bool = False,
    accept_changes: bool = False,
    address: str | None = None,
    console: Console | None = None,
) -> StudyResult:
    """Continue a study that was interrupted or killed, given its name, folder or URL; `run` has the arguments.

    Args:
        overrides: another budget, `budget.max_hours=8`, or number of retries, `resources.max_failures=3`.
        retry_failed: also run trials again that failed.
    """
    folder = find(study, storage)
    from ebft_study.study.driver import runner

    console = _console(console)
    return runner.resume(
        folder, overrides, console=console, retry_failed=retry_failed, accept_changes=accept_changes, address=address
    )


def replay(
    file: str | Path,
    profile: str | None = None,
    overrides: Sequence[str] = (),
    *,
    name: str | None = None,
    storage: Location = STUDIES,
) -> StudyReplays:
    """Replay a finished study under the early stopping of its file, or under every kind if the file asks for none."""
    from ebft_study.study.view import replay_table

    return replay_table.replay_study(Path(file), profile=profile, overrides=overrides, name=name, storage=storage)


def read_results(study: Location, *, storage: Location = STUDIES) -> Results:
    """The tables of a study, running or finished, as pandas data frames."""
    from ebft_study import results

    return results.load(find(study, storage))


def catalog(storage: Location = STUDIES) -> duckdb.DuckDBPyConnection:
    """All studies of a folder as one DuckDB database, read now: docs/comparing.md has its views."""
    from ebft_study import results

    return results.catalog(storage)


def studies(storage: Location = STUDIES) -> list[ListedStudy]:
    """The studies of a folder: state, trials that are over, and the best configuration so far."""
    from ebft_study.study.view import listing

    return listing.listed(storage)


def stop(study: Location, *, storage: Location = STUDIES) -> StoragePath:
    """Ask the driver of a running study, here or on another machine, to stop as Ctrl-C does. Does not wait for it.

    Returns its folder.

    Raises:
        ResultsError: nobody is running the study.
    """
    folder = find(study, storage)
    from ebft_study.study.folder import lock, stop_request

    if not lock.is_held(folder):
        raise ResultsError(f"{folder}: nobody is running this study. See 'ebft-study status'")
    stop_request.ask(folder)
    return folder


def delete(study: Location, *, storage: Location = STUDIES) -> None:
    """Remove a study with its results and checkpoints; one that is running is refused."""
    folder = find(study, storage)
    from ebft_study.study.folder import housekeeping

    housekeeping.delete(folder)


def rename(study: Location, name: str, *, storage: Location = STUDIES) -> StoragePath:
    """Give a study and its folder another name; one that is running is refused. Returns the new folder."""
    folder = find(study, storage)
    from ebft_study.study.folder import housekeeping

    return housekeeping.rename(folder, name)


def write_report(study: Location, *, storage: Location = STUDIES) -> Path | StoragePath:
    """Write the report of a study, running or finished; returns its HTML file."""
    folder = find(study, storage)
    from ebft_study import report

    return report.write_report(folder)


def compare(
    studies: Sequence[Location],
    across: Sequence[str] = (),
    *,
    storage: Location = STUDIES,
    output: Location | None = None,
) -> Comparison:
    """Compare studies, running or finished, with the first one of them; docs/comparing.md has the rules.

    Args:
        studies: two or more.
        across: settings that are compared: configurations are the same that differ in nothing else.
        output: where to write the page with all differences; default: nowhere.

    Raises:
        ResultsError: they cannot be compared, in one line that says why.
    """
    from ebft_study import config
    from ebft_study.analysis import comparison
    from ebft_study.analysis.summary import summarize

    results = {name: read_results(folder) for name, folder in _distinct(studies, storage).items()}
    names = [config.short_name(config.resolve_key(key, source="across")) for key in across]
    compared = comparison.compare({name: summarize(each) for name, each in results.items()}, across=names)
    if output is not None:
        from ebft_study.report.comparison import write
        from ebft_study.storage import storage_path

        write(compared, storage_path(output))
    return compared


def _distinct(studies: Sequence[Location], storage: Location) -> dict[str, StoragePath]:
    """The folders of studies by name, or by location where two have one name; refuses one that is given twice."""
    from ebft_study.storage import absolute

    folders = [absolute(find(study, storage)) for study in studies]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ResultsError(f"{folder}: is given twice, and equals itself. Name another study")
    names = [folder.name for folder in folders]
    return {
        name if names.count(name) == 1 else str(folder): folder for name, folder in zip(names, folders, strict=True)
    }


def tables(study: Location, *, storage: Location = STUDIES) -> dict[str, Table]:
    """The tables of a study's report by name; `markdown`, `latex`, `comma_separated` of `report.table` format them."""
    folder = find(study, storage)
    from ebft_study import report

    return report.tables(folder)


def bundle(
    study: Location,
    to: str | Path | None = None,
    *,
    notebooks: Sequence[str | Path] = (),
    storage: Location = STUDIES,
) -> Path:
    """Write a study as one archive: study file, tables, report, digests of everything; no checkpoints. Returns it.

    Args:
        to: default: `<study>.zip` in the current folder.
        notebooks: executed ones, besides those in the study's folder.
    """
    folder = find(study, storage)
    from ebft_study.report import bundle

    return bundle.bundle(folder, Path(to) if to else None, [Path(each) for each in notebooks])


def check_bundle(file: str | Path) -> BundleCheck:
    """Verify an archive of `bundle`: digests, tables, and that tables and report follow from the results.

    Raises:
        ResultsError: in one line, what is damaged.
    """
    from ebft_study.report import bundle

    return bundle.check(Path(file))


def evaluate(
    study: Location,
    benchmarks: Sequence[str],
    trials: Sequence[str] = (),
    overrides: Sequence[str] = (),
    *,
    storage: Location = STUDIES,
    checkpoint: str = "last",
    check: bool = False,
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Evaluate checkpoints of a study on benchmarks, and record the scores with its results.

    Args:
        benchmarks: `humaneval:/path`, `mini`, ...: see docs/downstream.md.
        trials: default: all that have finished.
        overrides: `key=value` of `benchmark_samples` and its like, of verifiers, or `device`.
        checkpoint: `last`, `best`, or a step.
        check: run the solutions that benchmarks bring first, and refuse one whose solution fails its own tests.

    Returns:
        A row per trial, benchmark and metric, as in the table `evaluations`; remarks on benchmarks that were skipped.
    """
    folder = find(study, storage)
    from ebft_study.study.driver import downstream

    return downstream.evaluate(folder, benchmarks, trials, overrides, checkpoint=checkpoint, check=check)


def export(
    study: Location,
    trial: str = "best",
    *,
    to: str | Path,
    checkpoint: str = "last",
    merge: bool = False,
    push: str | None = None,
    storage: Location = STUDIES,
) -> Exported:
    """Write a trained model as a folder that `from_pretrained` of transformers loads, with tokenizer and model card.

    Args:
        trial: a trial, or `best`: of the configuration with the best mean of the validation objective, the best seed.
        to: a new folder.
        checkpoint: `last`, `best`, or a step.
        merge: of a run with adapters, write the whole model instead of the adapters for peft.
        push: also put it into this repository of the Hugging Face hub (`owner/name`), which is private if it is new.

    Raises:
        EbftError: there is no such trial or checkpoint, or the base model has changed since.
    """
    folder = find(study, storage)
    from ebft_study.study.driver import export

    return export.export(folder, trial, to=Path(to), checkpoint=checkpoint, merge=merge, push=push)


def train(
    run: RunConfig | str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    output: str | Path | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Train a single run in this process, without Ray unless its settings ask for services.

    Args:
        run: a file with the settings of a run, a mapping of them, or the settings themselves.
        output: folder of the results; default: `runs/<name>`.
        resume: continue from the newest checkpoint in `output`.
    """
    import yaml

    from ebft_study import config
    from ebft_study.storage import absolute, storage_path
    from ebft_study.study.folder import lock, stop_request, study_yaml
    from ebft_study.study.folder.study_yaml import StudySource

    if isinstance(run, str | Path):
        settings = config.load_run(Path(run), list(overrides))
        source = StudySource.from_content(str(run), Path(run).read_bytes())
    else:
        if overrides and not isinstance(run, Mapping):
            raise ConfigError("train: overrides: the settings are complete. Change them with model_copy")
        settings = run if not isinstance(run, Mapping) else config.read_run(run, overrides, source="run")
        content = yaml.safe_dump(settings.model_dump(mode="json"))
        source = StudySource.from_content("run", content.encode())
    folder = Path(output) if output else Path("runs") / settings.name
    at, console = absolute(storage_path(folder)), _console(console)
    with lock.hold(at, record=study_yaml.NAME), stop_request.heeded(at, console.print):
        from ebft_study.study.driver.single_run import run_single

        return run_single(settings, source, folder=folder, resume=resume, console=console)


def find(study: Location, storage: Location = STUDIES) -> StoragePath:
    """The folder of a study, given its name, its folder, or its URL.

    Raises:
        ResultsError: there is none.
    """
    from ebft_study.results import find_in

    return find_in(study, storage)


def _console(console: Console | None) -> Console:
    if console is not None:
        return console
    from ebft_study.terminal import Terminal

    return Terminal()
