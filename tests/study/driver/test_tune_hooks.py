"""Ray's side of a study, without a cluster: the relay, and the adapters that Tune calls."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.search import Searcher

from ebft_study.errors import DataError, EbftError
from ebft_study.study.driver import trial
from ebft_study.study.driver.relay import Relay
from ebft_study.study.driver.tune_hooks import Observer, StudySearcher, StudyStopper
from ebft_study.study.folder.trial_states import TrialResult
from ebft_study.study.search.listed import ListedSearch
from ebft_study.study.spec import normalize, trials
from ebft_study.study.spec.study_spec import ResourcesSpec
from ebft_study.study.spec.trial_task import TrialTask
from tests.studies import task, task_of

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
    return SimpleNamespace(config=task(trial_id="t0007").to_config(), last_result=last_result, error_file=error_file)


def observer(monitor: Any) -> tuple[Observer, list[tuple[str, int]]]:
    released: list[tuple[str, int]] = []
    return Observer(listed(), monitor, lambda trial_id, attempt: released.append((trial_id, attempt))), released


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


def test_a_trial_that_ends_without_outcome_was_stopped_early() -> None:
    monitor: Any = Recorded()
    observer(monitor)[0].on_trial_complete(1, [], tune_trial(step=6.0, attempt=1))
    assert monitor.calls == [("ended", "t0007", "stopped", "early stop: behind other trials at step 6")]


def test_a_crash_is_told_by_its_last_line(tmp_path: Path) -> None:
    monitor: Any = Recorded()
    noted = tmp_path / "error.txt"
    noted.write_text("Traceback\n  File\nRuntimeError: out of memory\n\n")
    watching, _ = observer(monitor)
    watching.on_trial_recover(1, [], tune_trial(str(noted)))
    watching.on_trial_error(1, [], tune_trial(None))
    assert monitor.calls == [
        ("retried", "t0007", "RuntimeError: out of memory"),
        ("ended", "t0007", "failed", "the trial's process died"),
    ]


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


def test_a_budget_of_time_ends_the_study() -> None:
    assert not StudyStopper(1.0).stop_all()
    over = StudyStopper(1e-15)
    assert over.stop_all()
    assert over.reason == "budget.max_hours is used up"


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
