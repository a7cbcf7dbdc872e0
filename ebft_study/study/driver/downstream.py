"""Evaluating the checkpoints of a study's trials on benchmarks, after they have been trained; Ray is not needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ebft_study import config, plugins, results
from ebft_study.config import DataConfig, EvaluationConfig, RunConfig
from ebft_study.errors import ConfigError, DataError, ResultsError
from ebft_study.results import TrialRecorder
from ebft_study.storage import StoragePath
from ebft_study.study.driver import trained
from ebft_study.study.driver.trained import TrainedModel
from ebft_study.study.folder import study_yaml

if TYPE_CHECKING:
    from ebft_study.evaluation import Scores
    from ebft_study.evaluation.downstream import Result
    from ebft_study.evaluation.downstream.benchmarks import Benchmark
    from ebft_study.evaluation.downstream.protocol import Judges
    from ebft_study.networks.loading import LoadedModel

CHANGEABLE = ("evaluation.benchmark", "evaluation.evaluation_seed", "verifier.", "training.device")
"""Beginnings of the settings that an evaluation may change."""
BENCHMARK_SETTINGS = {name for name in EvaluationConfig.model_fields if name.startswith("benchmark")}


def evaluate(
    folder: StoragePath,
    benchmarks: Sequence[str],
    trials: Sequence[str] = (),
    overrides: Sequence[str] = (),
    *,
    checkpoint: str = "last",
    check: bool = False,
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Evaluate checkpoints, and record the scores; see `api.evaluate`.

    Returns:
        A row per trial, benchmark and metric, and remarks on benchmarks that were skipped.
    """
    from ebft_study.evaluation.downstream.benchmarks import load_benchmarks
    from ebft_study.training.setup import choose_device

    study = results.load(folder)
    plugins.search_in(*study_yaml.used_plugins(folder))
    changes = _changes(overrides) | {"evaluation.benchmarks": list(benchmarks)}
    chosen = [trained.trained_model(study, trial_id, checkpoint, changes) for trial_id in _trials(study, trials)]
    settings = chosen[0].run.evaluation
    loaded, skipped = load_benchmarks(settings.benchmarks, problems=settings.benchmark_problems)
    for run in {(each.run.model, each.run.model_revision): each.run for each in chosen}.values():
        trained.check_base(study, run)
        _check_room(run, loaded)
    overlaps = _overlaps(dict.fromkeys(each.run.data for each in chosen), loaded)
    rows: list[dict[str, Any]] = []
    with _judged(loaded, chosen[0].run) as judges:
        if check:
            _check_references(loaded, judges)
        for each in chosen:
            base, step = _load(each, choose_device(each.run))
            for benchmark in loaded:
                result = _measure(each, base, benchmark, judges[benchmark.name])
                result.measured["contaminated_fraction", None] = overlaps[each.run.data, benchmark.name]
                _record(study, each, step, result)
                who = {"trial": each.trial_id, "configuration": each.label, "step": step}
                rows += [{**who, **row} for row in result.evaluations()]
    return rows, skipped


def _changes(overrides: Sequence[str]) -> dict[str, Any]:
    """Dotted path -> value; refuses settings of training."""
    changes = {config.resolve_key(key): value for key, value in map(config.parse_override, overrides)}
    for path, value in changes.items():
        if not path.startswith(CHANGEABLE):
            raise ConfigError(
                f"command line: {path}={value!r}: is a setting of the trained model. An evaluation has benchmark_*, "
                "evaluation_seed, device, and those of verifiers"
            )
    return changes


def _trials(study: results.Results, wanted: Sequence[str]) -> list[str]:
    """The trials to evaluate: all finished ones where none is named."""
    for trial_id in wanted:
        trained.check_trial(study, trial_id)
    finished = study.trials.loc[study.trials["status"] == "finished", "trial_id"].tolist()
    if not wanted and not finished:
        raise ResultsError(f"{study.folder}: has no finished trial. Name one that has a checkpoint")
    return list(wanted) or finished


def _check_room(run: RunConfig, benchmarks: Sequence[Benchmark]) -> None:
    """Refuse prompts that do not fit, before any model is loaded."""
    from ebft_study.evaluation.downstream import check_room
    from ebft_study.networks.loading import load_tokenizer, read_config

    tokenizer = load_tokenizer(run.model, revision=run.model_revision)
    positions = getattr(read_config(run.model, revision=run.model_revision), "max_position_embeddings", None)
    check_room(benchmarks, tokenizer, max_tokens=run.evaluation.benchmark_max_tokens, positions=positions)


@contextlib.contextmanager
def _judged(benchmarks: Sequence[Benchmark], run: RunConfig) -> Iterator[dict[str, Judges]]:
    """The verifiers of each benchmark, which serve all trials."""
    from ebft_study.evaluation.downstream.protocol import Protocol, judges_of

    protocol = Protocol.from_config(run.evaluation)
    with contextlib.ExitStack() as open_ones:
        judges = {}
        for benchmark in benchmarks:
            judges[benchmark.name] = judges_of(benchmark, run.verifier, protocol)
            open_ones.callback(judges[benchmark.name].close)
        yield judges


def _check_references(benchmarks: Sequence[Benchmark], judges: Mapping[str, Judges]) -> None:
    from ebft_study.evaluation.downstream.protocol import failing_references

    for benchmark in benchmarks:
        failing = failing_references(benchmark, judges[benchmark.name]) if benchmark.kind == "code" else {}
        if failing:
            listed = "; ".join(f"{name} ({reason})" for name, reason in list(failing.items())[:5])
            more = f" and {len(failing) - 5} more" if len(failing) > 5 else ""
            raise DataError(
                f"benchmark {benchmark.name}: {len(failing)} of its solutions fail their own tests: {listed}{more}. "
                "Repair the file, or evaluate without --check"
            )


def _overlaps(data: Iterable[DataConfig], benchmarks: Sequence[Benchmark]) -> dict[tuple[DataConfig, str], Scores]:
    """What the training data repeat of each benchmark, by its name."""
    from ebft_study.data import load_text
    from ebft_study.evaluation.downstream.contamination import overlap

    overlaps: dict[tuple[DataConfig, str], Scores] = {}
    for settings in data:
        text = load_text(settings)
        overlaps |= {(settings, benchmark.name): overlap(benchmark, text) for benchmark in benchmarks}
    return overlaps


def _load(each: TrainedModel, device: Any) -> tuple[LoadedModel, int]:
    """A trial's model with the weights of its checkpoint, and their step."""
    from ebft_study.networks.loading import load_generator
    from ebft_study.training import state

    base = load_generator(each.run, device=device)
    with each.checkpoint.on_disk() as saved:
        return base, state.load_weights(base.model, saved)


def _measure(each: TrainedModel, base: LoadedModel, benchmark: Benchmark, judges: Judges) -> Result:
    from ebft_study.evaluation.downstream import BenchmarkEvaluator
    from ebft_study.evaluation.downstream.protocol import Protocol
    from ebft_study.rollouts.answers import InProcessAnswers
    from ebft_study.training.setup import autocast

    protocol = Protocol.from_config(each.run.evaluation)
    evaluator = BenchmarkEvaluator(benchmark, judges, protocol, InProcessAnswers(), base.tokenizer)
    with autocast(each.run, base.model.device):
        return evaluator.measure(base.model, shown=True)


def _record(study: results.Results, each: TrainedModel, step: int, result: Result) -> None:
    """Write the rows as the attempt that the table of trials has: the newest of equal ones counts."""
    name = str(study.trials["study"].iloc[0])
    recorder = TrialRecorder(study.folder, study=name, trial_id=each.trial_id, attempt=each.attempt)
    recorder.evaluations(step, result.evaluations())
    recorder.scores(step, result.scores())
    recorder.samples(step, result.samples)
    settings = each.run.evaluation.model_dump(include={"evaluation_seed", *BENCHMARK_SETTINGS})
    recorder.event("evaluated", f"the checkpoint of step {step} on {result.benchmark}", step=step, **settings)
