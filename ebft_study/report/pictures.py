"""What all figures of a report share: the picture type, limits, names, and whom to show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from ebft_study.report.tables import Configuration, Study, best

# Metrics compared on the held-out split, with the titles of their panels.
TITLES = {"ce_loss": "Held-out CE", "cfm_loss": "Held-out CFM"}
# A value further from the base model than so many times the median one may leave the frame or the colour scale.
DIVERGENCE = 4.0


@dataclass(frozen=True)
class Picture:
    """A figure with its file name, title, and a caption that says how to read it."""

    name: str
    title: str
    caption: str
    figure: Figure


def protagonists(study: Study) -> list[Configuration]:
    """SFT and the best EBFT configuration, each chosen by validation CFM."""
    return [c for c in (best(study.sft), best(study.ebft)) if c is not None]


def most_relevant(configurations: Sequence[Configuration], limit: int) -> tuple[list[Configuration], str]:
    """At most `limit` configurations in their order, baselines first in line, and a note on those left out."""
    if len(configurations) <= limit:
        return list(configurations), ""
    ranked = sorted(configurations, key=lambda c: (c.baseline is None, math.isnan(c.validation_cfm), c.validation_cfm))
    kept = {c.name for c in ranked[:limit]}
    left_out = len(configurations) - limit
    note = f" Drawn are the {limit} best by validation CFM, baselines included; {left_out} more are in the table."
    return [c for c in configurations if c.name in kept], note


def unit_of(metric: str) -> str:
    return "nats/token" if metric == "ce_loss" else "squared feature norm"


def panel_title(study: Study, metric: str) -> str:
    """The title of a panel of held-out values; CFM says at which completion length."""
    at = f", {study.length} tokens" if metric == "cfm_loss" and study.length is not None else ""
    return TITLES[metric] + at
