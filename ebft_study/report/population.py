"""Population-based training in the report: which trial went on from which, and with what settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ebft_study import text
from ebft_study.report.tables import Study
from ebft_study.results.lineage import lineage


def rows(study: Study) -> list[dict[str, str]]:
    """A line per takeover, in order of time; nothing for a study without any."""
    return [
        {
            "trial": row["trial_id"],
            "step": text.count(row["step"]),
            "donor": row["donor"],
            "donor_step": text.count(row["donor_step"]),
            "score": text.number(row["score"]),
            "donor_score": text.number(row["donor_score"]),
            "before": _formatted(row["before"]),
            "after": _formatted(row["after"]),
        }
        for row in lineage(study.results).to_dict("records")
    ]


def _formatted(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{text.symbol(name)}={text.setting(value)}" for name, value in settings.items())
