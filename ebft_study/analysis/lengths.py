"""Held-out feature matching by completion length: EBFT's against SFT's."""

from __future__ import annotations

from ebft_study.analysis.configuration import grouped
from ebft_study.analysis.selection import select
from ebft_study.analysis.statistics import Interval
from ebft_study.analysis.summary import StudySummary


def against_sft(study: StudySummary) -> list[tuple[str, dict[int, Interval]]]:
    """EBFT's CFM minus SFT's at each length that both have, for each feature map, with the map's label.

    Each seed is scored by the configurations that the other seeds choose, by the study's objective on validation data.
    """
    groups = grouped(study.configurations, lambda c: c.map_of("cfm_loss", at_one_length=True))
    compared = []
    for key, group in groups.items():
        scored = [c for c in group if c.is_scored]
        ebft, sft = (
            select([c for c in scored if c.settings.get("method") == method], study.objective[0])
            for method in ("ebft", "sft")
        )
        if ebft is None or sft is None:
            continue
        gaps = {
            length: ebft.minus(ebft.final("cfm_loss", length), sft.final("cfm_loss", length), other=sft)
            for length in study.lengths
        }
        gaps = {length: gap for length, gap in gaps.items() if gap.n}
        if gaps:
            compared.append((study.map_label(key), gaps))
    return compared
