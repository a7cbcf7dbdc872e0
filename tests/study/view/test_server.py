"""The live reports: for whoever has the token and nobody else, and made again when results have changed."""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ebft_study.errors import ConfigError
from ebft_study.report import page
from ebft_study.results import StudyRecorder
from ebft_study.study.view import server
from ebft_study.study.view.server import Server, Studies
from tests.synthetic_study import PAPER_LIKE, write_study

FEW = {key: PAPER_LIKE[key] for key in ((1.0, 0.0), (0.0, 0.0), None)}


class Clock:
    """A time that only a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    write_study(tmp_path / "first", effects=FEW, seeds=(0, 1))
    statuses: Any = {((1.0, 0.0), 1): "running", ((0.0, 0.0), 1): "pending"}
    write_study(tmp_path / "second <b>", effects=FEW, seeds=(0, 1), statuses=statuses)
    return tmp_path


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Studies whose pages were made; drawing their figures is tested elsewhere."""
    made: list[str] = []

    def short(study: Any, live: page.Live) -> str:
        made.append(study.name)
        return f"<p>{study.name} {live.version}</p>"

    monkeypatch.setattr(page, "live_page", short)
    return made


@pytest.fixture
def serving(storage: Path, pages: list[str]) -> Iterator[Server]:
    with server.server(storage, port=0) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def get(serving: Server, path: str, **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", serving.port, timeout=60)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read().decode()
    connection.close()
    return found


def cookie(serving: Server, token: str | None = None) -> dict[str, str]:
    return {"Cookie": f"{serving.cookie}={token or serving.token}"}


def test_only_the_token_opens_the_pages(serving: Server) -> None:
    for path in ("/", "/version", "/study/first/", "/study/first/version", "/nothing", "/?token=", "/?token=wrong"):
        status, _, body = get(serving, path)
        assert status == 403, path
        assert "first" not in body
    assert get(serving, "/", **cookie(serving, "wrong"))[0] == 403
    assert get(serving, "/", Cookie="\x00=;;=")[0] == 403
    assert get(serving, "/?token=%F0%9F%92%A5")[0] == 403
    assert get(serving, f"/\\evil.example/?token={serving.token}")[1]["Location"] == "/evil.example/"
    status, headers, body = get(serving, f"/study/first/?token={serving.token}")
    assert (status, headers["Location"], body) == (303, "/study/first/", "")
    assert "HttpOnly" in headers["Set-Cookie"]
    assert "SameSite=Strict" in headers["Set-Cookie"]
    status, headers, body = get(serving, "/study/first/", **cookie(serving))
    assert status == 200
    assert serving.token not in body
    assert headers["Cache-Control"] == "no-store"
    assert serving.url == f"http://127.0.0.1:{serving.port}/?token={serving.token}"
    assert len(serving.token) >= 32


def test_names_that_are_not_this_machine_are_refused(serving: Server) -> None:
    """A page elsewhere may point its own name at 127.0.0.1; it has no cookie of ours, and no answer either."""
    for host in ("evil.example", f"evil.example:{serving.port}", f"127.0.0.1.evil.example:{serving.port}", ""):
        assert get(serving, "/", Host=host, **cookie(serving))[0] == 421, host
    for host in (f"localhost:{serving.port}", f"127.0.0.1:{serving.port}"):
        assert get(serving, "/", Host=host, **cookie(serving))[0] == 200, host


def test_two_servers_have_tokens_of_their_own(storage: Path) -> None:
    with server.server(storage, port=0) as one, server.server(storage, port=0) as other:
        assert one.token != other.token
        assert one.cookie != other.cookie


def test_the_index_shows_state_progress_and_the_best_so_far(serving: Server) -> None:
    status, _, body = get(serving, "/", **cookie(serving))
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body.split("<tbody>")[1].split("</tbody>")[0]))
    assert status == 200
    assert re.search(r"first .*? finished 6 of 6 .*?α=1: cfm_loss 2\.\d+", words)
    assert re.search(r"second &lt;b&gt; .*? not running 4 of 6", words)
    assert "second <b>" not in body
    assert "/study/second%20%3Cb%3E/" in body
    assert "<without>" not in body


def test_no_path_leads_out_of_the_folder(serving: Server) -> None:
    for path in ("/study/../first/", "/study/..%2ffirst/", "/study/%2e%2e/", "/study/nothing/", "/study/first/results",
                 "/study/first", "/study/first/version/"):  # fmt: skip
        assert get(serving, path, **cookie(serving))[0] == 404, path


def test_a_page_is_made_again_only_when_results_have_changed(storage: Path, pages: list[str]) -> None:
    clock = Clock()
    studies = Studies(storage, clock=clock)
    before, version = studies.page("first"), studies.version("first")
    for _ in range(3):
        clock.now += 100
        assert studies.page("first") == before
    assert studies.version("first") == version
    assert pages == ["first"]
    index = studies.index_version()
    StudyRecorder(storage / "first", study="first").event("retry", "once more", trial_id="t000", attempt=1)
    assert studies.version("first") == version  # looked at a moment ago
    clock.now += 100
    assert studies.version("first") != version
    assert studies.index_version() != index
    assert studies.page("first") != before
    assert pages == ["first", "first"]


def test_a_page_that_takes_long_is_made_again_rarely(storage: Path, pages: list[str]) -> None:
    clock = Clock()
    studies = Studies(storage, clock=clock)
    studies.page("first")
    studies._shown["first"].seconds = 30.0
    recorder, version = StudyRecorder(storage / "first", study="first"), studies.version("first")
    recorder.event("retry", "once more", trial_id="t000", attempt=1)
    clock.now += 30 / server.SHARE - 1
    assert studies.version("first") == version
    clock.now += 2
    assert studies.version("first") != version


def test_the_whole_page_asks_for_news_of_itself(storage: Path) -> None:
    studies = Studies(storage)
    html = studies.page("first").decode()
    assert f'data-live="/study/first/version" data-version="{studies.version("first")}"' in html
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split(";")}
    assert rules["default-src"] == ["'none'"]
    assert rules["connect-src"] == ["'self'"]
    assert len(rules["script-src"]) == 1


def test_results_that_cannot_be_read_are_a_line_of_the_index(storage: Path, serving: Server) -> None:
    (storage / "first" / "study.yaml").write_bytes(b"\x00: [")
    (storage / "first" / "study.yaml.copy").unlink(missing_ok=True)
    assert get(serving, "/", **cookie(serving))[0] == 200
    assert json.loads(get(serving, "/version", **cookie(serving))[2]).keys() == {"version"}


def test_a_study_whose_report_cannot_be_made_says_so_and_hides_no_other(
    storage: Path, serving: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> Any:
        raise ValueError("<i>odd</i> table")

    monkeypatch.setattr(server, "summarize", fail)
    status, _, body = get(serving, "/study/first/", **cookie(serving))
    assert status == 200
    assert "cannot be read: ValueError: &lt;i&gt;odd&lt;/i&gt; table" in body
    assert get(serving, "/", **cookie(serving))[2].count("&lt;i&gt;odd&lt;/i&gt; table") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_folder_without_studies_and_a_port_that_is_taken_are_refused(storage: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="has no study"):
        server.server(tmp_path / "empty", port=0)
    with server.server(storage, port=0) as running, pytest.raises(ConfigError, match="Give another --port"):
        server.server(storage, port=running.port)
