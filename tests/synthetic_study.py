"""A study with a known outcome, written through the recorders as a real one is."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import yaml

from ebft_study import config
from ebft_study.results import StudyRecorder, TrialRecorder, copies, read_table
from ebft_study.results.writer import FileSequence, as_parquet, put_in_place
from ebft_study.storage import storage_path

LENGTHS = (1, 2, 4, 8, 16, 32)
SEQUENCES = 120
BASE_CE, JUDGE_CFM = 3.639, 1.5
BASE_CFM = dict(zip(LENGTHS, (1.214, 1.667, 2.165, 2.648, 2.871, 3.012), strict=True))
STARTED = datetime.datetime(2026, 3, 1, 9, 0, tzinfo=datetime.UTC)
# (alpha, gamma) -> change of (CE, CFM) by training, of the kind that the paper reports; None is SFT.
PAPER_LIKE = {
    (0.0, 0.0): (0.31, 0.26),
    (0.0, 0.03): (0.12, 0.17),
    (0.0, 0.1): (0.02, 0.08),
    (0.5, 0.0): (0.06, 0.03),
    (0.5, 0.03): (-0.03, 0.004),
    (0.5, 0.1): (-0.09, -0.004),
    (1.0, 0.0): (-0.021, -0.034),
    (1.0, 0.03): (-0.07, -0.032),
    (1.0, 0.1): (-0.13, -0.029),
    None: (-0.25, -0.009),
}
Effect = tuple[float, float]
NOT_BEGUN = ("pending", "skipped")


def write_study(
    folder: Path,
    *,
    effects: Mapping[Any, Effect] = PAPER_LIKE,
    settings: Callable[[Any], dict[str, Any]] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    noise: float = 0.002,
    steps: int = 40,
    log_every: int = 20,
    statuses: Mapping[tuple[Any, int], str] | None = None,
    growth: float = 0.4,
    warm: Effect = (0.0, 0.0),
    with_start: bool = True,
    with_scores: bool = False,
    parameters: Mapping[str, int] | None = None,
    choices: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
    with_savings: bool = False,
) -> Path:
    """Write a study whose configuration `key` changes CE and CFM by `effects[key]`; the key None is the SFT baseline.

    `settings(key)` gives a configuration's settings as short names; by default the key is (alpha, gamma). The change
    of CFM at length L is `effect * (1 + growth * log2(L / 8))`. Where `settings(key)` has warm_start_steps, they change
    CE and CFM by `warm` before the effect begins. `statuses[key, seed]` ends a trial differently. Older versions lack
    held-out values at the end of a warm start (`with_start`), and values of single sequences (`with_scores`).
    Models have the number of `parameters` of their name. `choices` has the one axis of choices of the study file, whose
    settings `settings` gives besides those of all trials; keys are its choices then. Stopped trials record what that
    saved (`with_savings`).
    """
    with one_file_per_table(folder):
        return _write(
            folder,
            effects,
            settings,
            seeds,
            noise,
            steps,
            log_every,
            statuses or {},
            growth,
            warm,
            with_start,
            with_scores,
            parameters or {},
            choices or {},
            with_savings,
        )


@contextlib.contextmanager
def one_file_per_table(folder: Path) -> Iterator[None]:
    """Context in which recorders write their rows at the end, by table: files of a row each take most of the time."""
    tables = defaultdict[str, list[Mapping[str, Any]]](list)

    def keep(files: FileSequence, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
        files._count += 1  # a part of the identifiers of events
        tables[table] += rows

    with mock.patch("os.fsync"):  # they need not survive a power cut
        with mock.patch.object(FileSequence, "write", keep):
            yield
        together = FileSequence(folder, "synthetic", 0)
        for table, rows in tables.items():
            together.write(table, rows)


def _write(
    folder: Path,
    effects: Mapping[Any, Effect],
    settings: Callable[[Any], dict[str, Any]] | None,
    seeds: Sequence[int],
    noise: float,
    steps: int,
    log_every: int,
    statuses: Mapping[tuple[Any, int], str],
    growth: float,
    warm: Effect,
    with_start: bool,
    with_scores: bool,
    parameters: Mapping[str, int],
    choices: Mapping[str, Mapping[str, Mapping[str, Any]]],
    with_savings: bool,
) -> Path:
    settings = settings or (lambda key: {"alpha": key[0], "gamma": key[1]})
    study, trials = StudyRecorder(folder, study=folder.name), list[dict[str, Any]]()
    write_spec(folder, choices)
    for number, (key, seed) in enumerate(itertools.product(effects, seeds)):
        chosen = {"method": "sft"} if key is None else settings(key)
        status = statuses.get((key, seed), "finished")
        name = "sft" if key is None else " ".join(f"{k}={v}" for k, v in chosen.items())
        for axis, by_choice in choices.items():
            name = name if key is None else f"{axis}={key}"
            chosen |= by_choice[key] if key is not None else {}
        run = config.build_run(config.nest({**chosen, "seed": seed, "steps": steps}, source="test"), source="test")
        trial_id = f"t{number:03d}"
        random = np.random.default_rng([seed, number])
        shared = np.random.default_rng(seed).normal(0, 3 * noise, 2)
        effect = np.array(effects[key]) + shared + random.normal(0, noise, 2)
        done = (
            run.total_steps if status == "finished" else 0 if status in (*NOT_BEGUN, "failed") else run.total_steps // 2
        )
        if status not in NOT_BEGUN:
            recorder = TrialRecorder(folder, study=folder.name, trial_id=trial_id, attempt=0)
            _record(
                recorder,
                run,
                effect,
                growth,
                random,
                done=done,
                log_every=log_every,
                noise=noise,
                warm=warm,
                with_start=with_start,
                with_scores=with_scores,
            )
        trials.append(
            {
                "trial_id": trial_id,
                "label": f"{name} seed={seed}",
                "configuration": name,
                "named_baseline": "sft" if key is None else None,
                "status": status,
                "startup_seconds": 6.2 + random.random(),
                "steps_saved": run.total_steps - done if with_savings and status == "stopped" else None,
                "parameters": parameters.get(run.model, 1_050_000),
                **_trial_row(run, number, status, done),
            }
        )
        if status == "failed":
            study.event("failed", "RuntimeError: worker died", trial_id=trial_id, attempt=0)
    study.trials(trials)
    return folder


def _trial_row(run: config.RunConfig, number: int, status: str, done: int) -> dict[str, Any]:
    """The columns of `trials` that follow from a trial's run, its place in the study and its end."""
    start = STARTED + datetime.timedelta(seconds=31.5 * number)
    cost = cost_at(run, done)
    return {
        "attempt": 0,
        "stop_reason": "loss became nan at step 20; lower learning_rate" if status == "stopped" else None,
        "error": "RuntimeError: worker died" if status == "failed" else None,
        "hyperparameters": config.flatten(run),
        "started_at": start,
        "finished_at": start + datetime.timedelta(seconds=30) if status not in NOT_BEGUN else None,
        "total_seconds": 30.0,
        "train_seconds": 23.0,
        "steps_done": done,
        "sequences_seen": done * run.training.batch_size,
        "tokens_seen": done * run.training.batch_size * run.data.sequence_length,
        "peak_memory_bytes": 1_150_000_000,
        **cost,
        "sampled_tokens": int(cost["sampled_tokens"]),
        "trainable_parameters": 1_050_000,
        "feature_parameters": 820_000,
        "gpu_seconds": 0.0,
        "host": "laptop",
    }


def _record(
    recorder: TrialRecorder,
    run: config.RunConfig,
    effect: np.ndarray,
    growth: float,
    random: np.random.Generator,
    *,
    done: int,
    log_every: int,
    noise: float,
    warm: Effect,
    with_start: bool,
    with_scores: bool,
) -> None:
    g, first, steps = run.rollout.completion_length, run.training.warm_start_steps, run.training.steps
    moved = np.array(warm) * (first > 0)
    for step in sorted({*range(0, done + 1, log_every), *([first] if first <= done else [])}):
        part = (1 - math.exp(-3 * max(0, step - first) / steps)) / (1 - math.exp(-3))
        change = part * effect + moved * (min(step / first, 1.0) if first else 0.0)
        values = {
            "ce_loss": BASE_CE + 0.004 + change[0] + random.normal(0, noise) * (step > 0),
            "cfm_loss": BASE_CFM[g] + 0.01 + change[1] + random.normal(0, noise) * (step > 0),
        }
        values |= cost_at(run, step)
        if run.evaluation.judge:
            values["judge_cfm_loss"] = JUDGE_CFM + change[1]
        if step > 0 and run.method == "ebft":
            start = 0.52 + 0.9 * (1 - run.reward.alpha)
            values |= {"reward": start - 2 * part * effect[1] + random.normal(0, 0.02), "loss": 0.1}
        recorder.metrics(step, values)
    heldout = {0: (0.0, 0.0)} | ({first: (1.0, 0.0)} if first <= done and with_start else {})
    for step, (warmed, part) in (heldout | ({done: (1.0, 1.0)} if done == run.total_steps else {})).items():
        total = warmed * moved + part * effect
        rows = [_row("ce_loss", None, BASE_CE + total[0], 60_000)]
        for length in LENGTHS:
            change = total[1] * (1 + growth * math.log2(length / 8))
            rows.append(_row("cfm_loss", length, BASE_CFM[length] + change, 1_920))
        if run.evaluation.judge:
            rows.append(_row("judge_cfm_loss", None, JUDGE_CFM + total[1], 1_920))
        if with_scores:
            recorder.scores(step, [_scores(row) for row in rows])
        for k in range(1, max(LENGTHS) + 1):
            drift = (0.004 if run.method == "sft" else 0.001) * part - 0.006
            rows.append(_row("entropy", k, 1.9 + 0.2 * math.exp(-k / 3) + drift * k + part * effect[0] / 4, 1_920))
        recorder.evaluations(step, rows)
    if run.seed != 0:
        return
    texts = {"context": "def area(r):\n    return ", "completion": "3.14 * r ** 2\n", "ground_truth": "math.pi * r * r"}
    parts = {"reward": 0.7, "alignment": 1.6, "diversity": -0.9, "advantage": 0.1}
    recorder.samples(done, [{"sequence": 3, "anchor": 16, "sample": j, **texts, **parts} for j in range(2)])


METHODS: dict[str, dict[str, Any]] = {
    "SFT": {"method": "sft"},
    "EBFT": {"method": "ebft"},
    "EBFT (ws.)": {"method": "ebft", "warm_start_steps": 20},
    "RLVR": {"method": "rlvr", "verifier": "unit_tests"},
    "RLVR (ws.)": {"method": "rlvr", "verifier": "unit_tests", "warm_start_steps": 20},
}
"""Settings of the methods of Table 1, for `of_method`."""
LEVELS = {
    "Base": 0.3,
    "Warm start": 0.33,
    "SFT": 0.34,
    "EBFT": 0.45,
    "EBFT (ws.)": 0.46,
    "RLVR": 0.38,
    "RLVR (ws.)": 0.46,
}
"""Scores of a study that is like the paper, for `write_benchmark`."""
EFFECTS: dict[Any, Effect] = {
    "SFT": (-0.2, -0.01),
    "EBFT": (-0.1, -0.05),
    "EBFT (ws.)": (-0.1, -0.05),
    "RLVR": (0.3, 0.1),
    "RLVR (ws.)": (0.2, 0.1),
}
"""Its changes of CE and CFM by training."""


def of_method(key: Any) -> dict[str, Any]:
    """Settings of a method by name, or by name and learning rate."""
    name, *rates = (key,) if isinstance(key, str) else key
    return {"dataset": "mini_functions", **METHODS[name], **({"learning_rate": rates[0]} if rates else {})}


def write_benchmark(
    folder: Path, levels: Mapping[str, float], *, name: str = "mini", noise: float = 0.004, problems: int = 50
) -> None:
    """Add pass@1 to a study of `METHODS`: `levels` are those of `Base`, `Warm start` and, at the end, each method.

    Problems differ far more than models do.
    """
    with one_file_per_table(folder):
        _write_benchmark(folder, levels, name, noise, problems)


def _write_benchmark(folder: Path, levels: Mapping[str, float], name: str, noise: float, problems: int) -> None:
    difficulty = np.random.default_rng(5).normal(0, 0.3, problems)
    for number, row in enumerate(read_table(folder, "trials").to_dict("records")):
        if row["status"] != "finished":
            continue
        warm = int(row["warm_start_steps"])
        method = next(
            n for n, s in METHODS.items() if s["method"] == row["method"] and warm == s.get("warm_start_steps", 0)
        )
        recorder = TrialRecorder(folder, study=folder.name, trial_id=row["trial_id"], attempt=int(row["attempt"]))
        moments = {0: ("Base", 0), **({warm: ("Warm start", 1)} if warm else {}), int(row["steps_done"]): (method, 2)}
        for step, (moment, shift) in moments.items():
            own = np.random.default_rng([number, step, shift])
            values = levels[moment] + difficulty - difficulty.mean() + own.normal(0, noise, problems) * (shift > 1)
            values = values + own.normal(0, noise) * (shift > 1)
            key = {"benchmark": name, "metric": "pass_at_k", "position": 1}
            recorder.evaluations(step, [{**key, "value": values.mean(), "standard_error": 0.1, "count": problems}])
            numbers = {"sequences": list(range(problems)), "counts": [1] * problems}
            recorder.scores(step, [{**key, **numbers, "values": values.tolist()}])


def _scores(row: Mapping[str, Any]) -> dict[str, Any]:
    """Values of sequences that differ far more than models do, and move with the model a little differently each."""
    random = np.random.default_rng(17)
    easy, moves = random.normal(0.0, 0.5, SEQUENCES), random.normal(1.0, 0.2, SEQUENCES)
    base = {"ce_loss": BASE_CE, "judge_cfm_loss": JUDGE_CFM}.get(row["metric"]) or BASE_CFM[row["position"]]
    values = base + (easy - easy.mean()) + (row["value"] - base) * moves / moves.mean()
    counts = [row["count"] // SEQUENCES] * SEQUENCES
    keys = ("benchmark", "metric", "position")
    return {
        **{key: row[key] for key in keys},
        "sequences": list(range(SEQUENCES)),
        "counts": counts,
        "values": values.tolist(),
    }


def cost_at(run: config.RunConfig, step: int) -> dict[str, float]:
    """An update by SFT costs 1e9 FLOPs and 0.1 s, one by EBFT three times the FLOPs and twice the time."""
    first = run.training.warm_start_steps
    own, sft = (0, step) if run.method == "sft" else (max(step - first, 0), min(step, first))
    flops = {"rollout_flops": 1e9 * own, "feature_flops": 0.5e9 * own, "scoring_flops": 1e9 * sft + 1.5e9 * own}
    return {
        **flops,
        "flops": sum(flops.values()),
        "evaluation_flops": 4e8,
        "sampled_tokens": 512.0 * own,
        "update_seconds": 0.1 * sft + 0.2 * own,
        "cpu_seconds": 0.4 * own + 0.2 * sft + 2.0,
    }


def _row(metric: str, position: int | None, value: float, count: int) -> dict[str, Any]:
    row = {"benchmark": "heldout", "metric": metric, "position": position, "value": value, "count": count}
    return {**row, "standard_error": 0.011 if metric == "cfm_loss" else None}


def write_spec(folder: Path, choices: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    spec = {
        "study": folder.name,
        "question": "Does EBFT calibrate a small model <without> hurting its cross-entropy?",
        "profile": "cpu",
        "search": {"algorithm": "grid", "num_configurations": None},
        "resources": {"workers_per_trial": 1, "cpus_per_worker": 2, "gpus_per_worker": 0.0},
        "created_at": "2026-03-01T09:00:00+00:00",
        "file": {"name": "quickstart.yaml", "sha256": "ab" * 32},
        "git_revision": "0123456789abcdef",
        "versions": {"python": "3.11.7", "torch": "2.13.0", "ray": "2.60.0"},
        "provenance": {
            "data": {"qa": {"examples": {"train": 4000, "heldout": 600}, "fingerprint": "9f" * 32}},
            "models": {"tiny-1m": {"parameters": 1_050_000, "perplexity": 13.1, "trigram_perplexity": 61.0}},
        },
    }
    if choices:
        spec["axes"] = {axis: {"choices": {k: dict(v) for k, v in each.items()}} for axis, each in choices.items()}
    (folder / "study.yaml").write_text(yaml.safe_dump(spec))


def rewrite(path: Path, table: pa.Table) -> None:
    """Replace a file of results by another table, as its writer would have written it."""
    if path.parent.name == "trials":
        copies.write(storage_path(path), as_parquet(table))
        return
    path.unlink()
    put_in_place(table, storage_path(path.parent), re.sub(r"(-[0-9a-f]{16})?[.]parquet", "", path.name))
