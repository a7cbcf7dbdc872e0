"""One study with one fault: what it went through, and what is wrong with it at its end."""

from __future__ import annotations

import fnmatch
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebft_study import results
from ebft_study.results import copies, reader
from ebft_study.storage import StoragePath
from tests.faults import kinds, studies
from tests.faults.calls import OPERATIONS, Fault, Shared
from tests.faults.studies import NOTHING, Session
from tests.s3_server import BUCKET, tell

PROBLEMS = ("lost", "twice", "different", "silent", "hangs", "tracebacks", "leftovers")


@dataclass(frozen=True)
class Calm:
    """An undisturbed study: its tables, the file calls of its processes, and its time."""

    tables: dict[str, Any]
    calls: dict[str, Counter[str]]
    seconds: float
    requests: int = 0
    """To the store."""


def undisturbed(root: Path, name: str, query: str = "") -> Calm:
    """The study `name`, on a disk, or in the store that `query` names."""
    home = root / f"calm-{name}-{'store' if query else 'disk'}"
    home.mkdir()
    studies.write_study_file(home / "study.yaml", name)
    storage = f"s3://{BUCKET}/{home.name}?{query}" if query else str(home / "storage")
    if query:
        tell(query, home.name)
    session = Session(home, "study", str(home / "study.yaml"), "--storage", storage)
    assert session.wait(), "the undisturbed study hangs"
    seconds = studies.time.monotonic() - session.began
    assert session.code == 0, session.text
    requests = tell(query, home.name)["counted"] if query else 0
    found = studies.in_process(lambda: studies.tables(studies.folder_of(storage, name)))
    assert not found["problems"], found["problems"]
    calls = {
        path.stem.rpartition("-")[2]: Counter(json.loads(path.read_text()))
        for path in root.glob(f"{home.name}-*.calls")
    }
    shutil.rmtree(home)
    return Calm(found, calls, seconds, requests)


class Ordeal:
    """A study, in a folder of its own."""

    def __init__(self, root: Path, calm: dict[str, Calm], kind: str, index: int, seed: int, query: str) -> None:
        self.kind, self.index, self._calms = kind, index, calm
        self.query = query if kind.startswith("s3_") else ""
        self.random = random.Random(f"{seed}-{kind}-{index}")
        self.home = root / f"{kind}-{index}"
        self.shared = Shared()
        self.fired = self.gone = False
        self.damaged: Path | None = None
        self._affected: dict[str, set[str]] = {}
        self.problems: Counter[str] = Counter()
        self.notes: list[str] = []
        self.unnamed = False
        self.choose("store" if self.query else "optuna" if self.random.random() < 0.25 else "grid")
        self._begun = False
        self.home.mkdir()

    def choose(self, name: str) -> None:
        self.name, self.calm = name, self._calms[name]

    @property
    def storage(self) -> str:
        return f"s3://{BUCKET}/{self.home.name}?{self.query}" if self.query else str(self.home / "storage")

    @property
    def folder(self) -> StoragePath:
        """Of the study; to be opened in a process of its own."""
        return studies.folder_of(self.storage, self.name)

    @property
    def path(self) -> Path:
        return self.home / "storage" / self.name

    @property
    def has_record(self) -> bool:
        if self.query:
            return bool(studies.in_process(lambda: copies.either_exists(self.folder / "study.yaml")))
        return (self.path / "study.yaml").exists() or (self.path / ".study.yaml.copy").exists()

    def expect(self, holds: bool, otherwise: str, problem: str) -> None:
        if not holds:
            self.problems[problem] += 1
            self.notes.append(f"{problem}: {otherwise}")

    # --- sessions ----------------------------------------------------------------------------------------------

    def session(self, *arguments: str, fault: Fault = NOTHING) -> Session:
        shared = self.shared if fault != NOTHING else None
        return Session(self.home, *arguments, "--storage", self.storage, fault=fault, shared=shared)

    def start(self, fault: Fault = NOTHING) -> Session:
        """The study's next session."""
        if self.has_record:
            return self.session("resume", self.name, fault=fault)
        studies.write_study_file(self.home / "study.yaml", self.name)
        return self.session("study", str(self.home / "study.yaml"), "--resume", fault=fault)

    def some_call(self, operations: tuple[str, ...], processes: str = "*") -> tuple[str, int]:
        """A file call at random: its process, and its number there."""
        counts = {
            process: sum(calls[operation] for operation in operations)
            for process, calls in self.calm.calls.items()
            if fnmatch.fnmatch(process, processes)
        }
        process = self.random.choices(list(counts), list(counts.values()))[0]
        return process, self.random.randint(1, max(counts[process], 1))

    def cut_short(self) -> None:
        """A session that is killed somewhere."""
        process, at = self.some_call(OPERATIONS, "driver")
        self.shared.clear()
        running = self.start(Fault("kill", process, at, everything=True))
        self.ended(running, killed=True)

    def strike(self, fault: Fault, meanwhile: Callable[[], None] | None = None, *, fresh: bool = False) -> Session:
        """A session with a fault: the first one, or one that resumes the study."""
        if not fresh and fault.action and self.random.random() < 0.5:
            self.cut_short()
        self.shared.clear()
        running = self.start(fault)
        self.ended(running, meanwhile, killed=fault.action in ("kill", "torn"))
        self.fired = self.fired or self.shared.fired
        return running

    def ended(self, running: Session, meanwhile: Callable[[], None] | None = None, *, killed: bool = False) -> None:
        """Wait for a session, and look at how it ended and what it left."""
        self.expect(running.wait(meanwhile), f"a session hangs: {running.text[-300:]}", "hangs")
        self.expect("Traceback" not in running.text, running.text[-1500:], "tracebacks")
        usual = running.code in ((0, 1, 2, -9) if killed else (0, 1, 2))
        self.expect(usual, f"code {running.code}: {running.text[-300:]}", "tracebacks")
        if self.has_record and not self.damaged:
            self._check_acknowledged()

    def start_over(self) -> None:
        """Forget the study."""
        shutil.rmtree(self.home)
        self.home.mkdir()

    # --- damage ------------------------------------------------------------------------------------------------

    def damage(self, pattern: str, how: Callable[[Path, random.Random], None]) -> None:
        """Damage a file at random, if there is one."""
        files = sorted(self.path.glob(pattern))
        if not files:
            return
        path = self.random.choice(files)
        self._affected = studies.in_process(lambda: rows_in(path))
        before = path.read_bytes()
        how(path, self.random)
        if path.exists() and path.read_bytes() == before:
            return
        self.damaged = path
        self.fired = True

    # --- the end -----------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Resume without faults, and compare with the undisturbed study."""
        if self.gone:
            again = self.session("resume", self.name)
            self.expect(again.wait() and again.code == 2, f"resumes what is gone: {again.text[-300:]}", "different")
            return
        named = ""
        for _ in range(2):  # the second one finds nothing to do
            running = self.start()
            self.ended(running)
            named += running.text
        if self.damaged == self.path / "study.yaml" and (running.code == 2 or "since the study began" in named):
            return  # a flipped bit looks like an edit, which is named or refused
        self.expect(running.code == 0, f"resume ends with {running.code}: {running.text[-600:]}", "different")
        if not self.has_record:
            return
        try:
            found = studies.in_process(lambda: studies.tables(self.folder))
        except RuntimeError as error:
            self.expect(False, str(error)[-1500:], "tracebacks")
            return
        self._compare(found, named + "\n".join(found["problems"]))

    def _compare(self, found: dict[str, Any], said: str) -> None:
        calm = self.calm.tables
        is_named = self.damaged is not None and any(sign in said for sign in (self.damaged.name, *self._signs()))
        self.unnamed = self.damaged is not None and not is_named
        for table in results.TABLES:
            if table == "events":
                continue
            there, expected = found[table], calm[table]
            gone, more = expected.keys() - there.keys(), there.keys() - expected.keys()
            excused = gone & set(self._affected.get(table, ()))
            self.expect(not gone - excused, f"{table}: {sorted(gone - excused)[:3]}", "lost")
            self.expect(not excused or is_named, f"{table}: {sorted(excused)[:3]} are missing, unnamed", "silent")
            self.expect(not more, f"{table}: {sorted(more)[:3]} should not be there", "twice")
            for key in there.keys() & expected.keys():
                if there[key] != expected[key]:
                    differs = [(a, b) for a, b in zip(there[key], expected[key], strict=True) if a != b]
                    # The best value of a trial follows from its rows of metrics, as far as they are there.
                    excused = table == "trials" and "metrics" in self._affected and is_named and len(differs) == 1
                    self.expect(excused, f"{table} {key}: {differs[:3]} (found, expected)", "different")
        for trial, step in calm["best"].items():
            # Hashes of weights are checked when they are loaded.
            excused = is_named or "safetensors" in str(self.damaged)
            right = found["best"].get(trial) == step
            self.expect(
                right or excused, f"best checkpoint of {trial}: {found['best'].get(trial)}, not {step}", "silent"
            )
        for table, key in studies.acknowledged(self.home):
            if table == "ended" and not (self.damaged and "trials" in str(self.damaged)):
                trial, attempt = key
                self.expect(found["attempts"].get(trial, 0) <= attempt, f"{trial} ran again after its end", "twice")
        self.expect(not found["leftovers"], str(found["leftovers"][:3]), "leftovers")
        if not self.damaged:
            self.expect(not found["problems"], f"problems without damage: {found['problems'][:2]}", "different")

    def _signs(self) -> list[str]:
        """What else than its name points to the damaged file."""
        assert self.damaged
        numbered = re.match(r"(.+-a\d+)-\d{6}-", self.damaged.name)
        if self.damaged.name.startswith("compacted-"):  # a later compaction knows it no more, but counts its files
            return [f"files of {trial}-a" for trial in self.calm.tables["best"]]
        is_checkpoint = self.damaged.parent.name.startswith("checkpoint_")
        return [f"files of {numbered[1]} are missing"] if numbered else [str(self.damaged.parent)] * is_checkpoint

    def _check_acknowledged(self) -> None:
        """Every row whose writer was told that it is kept is readable now."""
        try:
            there = studies.in_process(lambda: keys_in(self.folder))
        except RuntimeError as error:
            self.expect(False, str(error)[-1500:], "tracebacks")
            return
        keys: dict[str, set[str]] = {}
        for table, key in studies.acknowledged(self.home):
            if table in results.TABLES:
                keys.setdefault(table, set()).add(json.dumps(key))
        for table, told in keys.items():
            gone = told - set(there[table])
            self.expect(not gone, f"{table}: {sorted(gone)[:3]} after the fault", "lost")

    def report(self) -> dict[str, Any]:
        return {
            "run": f"{self.kind} {self.index}",
            "kind": self.kind,
            "study": self.name,
            "fired": self.fired,
            "unnamed": self.unnamed,
            "damaged": str(self.damaged.relative_to(self.home)) if self.damaged else "",
            "problems": dict(self.problems),
            "notes": self.notes,
        }


def rows_in(path: Path) -> dict[str, list[str]]:
    """Table -> the keys of the rows in a results file; empty for any other."""
    table = path.parent.name
    if path.suffix != ".parquet" or table not in results.TABLES or table == "trials":
        return {}
    rows = reader.read_file(studies.storage_path(path), table).to_pylist()
    return {table: [json.dumps([row[key] for key in reader._KEYS[table]]) for row in rows]}


def keys_in(folder: StoragePath) -> dict[str, list[str]]:
    """Table -> the keys of all rows."""
    found = {}
    for table in results.TABLES:
        rows = results.read_table(folder, table)[reader._KEYS[table]].to_dict("records")
        found[table] = [json.dumps([results.cell_value(value) for value in row.values()]) for row in rows]
    return found


def run(
    root: Path, calm: dict[str, Calm], kind: str, index: int, seed: int, *, query: str = "", keep: bool = False
) -> dict[str, Any]:
    """One ordeal from its beginning to its end. A fault that did not happen is tried again."""
    ordeal = None
    for attempt in range(8):
        ordeal = Ordeal(root, calm, kind, index + 1000 * attempt, seed, query)
        kinds.KINDS[kind](ordeal)
        if ordeal.fired:
            ordeal.finish()
        if not keep:
            shutil.rmtree(ordeal.home)
        if ordeal.fired or ordeal.problems:
            break
    assert ordeal is not None
    return ordeal.report()
