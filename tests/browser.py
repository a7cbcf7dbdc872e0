"""A real browser for tests: the Chromium of this machine, driven by Playwright; tests skip where either is missing."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

WIDE, PHONE = {"width": 1400, "height": 1000}, {"width": 390, "height": 844}


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A running browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as running:
        # In a container there is neither a sandbox of the kernel's nor a GPU.
        browser = running.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-gpu"], timeout=120_000
        )
        yield browser
        browser.close()


class Window:
    """A page in the browser, and everything that its console said."""

    def __init__(self, browser: Any, size: dict[str, int] | None = None, **options: Any) -> None:
        self.page = browser.new_page(viewport=size or WIDE, **options)
        self.page.set_default_timeout(60_000)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def __enter__(self) -> Window:
        return self

    def __exit__(self, *_: object) -> None:
        self.page.close()

    def texts(self, selector: str) -> list[str]:
        """The texts of all elements that can be seen."""
        return [each.inner_text() for each in self.page.locator(selector).all() if each.is_visible()]

    @property
    def width(self) -> int:
        return int(self.page.evaluate("document.documentElement.scrollWidth"))
