"""The page: self-contained, escaped, and written for any state that a study can be in; the README's picture of it."""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
import subprocess
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from ebft_study import config
from ebft_study.errors import ResultsError
from ebft_study.report import write_report
from ebft_study.results import StudyRecorder, compact
from ebft_study.results.metrics import COST
from tests.synthetic_study import PAPER_LIKE, of_method, rewrite, write_benchmark, write_study

SMALL = {key: PAPER_LIKE[key] for key in ((1.0, 0.0), (1.0, 0.1), None)}


class Page(HTMLParser):
    """What a browser would see: text, ids, and everything that could leave the file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.words: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)
        for name, value in attributes:
            if name == "id" and value:
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "data", "action") and value:
                self.references.append(value)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["script"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = write_study(tmp_path_factory.mktemp("page") / "full", with_scores=True)
    write_report(written)
    return written


def test_the_file_needs_nothing_but_itself(folder: Path) -> None:
    page = Page(folder / "report.html")
    assert page.open == []
    assert page.references
    outside = [reference for reference in page.references if not reference.startswith(("#", "data:image/png;base64,"))]
    assert outside == []
    assert {reference[1:] for reference in page.references if reference.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"url\((?!#)|@import", page.source)


def test_the_page_runs_no_script_but_its_own(folder: Path) -> None:
    source = (folder / "report.html").read_text()
    opened = re.findall(r"<script[^>]*>", source)
    assert opened == ['<script type="application/json" id="data">', "<script>"]
    (script,) = re.findall(r"<script>(.*?)</script>", source, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', source)
    assert policy.startswith("default-src 'none'; ")
    assert policy.endswith(f"; script-src 'sha256-{digest}'")
    assert "connect-src" not in policy
    assert len(source) < 3e6


def test_the_answer_comes_first_and_claims_where_the_study_can_test_them(folder: Path, tmp_path: Path) -> None:
    text = Page(folder / "report.html").text
    order = ["The answer", "α moves it: ", "The best of 9 complete configurations is", "is below the base model: ",
             "ebft-study export full t0", "Outcomes on the held-out split", "Learning curves",
             "The paper's claims, put to the test", "Design, cost and provenance"]  # fmt: skip
    places = [text.index(words, 300) for words in order]
    assert places == sorted(places)
    short = report(tmp_path / "s", effects={(1.0, 0.0): (-0.02, -0.03)}, seeds=(0,))
    assert "The paper's claims" not in short
    assert "The only complete configuration is" in short


def test_ordinary_events_are_no_incidents(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", effects=SMALL)
    recorder = StudyRecorder(folder, study="s")
    for kind in ("session", "features", "cache", "promoted", "resumed"):
        recorder.event(kind, f"an ordinary {kind}")
    recorder.event("retry", "a worker died", trial_id="t000", attempt=1)
    text = Page(write_report(folder)).text  # type: ignore[arg-type]
    assert "an ordinary" not in text
    assert "retry a worker died" in text


def test_figures_lie_beside_the_page(folder: Path) -> None:
    names = {path.name for path in (folder / "figures").iterdir()}
    for name in ("heat_maps", "learning_curves", "differences", "cfm_over_length", "entropy", "cost_curves"):
        assert {f"{name}.png", f"{name}.svg"} <= names
    assert not [name for name in names if name.startswith(".")]


def test_the_page_says_what_was_asked_run_and_found(folder: Path) -> None:
    text = Page(folder / "report.html").text
    for expected in (
        "Does EBFT calibrate a small model <without> hurting its cross-entropy?",
        "30 of 30 trials finished",
        "7 agrees 1 disagrees 0 cannot tell",
        "0, 0.03, 0.1",
        "torch 2.13.0",
        "9f9f9f9f9f9f9f9f…",
        "heldout 600, train 4000",
        "13.1, trigram baseline on the same tokens 61",
        "abababababababab…",
        "CFM at 8 tokens, on 120 sequences: one model's value has a standard error of 0.049, the difference of two",
        "; on sequences of their own it would have 0.069.",
        "are seen in 80 of 100 such studies",
        "Paired evidence: three intervals for each difference",
        "15 min 44 s",
        "1.07 GiB",
        "α=0.5, γ=0.03",
        "CFM − SFT",
        "3.14 * r ** 2",
    ):
        assert expected in text, expected


def test_the_page_compares_at_equal_cost_and_shows_what_trials_cost(folder: Path) -> None:
    text = Page(folder / "report.html").text
    assert "CE − SFT at equal FLOPs CFM − SFT at equal FLOPs CE − SFT at equal time CFM − SFT at equal time" in text
    # Parameters, FLOPs by phase (40 updates by EBFT), tokens, times; no energy.
    cost = "1 050 000 1 050 000 820 000 1.2e11 4.0e10 2.0e10 6.0e10 4.0e8 40 960 20 480 8.0 s 18.0 s 0.0 s –"
    assert f"t000 {cost} " in re.sub(r"\s", " ", text)


def test_folders_without_recorded_cost_are_reported_without_it(tmp_path: Path) -> None:
    """As those of version 0.1, whose files do not have the columns."""
    written = write_study(tmp_path / "s", effects=SMALL)
    lost = {*COST, "parameters", "trainable_parameters", "feature_parameters", "gpu_seconds"}
    for path in (written / "results").glob("*/*.parquet"):
        table = pq.ParquetFile(path).read()
        rewrite(path, table.drop_columns([name for name in table.column_names if name in lost]))
    text = Page(write_report(written)).text  # type: ignore[arg-type]
    assert "The trials did not record their cost" in text
    assert "At equal FLOPs: cannot tell, the study did not record it" in text
    assert "Cost of every trial" not in text
    assert "CE − SFT at equal FLOPs" not in text


def test_text_from_files_is_escaped(folder: Path) -> None:
    assert "<without>" not in (folder / "report.html").read_text()


def test_equal_results_give_equal_figures(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in (folder / "figures").glob("*.svg")}
    compact(folder)
    write_report(folder)
    assert before == {path.name: path.read_bytes() for path in (folder / "figures").glob("*.svg")}


def report(folder: Path, **options: object) -> str:
    return Page(write_report(write_study(folder, **options))).text  # type: ignore[arg-type]


def test_a_study_with_failed_and_stopped_trials_says_why(tmp_path: Path) -> None:
    statuses = {((1.0, 0.0), 0): "failed", ((1.0, 0.1), 1): "stopped", (None, 2): "running"}
    text = report(tmp_path / "s", effects=SMALL, statuses=statuses)
    assert "6 of 9 trials finished" in text
    assert "RuntimeError: worker died" in text
    assert "loss became nan at step 20; lower learning_rate" in text


@pytest.mark.parametrize("status", ["failed", "stopped", "running", "pending", "interrupted"])
def test_a_study_in_which_nothing_finished_still_gets_its_report(tmp_path: Path, status: str) -> None:
    statuses: Mapping[tuple[object, int], str] = {(key, seed): status for key in SMALL for seed in (0, 1)}
    text = report(tmp_path / "s", effects=SMALL, seeds=(0, 1), statuses=statuses)
    assert "No trial has finished" in text
    assert "There is none yet: " in text
    assert "The paper's claims" not in text


def test_a_study_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"question": "q", "provenance": None, "versions": "odd"}))
    text = Page(write_report(tmp_path)).text
    assert "No trial has been recorded yet" in text
    settings = config.flatten(config.RunConfig())
    row = {"trial_id": "t1", "attempt": 0, "status": "pending", "hyperparameters": settings}
    StudyRecorder(tmp_path, study="s").trial(row)
    assert "0 of 1 trials finished (1 pending)" in Page(write_report(tmp_path)).text


def test_rules_for_single_trials_and_trials_without_workers_are_told(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", effects=SMALL)
    spec = yaml.safe_load((folder / "study.yaml").read_text())
    spec["resources"]["workers_per_trial"] = 0
    spec["scheduler"] = {"kind": "median", "grace_period_steps": 20, "min_samples_required": 3}
    spec["stopping"] = {"divergence": {"margin": 0.05, "evaluations": 3}, "collapse": None}
    (folder / "study.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    text = Page(write_report(folder)).text
    assert "Early stopping median (grace_period_steps 20, min_samples_required 3) and divergence (margin" in text
    assert "CPU hours (2 CPU per trial)" in text


def test_the_page_says_what_happened_after_the_warm_start(tmp_path: Path) -> None:
    warm = {"alpha": 1.0, "gamma": 0.0, "warm_start_steps": 20}
    effects = {1e-4: (0.05, -0.06), 2e-4: (0.07, -0.02)}
    text = report(
        tmp_path / "s",
        effects=effects,
        settings=lambda key: {**warm, "learning_rate": key},
        warm=(-1.2, -0.1),
        noise=0.0,
    )
    assert "CE since warm start" in text
    assert "−1.150 ± 0.000 −0.160 ± 0.000 +0.050 ± 0.000 −0.060 ± 0.000" in text
    assert "include the warm start" in text
    assert "CE since warm start" not in report(tmp_path / "t", effects={(1.0, 0.0): (-0.02, -0.03)})


def test_one_seed_and_no_sft_are_named_as_limits(tmp_path: Path) -> None:
    text = report(tmp_path / "s", effects={(1.0, 0.0): (-0.02, -0.03)}, seeds=(0,))
    assert "One seed only" in text
    assert "No SFT trial" in text


def test_settings_that_change_the_measure_are_named(tmp_path: Path) -> None:
    effects = {"last_token": (0.0, -0.02), "mean": (0.0, -0.5)}
    text = report(tmp_path / "s", effects=effects, settings=lambda key: {"pooling": key}, seeds=(0, 1))
    assert "The study varies pooling, which changes what CFM measures" in text


def test_settings_that_matter_are_drawn_or_said_to_be_unknown(folder: Path, tmp_path: Path) -> None:
    full = Page(folder / "report.html").text
    for title in ("Which settings matter", "What each setting does on average", "All configurations at once"):
        assert title in full
    assert "Among 9 configurations, α clearly matters; α is first in" in full
    assert "matter most cannot be told" not in full
    small = report(tmp_path / "s", effects={key: PAPER_LIKE[key] for key in itertools.product((0.0, 1.0), (0.0, 0.1))})
    assert "Which settings matter most cannot be told: 4 complete configurations that can be compared" in small
    one = report(tmp_path / "t", effects={key: PAPER_LIKE[key] for key in ((0.0, 0.0), (1.0, 0.0))})
    assert "matter most cannot be told" not in one


def test_the_table_has_a_column_of_the_judge_where_there_is_one(tmp_path: Path) -> None:
    effects = {"last_token": (0.0, -0.02), "mean": (0.0, -0.5)}
    for judge, shown in ((None, False), ("tiny-4m", True)):
        settings = {"judge": judge} if judge else {}
        text = report(
            tmp_path / str(shown), effects=effects, settings=lambda key, s=settings: {"pooling": key, **s}, seeds=(0, 1)
        )
        assert ("Judge CFM" in text) == shown
        assert ("base model, pooling=last_token – – 3.639 2.648 1.500" in text) == shown


def test_files_that_could_not_be_read_are_named(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", effects=SMALL, seeds=(0, 1))
    (folder / "results" / "metrics" / "broken.parquet").write_bytes(b"PAR1")
    (folder / "study.yaml").unlink()
    text = Page(write_report(folder)).text
    assert "broken.parquet" in text
    assert "study.yaml: no such file" in text
    assert "The question of this study is not recorded" in text


def test_a_folder_without_a_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="neither a study's folder nor the name of one"):
        write_report(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_the_picture_for_the_readme_is_small(folder: Path, tmp_path: Path) -> None:
    program = Path(__file__).parents[2] / "docs" / "report_picture.py"
    subprocess.run([sys.executable, program, folder, tmp_path / "report.png"], check=True)
    assert (tmp_path / "report.png").stat().st_size < 150_000


def test_a_race_is_shown_with_its_intervals(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", effects=SMALL)
    compared = {"best": "alpha=1.0 gamma=0.0", "difference": 0.31, "half_width": 0.12, "n_seeds": 3, "n_sequences": 32}
    comparisons = [{"configuration": "alpha=0.0 gamma=0.0", **compared}, {"configuration": "other", **compared}]
    recorder = StudyRecorder(folder, study="s")
    recorder.event("race", "race at step 20", step=20, comparisons=comparisons, stopped=["alpha=0.0 gamma=0.0"])
    text = Page(write_report(folder)).text
    assert "The race: what each comparison concluded" in text
    assert "20 alpha=0.0 gamma=0.0 alpha=1.0 gamma=0.0 +0.310 ± 0.120 3 seeds, 32 sequences stopped" in text
    assert "other alpha=1.0 gamma=0.0 +0.310 ± 0.120 3 seeds, 32 sequences continues" in text
    assert "race at step 20" not in text  # not among the incidents


def test_methods_stand_beside_each_other_where_there_are_benchmarks(tmp_path: Path, folder: Path) -> None:
    written = write_study(tmp_path / "s", effects={"SFT": (-0.2, 0.0), "EBFT": (-0.1, -0.1)}, settings=of_method)
    write_benchmark(written, {"Base": 0.3, "SFT": 0.4, "EBFT": 0.5})
    text = Page(write_report(written)).text
    assert "Method Configuration Seeds Sequences CE CFM mini: pass@1 Base – – – 3.639" in text
    assert "EBFT scores higher on benchmarks than SFT." in text
    without = Page(folder / "report.html").text
    assert "Method Configuration" not in without
    assert "scores higher on benchmarks" not in without
