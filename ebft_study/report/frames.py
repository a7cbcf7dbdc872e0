"""The tables of the report as data frames of text, for notebooks."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from ebft_study import text
from ebft_study.analysis.summary import StudySummary
from ebft_study.report import claims, collected, content, methods, scaling
from ebft_study.report.verdicts import Verdict


def configurations(study: StudySummary) -> pd.DataFrame:
    """Base models, configurations from the best to the worst, and baselines: held-out means and differences."""
    return collected.outcomes(study).frame()


def verdicts(judged: Sequence[Verdict]) -> pd.DataFrame:
    """Verdicts on claims of the paper, each with its numbers."""
    columns = ["the study", "the paper's claim", "where", "numbers"]
    return pd.DataFrame([(v.ruling, v.claim, v.reference, v.sentence) for v in judged], columns=columns)


def about(study: StudySummary, *references: str) -> pd.DataFrame:
    """Verdicts on the claims of some figures and tables of the paper: `Figure 6`."""
    return verdicts([v for v in claims.judge(study) if any(f"{r}," in f"{v.reference}," for r in references)])


def method_tables(study: StudySummary) -> list[pd.DataFrame]:
    """A table per task: methods by held-out losses and scores; none without benchmarks."""
    return [table.frame() for table in methods.method_tables(study)]


def laws(study: StudySummary) -> list[pd.DataFrame]:
    """Scaling laws by method, then effective speedups over SFT; none without an axis of scale."""
    section = scaling.section(study)
    if section is None:
        return []
    fits = pd.DataFrame(section.rows, columns=["loss", "method", "points", "form", "parameters", "held out"])
    columns = ["loss", "method", "amount", "effective speedup over SFT", "cost ratio"]
    speedups = pd.DataFrame(section.speedups, columns=columns)
    return [table for table in (fits, speedups) if len(table)]


def ends(study: StudySummary) -> pd.DataFrame:
    """How trials ended, and why: numbers of trials, with the steps that stopping saved."""
    trials = study.results.trials
    reasons = trials["stop_reason"].fillna(trials["error"]).fillna(text.NOTHING)
    counted = trials.assign(reason=reasons).groupby(["status", "reason"], sort=False)
    table = counted.agg(trials=("trial_id", "size"), steps_saved=("steps_saved", "sum")).reset_index()
    saved = [text.count(steps) if steps else text.NOTHING for steps in table.pop("steps_saved")]
    return table.assign(**{"steps saved": saved})


def race(study: StudySummary) -> pd.DataFrame | None:
    """The comparisons of a race, in order of steps; None for a study without one."""
    rows = content.race_rows(study)
    return pd.DataFrame(rows) if rows else None
