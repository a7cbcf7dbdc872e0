"""The reports of all studies of a folder, live on this machine: `ebft-study serve`.

A page is made again when its study's results have changed, at most for a small part of the server's time, and asks
every few seconds whether there is a newer one. Nobody else is served: the server listens on the loopback interface,
answers only to names of this machine (a page elsewhere may point a name of its own at it), and wants a random token,
once in the URL and then as a cookie. Texts of studies are escaped, and the pages may run no script but their own.
"""

from __future__ import annotations

import hashlib
import hmac
import http.server
import json
import secrets
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from ebft_study import text
from ebft_study.analysis.selection import best
from ebft_study.analysis.summary import StudySummary, summarize
from ebft_study.errors import ConfigError, EbftError, one_line
from ebft_study.report import content, page
from ebft_study.results import SKIPPED, TABLES, load, studies_in
from ebft_study.storage import Location, StoragePath, storage_path
from ebft_study.study.folder import lock

LOOPBACK = "127.0.0.1"
PORT = 8760
POLL_SECONDS = 5.0
"""Between two questions of a page, and between two looks at a study's files."""
SHARE = 0.1
"""The part of its time that the server may spend on making pages again, while a study reports all the time."""
_UNREADABLE = {"state": "cannot be read", "url": "", "done": 0, "total": 0, "best": "", "updated": ""}
OPEN = ("pending", "running", "interrupted")


@dataclass
class Shown:
    """What the server last made of a study, and of which files."""

    signature: str = ""
    version: str = ""
    made_at: float = -1e9
    seconds: float = 0.0
    looked_at: float = -1e9
    html: bytes = b""
    summary: StudySummary | None = None
    problem: str = ""
    guard: threading.Lock = field(default_factory=threading.Lock)


class Studies:
    """The studies of a folder with their pages, made again when results have changed."""

    def __init__(self, storage: Location, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.storage = storage_path(storage)
        self._clock = clock
        self._shown: dict[str, Shown] = {}
        self._drawing = threading.Lock()
        """Figures are drawn one at a time."""

    def folders(self) -> dict[str, StoragePath]:
        """The folders of all studies by name; the folder of a single study is that study."""
        found = studies_in(self.storage) or ([self.storage] if (self.storage / "results").exists() else [])
        return {folder.name: folder for folder in found}

    def version(self, name: str) -> str:
        """Of a study's page, which changes when the page would."""
        return self._refreshed(name).version

    def page(self, name: str) -> bytes:
        """The report of a study."""
        shown = self._refreshed(name)
        with shown.guard:
            if not shown.html:
                folder = self.folders()[name]
                live = page.Live(f"/study/{quote(name, safe='')}/version", shown.version, POLL_SECONDS)
                begun = self._clock()
                try:
                    shown.summary = shown.summary or summarize(load(folder))
                    with self._drawing:
                        shown.html = page.live_page(shown.summary, live).encode()
                except Exception as error:  # tables of others may hold anything
                    shown.html = _problem(name, _told(error))
                shown.seconds = self._clock() - begun
                shown.made_at = self._clock()
            return shown.html

    def row(self, name: str, folder: StoragePath) -> dict[str, Any]:
        """A study's line in the index: state, progress, and the best configuration so far."""
        shown = self._refreshed(name)
        with shown.guard:
            if shown.summary is None and not shown.problem:
                try:
                    shown.summary = summarize(load(folder))
                except Exception as error:  # one study must not hide the others
                    shown.problem = _told(error)
        if shown.summary is None:
            return {**_UNREADABLE, "name": name, "question": shown.problem}
        return {"name": name, "url": f"/study/{quote(name, safe='')}/", **_row(shown.summary, lock.is_held(folder))}

    def index_version(self) -> str:
        """Of the index, which changes when a study does."""
        return _digest([(name, self.version(name)) for name in self.folders()])

    def _refreshed(self, name: str) -> Shown:
        """A study whose files were looked at just now; what was made of older files is dropped when it may be."""
        shown = self._shown.setdefault(name, Shown())
        with shown.guard:
            now = self._clock()
            rest = max(POLL_SECONDS, shown.seconds / SHARE)
            if shown.version and (now - shown.looked_at < POLL_SECONDS or now - shown.made_at < rest):
                return shown
            shown.looked_at = now
            signature = signature_of(self.folders()[name])
            if signature != shown.signature:
                shown.signature = signature
                shown.version = _digest(signature)
                shown.html, shown.summary, shown.problem = b"", None, ""
            return shown


def signature_of(folder: StoragePath) -> str:
    """The names, sizes and times of all files of results: equal while nothing was written."""
    places = [folder, *(folder / "results" / table for table in TABLES)]
    found: list[tuple[str, ...]] = []
    for place in places:
        for name in place.names():
            path = place / name
            if place == folder and name not in ("study.yaml", "study.yaml.copy"):
                continue
            try:
                stat = path.local.stat() if path.local is not None else None
            except OSError:
                continue  # compaction has just removed it
            changed = (stat.st_size, stat.st_mtime_ns) if stat else (path.changed_at() if _is_rewritten(place) else "")
            found.append((place.name, name, str(changed)))
    return _digest(sorted(found))


def _is_rewritten(place: StoragePath) -> bool:
    """Whether files of a table are replaced in place; all others are written once."""
    return place.name == "trials"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _row(study: StudySummary, is_running: bool) -> dict[str, Any]:
    statuses = study.results.trials["status"]
    total = int((statuses != SKIPPED).sum())
    done = int((~statuses.isin([*OPEN, SKIPPED])).sum())
    state = "running" if is_running else "finished" if done == total and total else "not running"
    chosen = best(study.configurations)
    metric = study.objective[0]
    updated = study.results.trials["updated_at"].max()
    return {
        "state": state,
        "question": " ".join(str(study.results.spec.get("question") or "").split()),
        "done": done,
        "total": total,
        "overview": content.overview(study),
        "best": f"{chosen.label}: {metric} {text.number(chosen.validated())}" if chosen else text.NOTHING,
        "updated": "" if text.is_missing(updated) else f"{updated:%Y-%m-%d %H:%M:%S} UTC",
    }


def _told(error: Exception) -> str:
    """An error for a page; what is no message for users goes to the terminal, too."""
    if isinstance(error, EbftError):
        return one_line(error)
    traceback.print_exception(error)
    return f"{type(error).__name__}: {one_line(error)}"


def _problem(name: str, message: str) -> bytes:
    return page.render("problem.html.j2", [], {}, study=name, message=message).encode()


# --- the server ------------------------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """An HTTP server of one folder of studies, for whoever has its token."""

    daemon_threads = True

    def __init__(self, studies: Studies, *, host: str = LOOPBACK, port: int = PORT) -> None:
        self.studies = studies
        self.token = secrets.token_urlsafe(24)
        super().__init__((host, port), _Handler)
        self.host, self.port = host, int(self.server_address[1])
        self.names = {f"{name}:{self.port}" for name in (LOOPBACK, "localhost", "[::1]", host)}
        self.checks_names = host in (LOOPBACK, "localhost", "::1")

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/?token={self.token}"

    @property
    def cookie(self) -> str:
        """Cookies are shared by all ports of a machine, so each server has one of its own name."""
        return f"ebft-study-{self.port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "ebft-study", ""
    timeout = 30

    def do_GET(self) -> None:
        try:
            self._answer()
        except (BrokenPipeError, ConnectionResetError):
            return
        except Exception:
            traceback.print_exc()
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, "The server failed; its terminal says why.")

    def _answer(self) -> None:
        if self.server.checks_names and self.headers.get("Host", "").lower() not in self.server.names:
            self._send(HTTPStatus.MISDIRECTED_REQUEST, "This server answers to names of its own machine only.")
            return
        url = urlsplit(self.path)
        given = parse_qs(url.query).get("token")
        if given is not None and self._is_token(given[0]):
            cookie = f"{self.server.cookie}={self.server.token}; Path=/; HttpOnly; SameSite=Strict"
            there = "/" + url.path.lstrip("/\\")  # and nowhere else
            self._send(HTTPStatus.SEE_OTHER, "", Location=there, **{"Set-Cookie": cookie})
        elif not self._is_token(self._cookie()):
            self._send(HTTPStatus.FORBIDDEN, "Open the URL that ebft-study serve has printed: it ends with a token.")
        else:
            self._serve(url.path)

    def _serve(self, path: str) -> None:
        studies = self.server.studies
        if path == "/":
            rows = [studies.row(name, folder) for name, folder in studies.folders().items()]
            live = page.Live("/version", studies.index_version(), POLL_SECONDS)
            html = page.render(
                "studies.html.j2", [], {}, rows=rows, live=live, storage=str(studies.storage), **page.scripts({})
            )
            self._send(HTTPStatus.OK, html, kind="text/html")
        elif path == "/version":
            self._send_version(studies.index_version())
        else:
            parts = path.split("/")
            name = unquote(parts[2]) if len(parts) == 4 and parts[1] == "study" else ""
            if name not in studies.folders() or parts[3] not in ("", "version"):
                self._send(HTTPStatus.NOT_FOUND, "There is no such page.")
            elif parts[3] == "version":
                self._send_version(studies.version(name))
            else:
                self._send(HTTPStatus.OK, studies.page(name), kind="text/html")

    def _cookie(self) -> str:
        try:
            found = SimpleCookie(self.headers.get("Cookie", "")).get(self.server.cookie)
        except CookieError:
            return ""
        return found.value if found else ""

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(errors="replace"), self.server.token.encode())

    def _send_version(self, version: str) -> None:
        self._send(HTTPStatus.OK, json.dumps({"version": version}), kind="application/json")

    def _send(self, status: HTTPStatus, body: str | bytes, kind: str = "text/plain", **headers: str) -> None:
        data = body if isinstance(body, bytes) else body.encode()
        self.send_response(status)
        safe = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(data)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        for name, value in {**safe, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Log nothing: requests would fill the terminal, and the first has the token."""


def server(storage: Location, *, host: str = LOOPBACK, port: int = PORT) -> Server:
    """A server that is ready to `serve_forever`.

    Raises:
        ConfigError: the folder has no study, or the address cannot be had.
    """
    studies = Studies(storage)
    if not studies.folders():
        raise ConfigError(f"command line: {storage}: has no study. Name the folder that holds your studies")
    try:
        return Server(studies, host=host, port=port)
    except OSError as error:
        raise ConfigError(
            f"command line: --host {host} --port {port}: cannot be had ({one_line(error)}). Give another --port"
        ) from error
