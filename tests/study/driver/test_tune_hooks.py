"""Ray's side of a study, without a cluster: the relay, and the adapters that Tune calls."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.tune.search import Searcher

from ebft_study.errors import DataError, EbftError, StorageError
from ebft_study.study.driver import trial
from ebft_study.study.driver.relay import Relay
from ebft_study.study.driver.tune_hooks import Observer, StudySearcher, StudyStopper
from ebft_study.study.folder.trial_states import TrialResult
from ebft_study.study.search.listed import ListedSearch
from ebft_study.study.spec import normalize, trials
from ebft_study.study.spec.study_spec import ResourcesSpec
from ebft_study.study.spec.trial_task import TrialTask
from ebft_study.study.stopping.rules import RuleMonitor
from ebft_study.training import RunResult, setup
from ebft_study.training.recorded import LOOP, train_recorded
from tests.studies import task, task_of
from tests.tiny_run import tiny_config

# --- relay -----------------------------------------------------------------------------------------------------


def test_items_arrive_in_order_and_boxes_are_apart() -> None:
    async def scene() -> list[Any]:
        relay = Relay()
        senders = [relay.put("a", number) for number in range(3)] + [relay.put("b", "other")]
        tasks = [asyncio.create_task(sender) for sender in senders]
        taken = [await relay.take("a", 1.0) for _ in range(3)] + [await relay.take("b", 1.0)]
        await asyncio.gather(*tasks)
        return taken

    assert asyncio.run(scene()) == [(0,), (1,), (2,), ("other",)]


def test_a_sender_waits_until_the_item_before_is_taken() -> None:
    async def scene() -> list[bool]:
        relay = Relay()
        await relay.put("a", 1)
        second = asyncio.create_task(relay.put("a", 2))
        await asyncio.sleep(0)
        waiting = second.done()
        await relay.take("a", 1.0)
        await second
        return [waiting, second.done()]

    assert asyncio.run(scene()) == [False, True]


def test_taking_from_an_empty_box_gives_up_in_time() -> None:
    assert asyncio.run(Relay().take("a", 0.01)) is None


def test_nothing_that_is_none_is_mistaken_for_nothing() -> None:
    async def scene() -> Any:
        relay = Relay()
        await relay.put("a", None)
        return await relay.take("a", 1.0)

    assert asyncio.run(scene()) == (None,)


def test_closing_a_box_lets_its_senders_go() -> None:
    async def scene() -> None:
        relay = Relay()
        tasks = [asyncio.create_task(relay.put("a", number)) for number in range(3)]
        await asyncio.sleep(0)
        await relay.close("a")
        await asyncio.wait_for(asyncio.gather(*tasks), 1.0)
        await relay.close("never opened")

    asyncio.run(scene())


# --- adapters --------------------------------------------------------------------------------------------------


class Recorded:
    """A monitor that records its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def planned(self, trial: trials.Trial) -> None:
        self.calls.append(("planned", trial.trial_id))

    def started(self, trial_id: str) -> None:
        self.calls.append(("started", trial_id))

    def resumed(self, trial_id: str) -> None:
        self.calls.append(("resumed", trial_id))

    def reported(self, trial_id: str, metrics: dict[str, Any]) -> None:
        self.calls.append(("reported", trial_id, metrics["step"]))

    def retried(self, trial_id: str, problem: str) -> None:
        self.calls.append(("retried", trial_id, problem))

    def ended(self, trial_id: str, outcome: dict[str, Any]) -> TrialResult:
        self.calls.append(("ended", trial_id, outcome["status"], outcome["reason"]))
        return TrialResult("finished", 1.0, 4)


def listed() -> ListedSearch:
    spec = normalize.from_record({"study": "s", "question": "q", "axes": {"alpha": [0.0, 1.0]}}, source="test")
    return ListedSearch(trials.trials_of(spec, trials.enumerated(spec)))


def tune_trial(error_file: str | None = None, **last_result: Any) -> Any:
    made = SimpleNamespace(config=task(trial_id="t0007").to_config(), last_result=last_result, error_file=error_file)
    made.set_config = lambda config: setattr(made, "config", config)
    return made


def observer(monitor: Any, **options: Any) -> tuple[Observer, list[tuple[str, int]]]:
    released: list[tuple[str, int]] = []
    watching = Observer(listed(), monitor, lambda trial_id, attempt: released.append((trial_id, attempt)), **options)
    return watching, released


def test_the_searcher_hands_out_trials_and_then_says_that_is_all() -> None:
    monitor: Any = Recorded()
    searcher = StudySearcher(listed(), monitor, task_of)
    assert [TrialTask.from_config(searcher.suggest(name)).trial_id for name in "xy"] == ["t0000", "t0001"]
    assert searcher.suggest("z") == Searcher.FINISHED
    assert monitor.calls == [(what, i) for i in ("t0000", "t0001") for what in ("planned", "started")]


def test_a_trial_of_a_stopped_configuration_is_not_started_and_recorded_as_stopped() -> None:
    monitor: Any = Recorded()
    ended: list[str] = []
    search: Any = listed()
    search.ended = lambda trial_id, trial_result: ended.append(trial_id)

    def reason(configuration: str) -> str:
        return "behind" if configuration == "alpha=0" else ""

    searcher = StudySearcher(search, monitor, task_of, reason_not_to_start=reason)
    assert TrialTask.from_config(searcher.suggest("x")).trial_id == "t0001"
    assert searcher.suggest("y") == Searcher.FINISHED
    assert monitor.calls == [
        ("planned", "t0000"),
        ("ended", "t0000", "stopped", "early stop: behind"),
        ("planned", "t0001"),
        ("started", "t0001"),
    ]
    assert ended == ["t0000"]


def test_trials_that_take_turns_start_when_tune_starts_them() -> None:
    monitor: Any = Recorded()
    searcher = StudySearcher(listed(), monitor, task_of, take_turns=True)
    assert TrialTask.from_config(searcher.suggest("x")).trial_id == "t0000"
    observer(monitor)[0].on_trial_start(1, [], tune_trial())
    assert monitor.calls == [("planned", "t0000"), ("resumed", "t0007")]


def test_reports_and_the_final_outcome_reach_the_monitor() -> None:
    monitor: Any = Recorded()
    watching, released = observer(monitor)
    watching.on_trial_result(1, [], tune_trial(), {"step": 2.0})
    outcome = {"status": "finished", "reason": ""}
    watching.on_trial_result(1, [], tune_trial(), {"step": 2.0, "outcome": outcome})
    watching.on_trial_complete(1, [], tune_trial(step=2.0, attempt=3, outcome=outcome))
    assert monitor.calls == [("reported", "t0007", 2.0), ("ended", "t0007", "finished", "")]
    assert released == [("t0007", 3)]


@pytest.mark.parametrize("hook", ["start", "result", "recover", "complete", "error"])
def test_a_record_that_cannot_be_written_ends_the_study_without_a_traceback(hook: str) -> None:
    """Tune would raise an error of its own, or start a trial again that has ended."""

    def full(*_: Any, **__: Any) -> None:
        raise StorageError("metrics: cannot be written (No space left on device)")

    monitor: Any = SimpleNamespace(resumed=full, reported=full, retried=full, ended=full)
    given_up = list[str]()
    watching, released = observer(monitor, max_failures=1, give_up=given_up.append)
    arguments: dict[str, Any] = {"result": {"step": 2.0}} if hook == "result" else {}
    getattr(watching, f"on_trial_{hook}")(iteration=1, trials=[], trial=tune_trial(), **arguments)
    assert given_up == ["metrics: cannot be written (No space left on device)"]
    assert not released


def test_a_trial_that_ends_without_outcome_was_stopped_early() -> None:
    monitor: Any = Recorded()
    observer(monitor)[0].on_trial_complete(1, [], tune_trial(step=6.0, attempt=1))
    assert monitor.calls == [("ended", "t0007", "stopped", "early stop: behind other trials at step 6")]


def test_a_crash_is_told_by_its_last_line(tmp_path: Path) -> None:
    monitor: Any = Recorded()
    noted = tmp_path / "error.txt"
    noted.write_text("Traceback\n  File\nRuntimeError: out of memory\n\n")
    watching, _ = observer(monitor, max_failures=1)
    watching.on_trial_recover(1, [], tune_trial(str(noted)))
    watching.on_trial_error(1, [], tune_trial(None))
    assert monitor.calls == [
        ("retried", "t0007", "RuntimeError: out of memory"),
        ("ended", "t0007", "failed", "the trial's process died"),
    ]


# As Ray 2.60 says them, of an actor whose process was killed and of processes whose node was.
KILLED = """ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. consider enabling resource isolation via \
--enable-resource-isolation to prevent node deaths by resource contention"""
LOST = (
    "ray.exceptions.ActorUnavailableError: The actor bd56 is unavailable: The actor is temporarily unavailable: "
    "RpcError: RPC error: Socket closed rpc_code: 14. The task may or may not have been executed on the actor.",
    "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.\n\tclass_name: Func\n"
    "The actor died because its node has died. Node Id: 2c01\n\tthe actor's node was terminated unexpectedly: silent",
    "ray.train.WorkerGroupError: Training failed due to worker errors:\n[Rank 0 Error Snippet]:\nA worker health check "
    "failed.\nThe actor 9942 is unavailable: The actor is temporarily unavailable: RpcError: RPC error: recvmsg:"
    "Connection reset by peer rpc_code: 14.\n[Rank 1 Error Snippet]:\nRuntimeError: Connection closed",
    "ray.exceptions.NodeDiedError: Task failed because the node it was running on is dead or unavailable. Node IP: x",
)


class Crashing:
    """A trial of which each failure is added to one file, as Tune does; `retries` are those that were recorded."""

    def __init__(self, folder: Path, max_failures: int, **options: Any) -> None:
        self.monitor: Any = Recorded()
        self.given_up = list[str]()
        self.file = folder / "error.txt"
        self.trial = tune_trial(str(self.file))
        self.watching, _ = observer(self.monitor, max_failures=max_failures, give_up=self.given_up.append, **options)

    def fail(self, *errors: str) -> None:
        for error in errors:
            with self.file.open("a") as file:
                file.write(f"Failure # 1 (occurred at 2026-01-01)\n{error}\n")
            self.watching.on_trial_recover(1, [], self.trial)

    @property
    def retries(self) -> list[str]:
        assert {call[0] for call in self.monitor.calls} <= {"retried"}
        return [problem for _, _, problem in self.monitor.calls]


@pytest.mark.parametrize("max_failures", [0, 1, 2])
def test_a_trial_is_started_again_as_often_as_it_may_crash(max_failures: int, tmp_path: Path) -> None:
    crashing = Crashing(tmp_path, max_failures)
    crashing.fail(*[KILLED] * max_failures)
    assert len(crashing.retries) == max_failures
    assert not crashing.trial.config["failed"]
    crashing.fail("RuntimeError: out of memory")
    assert len(crashing.retries) == max_failures
    assert TrialTask.from_config(crashing.trial.config).failed == "RuntimeError: out of memory"
    assert crashing.trial.max_failures == 0, "Tune ends it if it crashes once more"


@pytest.mark.parametrize("error", LOST)
def test_a_lost_node_is_not_the_trials_failure(error: str, tmp_path: Path) -> None:
    crashing = Crashing(tmp_path, 1)
    crashing.fail(error, KILLED, error)
    assert [problem.startswith("its node or a service was lost: ") for problem in crashing.retries] == [
        True,
        False,
        True,
    ]
    assert not crashing.trial.config["failed"]
    crashing.fail(KILLED)
    assert crashing.trial.config["failed"]


def test_on_its_only_node_a_silent_actor_has_crashed(tmp_path: Path) -> None:
    crashing = Crashing(tmp_path, 0, may_lose_nodes=False)
    crashing.fail(LOST[0])
    assert crashing.trial.config["failed"]


def test_a_trial_that_loses_node_after_node_fails(tmp_path: Path) -> None:
    crashing = Crashing(tmp_path, 0)
    crashing.fail(*[LOST[0]] * 5)
    assert not crashing.trial.config["failed"]
    crashing.fail(LOST[0])
    assert crashing.trial.config["failed"]


def test_a_full_disk_is_not_the_trials_failure(tmp_path: Path) -> None:
    crashing = Crashing(tmp_path, 0)
    crashing.fail("OSError: [Errno 28] No space left on device")
    assert crashing.given_up == ["OSError: [Errno 28] No space left on device"]
    assert not crashing.trial.config["failed"]


def test_a_trial_that_is_not_tried_again_only_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[dict[str, Any]] = []
    monkeypatch.setattr(trial.ray.tune, "report", reported.append)
    trial.run_trial(task(failed="RuntimeError: out of memory").to_config())
    (last,) = reported
    assert last["outcome"] == {"status": "failed", "reason": "RuntimeError: out of memory"}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_trial_plans_with_its_part_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """From the resources of a study to the memory plan of a worker, in its own process and in a trial's."""
    card, budgets = SimpleNamespace(total_memory=80 * 2**30), list[float]()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(setup, "choose_device", lambda _: torch.device("cuda"))

    def train(config: Any, *, services: Any, world_size: int, **_: Any) -> RunResult:
        budgets.append(setup.planned(config, world_size=world_size, services=services)[1].budget_bytes)
        return RunResult("finished", "", 0, {}, 0.0)

    def fit(task: TrialTask, attempt: Any, _: Any) -> dict[str, Any]:
        return train_recorded(task.run_config, attempt, on_report=None)

    monkeypatch.setattr("ebft_study.training.loop.train", train)
    monkeypatch.setattr(trial, "_fit_workers" if workers else "_fit_in_process", fit)
    monkeypatch.setattr(trial.ray.tune, "report", lambda _: None)
    monkeypatch.setattr(trial.ray.tune, "get_checkpoint", lambda: None)
    for number, gpus in enumerate((0.25, 1.0, 2.0)):
        run, resources = tiny_config(tmp_path), ResourcesSpec(workers_per_trial=workers, gpus_per_worker=gpus)
        given = {"run": run.model_dump(mode="json"), "resources": resources.model_dump(), "loop": LOOP}
        trial.run_trial(task(trial_id=f"t{number}", study_folder=str(tmp_path), **given).to_config())
    assert budgets == [0.9 * part * card.total_memory for part in (0.25, 1, 1)]


def test_what_tune_pickles_holds_nothing() -> None:
    monitor: Any = Recorded()
    monitor.unpicklable = lambda: None
    for thing in (StudySearcher(listed(), monitor, task_of), observer(monitor)[0], StudyStopper(None)):
        assert vars(pickle.loads(pickle.dumps(thing))) == {}


def test_the_first_request_to_stop_counts() -> None:
    stopper = StudyStopper(None)
    assert not stopper.stop_all()
    stopper.request_stop("Ctrl-C")
    stopper.request_stop("later")
    assert stopper.stop_all()
    assert stopper.reason == "Ctrl-C"
    assert not stopper("t", {})


def test_rules_stop_trials_on_the_axes_and_no_baseline() -> None:
    spec = normalize.from_record({"study": "s", "question": "q", "stopping": {"divergence": {}}}, source="test")
    stopper = StudyStopper(None, rules=RuleMonitor(spec.stopping, spec.objective))
    for trial_id, is_baseline in (("t0000", True), ("t0001", False)):
        config = task(trial_id=trial_id, is_baseline=is_baseline, total_steps=100).to_config()
        reports = [
            {"step": step, "evaluated_step": step, "ce_loss": float(step), "config": config} for step in range(9)
        ]
        assert any(stopper(trial_id, report) for report in reports) != is_baseline
    assert list(stopper.rule_reasons) == ["t0001"]


def test_a_budget_of_time_ends_the_study() -> None:
    assert not StudyStopper(1.0).stop_all()
    over = StudyStopper(1e-15)
    assert over.stop_all()
    assert over.reason == "budget.max_hours is used up"
    assert StudyStopper(0.0).stop_all(), "nothing is left of it"


# --- trial -----------------------------------------------------------------------------------------------------


def test_the_users_error_is_found_among_the_workers() -> None:
    class GroupError(Exception):
        def __init__(self, failures: dict[int, Exception]) -> None:
            self.worker_failures = failures

    mine = DataError("no such file. Use another")
    assert trial._user_error(GroupError({0: RuntimeError("killed"), 1: mine})) is mine
    assert trial._user_error(GroupError({0: RuntimeError("killed")})) is None
    assert trial._user_error(RuntimeError("controller died")) is None


def test_errors_for_people_survive_their_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(DataError("line one")))
    assert isinstance(error, EbftError)
    assert str(error) == "line one"


@pytest.mark.parametrize(
    ("resources", "reserved"),
    [
        ({"workers_per_trial": 2, "cpus_per_worker": 4, "gpus_per_worker": 1}, {"slot": 1}),
        ({"workers_per_trial": 0, "cpus_per_worker": 2}, {"slot": 1, "CPU": 2}),
        ({"workers_per_trial": 0, "gpus_per_worker": 0.5}, {"slot": 1, "CPU": 1, "GPU": 0.5}),
    ],
)
def test_resources_are_reserved_once(resources: dict[str, Any], reserved: dict[str, float]) -> None:
    assert trial.tune_resources(ResourcesSpec(**resources), {"slot": 1}).bundles == [reserved]
