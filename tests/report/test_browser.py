"""The report as readers use it: in a real browser, with mouse or keyboard, on a phone, in the dark, on paper."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ebft_study.report import write_report
from ebft_study.results import StudyRecorder
from ebft_study.study.view import server
from tests.browser import PHONE, Window, chromium
from tests.synthetic_study import PAPER_LIKE, write_study

TRIALS = "table[data-table=trials] > tbody"
HOSTILE = "</script><img src=x onerror=alert(1)><b>bold"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    statuses = {((1.0, 0.0), 1): "stopped", ((0.0, 0.1), 2): "failed", (None, 0): "running"}
    folder = write_study(tmp_path_factory.mktemp("browser") / "studied", statuses=statuses, with_scores=True)
    StudyRecorder(folder, study="studied").event("retry", HOSTILE, trial_id="t003", attempt=1)
    written = write_report(folder)
    assert isinstance(written, Path)
    return written


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture
def window(browser: Any, report: Path) -> Iterator[Window]:
    with Window(browser) as window:
        window.page.goto(report.as_uri())
        yield window
        assert window.said == []
        assert {url.split(":")[0] for url in window.asked} == {"file"}
        assert len(window.asked) == 1


def trials(window: Window) -> list[str]:
    return window.texts(f"{TRIALS} > tr:not(.details) > td:first-child")


def test_the_table_of_trials_sorts_and_filters(window: Window) -> None:
    table = window.page.locator("table[data-table=trials]")
    everything = trials(window)
    assert len(everything) == 30
    header = table.get_by_role("button", name="Held-out CFM", exact=True)
    values = []
    for order in ("ascending", "descending"):
        header.click()
        assert table.locator("th[aria-sort]:not([aria-sort=none])").get_attribute("aria-sort") == order
        column = table.locator("thead th").all_inner_texts()
        place = next(k for k, name in enumerate(column, start=1) if name.startswith("Held-out CFM"))
        found = window.texts(f"{TRIALS} > tr > td:nth-child({place})")
        values.append([float(each.replace("−", "-")) for each in found if each != "–"])
        assert found[-3:] == ["–"] * 3
    assert values[0] == sorted(values[0])
    assert values[1] == sorted(values[1], reverse=True)
    window.page.get_by_label("Status of the table trials").select_option("stopped")
    assert trials(window) == [f"t{list(PAPER_LIKE).index((1.0, 0.0)) * 3 + 1:03d}"]
    window.page.get_by_label("Status of the table trials").select_option("")
    window.page.get_by_label("Filter the table trials").fill("worker died")
    assert len(trials(window)) == 1
    window.page.get_by_label("Filter the table trials").fill("no such words")
    assert trials(window) == []
    assert "0 of 30 rows" in window.texts(".count")


def test_a_trial_opens_by_keyboard_with_settings_events_samples_and_checkpoints(window: Window) -> None:
    opener = window.page.get_by_role("button", name="t003", exact=True)
    opener.focus()
    window.page.keyboard.press("Enter")
    assert opener.get_attribute("aria-expanded") == "true"
    details = window.page.locator(f"#{opener.get_attribute('aria-controls')}")
    words = details.inner_text()
    assert "train/t003-0/checkpoint_00000040" in words
    assert "Settings that differ from those of SFT" in words
    assert "not read" in words
    assert HOSTILE in words
    assert details.locator("img, script").count() == 0
    assert "3.14 * r ** 2" in words
    window.page.keyboard.press("Enter")
    assert window.page.locator("tr.details").count() == 0


def test_curves_are_toggled_zoomed_and_read(window: Window) -> None:
    chart = window.page.locator("#explorer .chart")
    lines = window.page.locator("#explorer polyline.curve:not(.thin)")
    assert lines.count() == len(PAPER_LIKE)
    window.page.get_by_role("button", name="α=1, γ=0.1", exact=True).click()
    assert lines.count() == len(PAPER_LIKE) - 1
    window.page.get_by_label("Filter configurations").fill("α=0.5")
    assert lines.count() == 3
    window.page.get_by_label("Filter configurations").fill("")
    window.page.get_by_role("button", name="Hide all").click()
    assert lines.count() == 0
    assert "No configuration is shown." in window.texts(".reading")
    window.page.get_by_role("button", name="Show all").click()
    before = chart.text_content()
    window.page.get_by_label("Metric").select_option("ce_loss")
    assert "Validation CE over steps" in (chart.get_attribute("aria-label") or "")
    assert chart.text_content() != before
    box = chart.bounding_box()
    window.page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 60)
    window.page.mouse.down()
    window.page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + 80, steps=3)
    window.page.mouse.up()
    zoomed = [float(each) for each in chart.locator("text").all_text_contents() if each.isdecimal()]
    assert min(zoomed) > 10
    chart.dblclick(position={"x": 300, "y": 40})
    assert "0" in chart.locator("text").all_text_contents()
    chart.focus()
    window.page.keyboard.press("ArrowRight")
    (reading,) = [each for each in window.texts(".reading") if each]
    assert "step 40: " in reading
    window.page.keyboard.press("ArrowLeft")
    assert any("step 20: " in each for each in window.texts(".reading"))
    assert window.texts(".tip")


def test_what_a_pointer_shows_is_what_was_measured(window: Window, report: Path) -> None:
    from ebft_study.analysis.summary import summarize
    from ebft_study.results import load

    study = summarize(load(report.parent))
    c = next(c for c in study.configurations if c.label == "α=0, γ=0")
    chart = window.page.locator("#explorer .chart")
    window.page.get_by_role("button", name="Hide all").click()
    window.page.get_by_role("button", name="α=0, γ=0", exact=True).click()
    chart.focus()
    window.page.keyboard.press("ArrowRight")
    (reading,) = [each for each in window.texts(".reading") if each]
    assert f"α=0, γ=0, step 40: {c.validated():.4g} (" in reading
    assert "over 3 seeds" in reading


def test_parallel_coordinates_are_read_by_keyboard_and_follow_the_choice(window: Window) -> None:
    chart = window.page.locator("#coordinates .chart")
    complete = chart.locator("polyline.curve").count()
    assert complete == len(PAPER_LIKE) - 3  # the baseline, and two that lack a seed
    chart.focus()
    window.page.keyboard.press("ArrowDown")
    assert any(each.startswith("α=1, γ=0") and "cfm_loss" in each for each in window.texts("#coordinates .reading"))
    window.page.get_by_label("Filter configurations").fill("α=0.5")
    assert chart.locator("polyline.curve").count() == 3


def test_what_was_chosen_is_there_after_a_reload(window: Window) -> None:
    window.page.get_by_label("Filter the table trials").fill("t02")
    window.page.get_by_label("Metric").select_option("ce_loss")
    window.page.get_by_role("button", name="t020", exact=True).click()
    window.page.reload()
    window.asked.pop()
    assert len(trials(window)) == 10
    assert window.page.get_by_label("Metric").input_value() == "ce_loss"
    assert window.page.locator("tr.details").count() == 1


def test_every_control_has_a_name_and_every_table_its_headers(window: Window) -> None:
    unnamed = window.page.evaluate(
        "[...document.querySelectorAll('button, input, select, svg[tabindex]')].filter((e) => "
        "!(e.textContent.trim() || e.ariaLabel || e.labels?.length)).map((e) => e.outerHTML)"
    )
    assert unnamed == []
    assert window.page.locator("table[data-table] th:not([aria-sort])").count() == 0
    window.page.keyboard.press("Tab")
    outline = window.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_on_a_phone_nothing_is_wider_than_the_screen(browser: Any, report: Path) -> None:
    with Window(browser, PHONE, color_scheme="dark") as window:
        window.page.goto(report.as_uri())
        assert window.width == 390
        window.page.get_by_role("button", name="t003", exact=True).click()
        assert window.width == 390
        wide = window.page.evaluate(
            "[...document.querySelectorAll('main *')].filter((e) => e.getBoundingClientRect().right > 391 "
            "&& !e.closest('.scroll, svg, pre, .names')).map((e) => e.outerHTML.slice(0, 80))"
        )
        assert wide == []
        assert window.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 29)"
        assert window.said == []


def test_the_columns_of_differences_are_seen_on_a_wide_screen(browser: Any, report: Path) -> None:
    with Window(browser, {"width": 1920, "height": 1000}) as window:
        window.page.goto(report.as_uri())
        table = window.page.locator("table[data-table=configurations]")
        last = table.locator("thead th").last
        assert last.inner_text().startswith("CFM − SFT")
        edge = last.bounding_box()
        around = window.page.locator(".scroll", has=table).bounding_box()
        assert edge["x"] + edge["width"] <= around["x"] + around["width"] + 1


def test_on_paper_and_without_scripts_there_are_figures_instead_of_controls(browser: Any, report: Path) -> None:
    with Window(browser) as window:
        window.page.goto(report.as_uri())
        assert not window.page.get_by_text("Thin lines ending in ×").first.is_visible()
        window.page.emulate_media(media="print")
        assert window.page.get_by_text("Thin lines ending in ×").first.is_visible()
        assert not window.page.locator("#explorer").is_visible()
        assert window.texts(".controls") == []
    with Window(browser, java_script_enabled=False) as window:
        window.page.goto(report.as_uri())
        assert window.page.get_by_text("Thin lines ending in ×").first.is_visible()
        assert not window.page.locator("#explorer").is_visible()
        assert len(trials(window)) == 30


def test_a_live_page_follows_its_study_and_keeps_what_was_typed(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "POLL_SECONDS", 0.2)
    monkeypatch.setattr(server, "SHARE", 1e9)
    effects = {key: PAPER_LIKE[key] for key in ((1.0, 0.0), (0.0, 0.0))}
    folder = write_study(tmp_path / "studies" / "live", effects=effects, seeds=(0, 1))
    with server.server(folder.parent, port=0) as serving, Window(browser) as window:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            window.page.goto(serving.url)
            assert serving.token not in window.page.url
            window.page.get_by_role("link", name="live", exact=True).click()
            window.page.get_by_label("Filter the table trials").fill("α=1")
            window.page.get_by_label("Filter the table trials").blur()
            StudyRecorder(folder, study="live").event("retry", "a worker died just now", trial_id="t000", attempt=1)
            window.page.get_by_text("a worker died just now").wait_for()
            assert window.page.get_by_label("Filter the table trials").input_value() == "α=1"
            window.page.get_by_role("link", name="All studies").click()
            assert window.page.get_by_role("progressbar").count() == 1
            assert window.said == []
            assert all(url.startswith(f"http://127.0.0.1:{serving.port}/") for url in window.asked)
        finally:
            serving.shutdown()
            thread.join()
