"""Kill -9 at random in the middle of a real study, and compare what is left with an undisturbed one: `make chaos`.

Twelve trials of a tiny model in worker groups, two at a time: EBFT, RLVR and both in one, with a benchmark whose
programs run in the sandbox. Driver, Train controller, worker and trial actor are killed in a random order at random
moments, in the middle of rewards and evaluations too; a killed driver is followed by `resume`. The last line printed is
JSON: what was done and what went wrong. The exit code is 1 if anything did.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from ebft_study import results
from tests import commands
from tests.compare import KEYS, different
from tests.tiny_run import write_data, write_model

TITLES = {"trial": "ray::ImplicitFunc", "controller": "ray::TrainController", "worker": "ray::RayTrainWorker"}
KINDS = ("driver", *TITLES)
TABLES = ("metrics", "evaluations", "scores")
STUDY = {
    "question": "Does a study come to the same end, whatever is killed?",
    "axes": {
        "arm": {
            "choices": {
                "alignment": {"alpha": 0.0},
                "ebft": {"gamma": 0.1},
                "rlvr": {"method": "rlvr", "baseline": "group_norm", "aggregation": "token_mean"},
                "mixture": {"verifier_weight": 1.0},
            }
        }
    },
    "seeds": [0, 1, 2],
    "resources": {"workers_per_trial": 1, "max_failures": 100},
    "budget": {"max_concurrent_trials": 2},
}
RUN = {
    "prompt_column": "prompt", "answer_column": "answer", "anchor_region": "answer", "ce_region": "answer",
    "sequence_length": 48, "completion_length": 4, "stride": 4, "n_samples": 4, "batch_size": 8,
    "verifier": "bleu", "max_answer_tokens": 12,
    "benchmarks": ["mini"], "benchmark_every_steps": 10, "benchmark_problems": 8, "benchmark_samples": 2,
    "benchmark_max_tokens": 12,
    "log_every_steps": 1, "eval_every_steps": 10, "checkpoint_every_steps": 10, "validation_sequences": 4,
    "heldout_sequences": 4, "profile_lengths": [1, 4], "features": {"backend": "local"},
}  # fmt: skip


class Study:
    """A study's folder and the processes that drive it."""

    def __init__(self, cwd: Path, name: str, *, steps: int) -> None:
        self.cwd, self.name = cwd, name
        run = {**RUN, "model": str(cwd / "model"), "dataset": str(cwd / "data.jsonl"), "steps": steps}
        (cwd / f"{name}.yaml").write_text(yaml.safe_dump({"study": name, **STUDY, "run": run}))
        self.log = (cwd / f"{name}.log").open("ab")
        self.driver: subprocess.Popen[str] | None = None

    @property
    def folder(self) -> Path:
        return self.cwd / "studies" / self.name

    def start(self, *arguments: str) -> None:
        self.driver = commands.start(*arguments, cwd=self.cwd, output=self.log)

    @property
    def running(self) -> bool:
        return self.driver is not None and self.driver.poll() is None

    def family(self) -> list[psutil.Process]:
        """The driver's descendants; empty when it has gone."""
        return commands.family(self.driver) if self.driver else []

    def rows(self) -> set[tuple[str, int]]:
        metrics = results.read_table(self.folder, "metrics")
        return set(zip(metrics["trial_id"], metrics["step"], strict=True))

    def ended(self) -> dict[str, int]:
        """Trials that are on record as over, and the attempt that did it."""
        trials = results.read_table(self.folder, "trials")
        over = trials[trials["status"].isin(["finished", "failed", "stopped"])]
        return dict(zip(over["trial_id"], over["attempt"], strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=150, help="of each trial")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed when")
    parser.add_argument("--minutes", type=float, default=25.0, help="give up after this time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ebft-chaos-") as folder:
        cwd = Path(folder)
        write_model(cwd / "model")
        write_data(cwd / "data.jsonl", answers=True, examples=200)
        counts = Ordeal(cwd, options).run()
    print(json.dumps(counts))
    return int(any(counts["problems"].values()))


class Ordeal:
    """One undisturbed study, the same one with kills, and the comparison."""

    def __init__(self, cwd: Path, options: argparse.Namespace) -> None:
        self.options, self.random = options, random.Random(options.seed)
        self.calm = Study(cwd, "calm", steps=options.steps)
        self.study = Study(cwd, "chaos", steps=options.steps)
        self.deadline = time.monotonic() + 60 * options.minutes
        self.killed: Counter[str] = Counter()
        self.seen_rows: set[tuple[str, int]] = set()
        self.seen_ended: dict[str, int] = {}
        self.family: set[psutil.Process] = set()
        self.orphans: list[str] = []
        self.crashes = 0

    def run(self) -> dict[str, Any]:
        began = time.monotonic()
        self.calm.start("study", "calm.yaml")
        self._follow(self.calm)
        say(f"undisturbed: {time.monotonic() - began:.0f} s, {len(self.calm.rows())} rows")
        calm_seconds = time.monotonic() - began
        self.study.start("study", "chaos.yaml")
        for kind in self._order():
            self._kill(kind)
        self._follow(self.study)
        self._wait_for_the_dead()
        return {
            "kills": dict(self.killed),
            "seconds": round(time.monotonic() - began),
            "undisturbed_seconds": round(calm_seconds),
            "attempts": int(results.read_table(self.study.folder, "trials")["attempt"].sum()),
            "trials": len(self.study.ended()),
            "rows": len(self.study.rows()),
            "problems": self._problems(),
        }

    def _order(self) -> Iterator[str]:
        """Every kind equally often, as far as the number allows."""
        kinds = [KINDS[number % len(KINDS)] for number in range(self.options.kills)]
        self.random.shuffle(kinds)
        return iter(kinds)

    def _kill(self, kind: str) -> None:
        """Wait until there is such a process and something to lose, and a random while longer."""
        before = len(self.study.rows()) if self.study.folder.exists() else 0
        pause = self.random.uniform(1.0, 8.0)
        found: list[psutil.Process] = []
        while not found or pause > 0 or len(self.study.rows()) <= before:
            time.sleep(0.25)
            pause -= 0.25
            self._watch()
            if not self.study.running:
                say(f"the study ended before a {kind} could be killed")
                return
            found = self._processes(kind)
        victim = self.random.choice(found)
        self._remember()
        os.kill(victim.pid, signal.SIGKILL)
        self.killed[kind] += 1
        number, rows, over = sum(self.killed.values()), len(self.seen_rows), len(self.seen_ended)
        say(f"{number:3d} killed a {kind} at {rows} rows, {over} trials ended")
        if kind == "driver":
            assert self.study.driver is not None
            self.study.driver.wait()
            self._wait_for_the_dead()
            self.study.start("resume", "chaos")

    def _processes(self, kind: str) -> list[psutil.Process]:
        if kind == "driver":
            assert self.study.driver is not None
            return [psutil.Process(self.study.driver.pid)]
        return [process for process in self.study.family() if commands.title(process).startswith(TITLES[kind])]

    def _remember(self) -> None:
        self.family.update(self.study.family())
        self.seen_rows |= self.study.rows()
        self.seen_ended |= self.study.ended()

    def _watch(self) -> None:
        if time.monotonic() > self.deadline:
            for study in (self.calm, self.study):
                if study.driver and study.running:
                    study.driver.terminate()
            raise SystemExit(f"gave up after {self.options.minutes:g} minutes; see {self.study.cwd}")

    def _follow(self, study: Study) -> None:
        """Until the driver has ended by itself."""
        while study.running:
            self._watch()
            self.family.update(study.family())
            time.sleep(0.5)
        assert study.driver is not None
        self.crashes += study.driver.returncode != 0
        if study.driver.returncode:
            print(Path(study.log.name).read_text()[-3000:], file=sys.stderr)

    def _wait_for_the_dead(self) -> None:
        ours = [process for process in self.family if not commands.title(process).startswith(commands.RAY_AGENTS)]
        alive = commands.outlived(ours, 40)
        self.orphans += [commands.title(process) for process in alive]
        self.family -= set(ours)

    def _problems(self) -> dict[str, Any]:
        over = self.study.ended()
        statuses = Counter(results.read_table(self.study.folder, "trials")["status"])
        return {
            "drivers_that_failed": self.crashes,
            "trials_not_finished": sum(statuses.values()) - statuses["finished"],
            "trials_missing": len(set(self.calm.ended()) - set(over)),
            "trials_that_ended_twice": sum(over.get(name) != attempt for name, attempt in self.seen_ended.items()),
            "rows_lost": len((self.seen_rows | self.calm.rows()) - self.study.rows()),
            "rows_twice": sum(duplicates(self.study.folder, table) for table in TABLES),
            "rows_that_differ": sum(different(self.calm.folder, self.study.folder, table) for table in TABLES),
            "orphans": len(self.orphans),
        }


def duplicates(folder: Path, table: str) -> int:
    return int(results.read_table(folder, table).duplicated(KEYS[table]).sum())


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
