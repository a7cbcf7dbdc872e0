"""The card of an exported model: what it is, what it scores, how it was trained, and on what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import ModelCard, ModelCardData

from ebft_study import config, text
from ebft_study.analysis.summary import StudySummary
from ebft_study.config import RunConfig
from ebft_study.report import facts
from ebft_study.results.lineage import settings_in_force

_TRANSFORMERS = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)"""
_PEFT = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)"""


def card(study: StudySummary, trial_id: str, run: RunConfig, step: int, *, is_adapter: bool) -> ModelCard:
    """The card of a trial's model after `step` updates; its licence is the base model's, as far as that names one."""
    data = ModelCardData(
        base_model=run.model,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        license=_license(run.model),
        tags=[run.method, "ebft-study"],
    )
    title = f"{Path(run.model).name}, {run.method.upper()}"
    question = study.results.spec.get("question")
    warm = run.training.warm_start_steps
    begun = f", after a warm start of {warm} steps of SFT" if warm else ""
    about = (
        f"`{run.model}` after {step} updates by {run.method.upper()}{begun}: trial `{trial_id}` of the study "
        f"`{study.name}`" + (f" ({question})." if question else ".")
    )
    sections = [
        ("Use", f"```python\n{_PEFT if is_adapter else _TRANSFORMERS}\n```"),
        ("Scores", _scores(study, trial_id, step)),
        ("Settings", _table(["Setting", "Value"], _settings(study, trial_id, run))),
        *((name, _table(["", ""], rows)) for name, rows in facts.provenance(_of_run(study.results.spec, run))),
        (
            "Licence",
            f"The base model's: {data.license}." if data.license else "That of the base model, which names none here.",
        ),
    ]
    parts = [f"# {title}", about, *(f"## {name}\n\n{content}" for name, content in sections)]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _of_run(spec: Mapping[str, Any], run: RunConfig) -> dict[str, Any]:
    """The record of a study without models of other runs."""
    provenance = dict(spec.get("provenance") or {})
    used = {run.model, run.features.feature_network, run.evaluation.judge}
    models = {name: record for name, record in (provenance.get("models") or {}).items() if name in used}
    return {**spec, "provenance": {**provenance, "models": models}}


def _license(model: str) -> str | None:
    """The licence that a base model's own card names; None where there is no card on this machine."""
    from transformers.utils import cached_file

    try:
        path = cached_file(model, "README.md", local_files_only=True)
        return ModelCard.load(path).data.license if path else None
    except (OSError, ValueError):
        return None


def _scores(study: StudySummary, trial_id: str, step: int) -> str:
    """What was measured of this trial at this step, beside the base model."""
    rows = study.results.evaluations
    own = rows[(rows["trial_id"] == trial_id) & (rows["benchmark"] != "validation")]
    keys = ["benchmark", "metric", "position"]
    base = own.loc[own["step"] == 0, [*keys, "value"]]
    both = own[own["step"] == step].merge(base, on=keys, how="left", suffixes=("", "_base"))
    if both.empty:
        return f"Nothing was measured at step {step}."
    cells = [
        [row["benchmark"], _metric(row), text.number(row["value_base"]), _level(row)] for row in both.to_dict("records")
    ]
    note = "One seed; ± is the standard error over sequences or problems, where it is known."
    return f"{_table(['Benchmark', 'Score', 'Base model', 'This model'], cells)}\n\n{note}"


def _metric(row: dict[Any, Any]) -> str:
    return str(row["metric"]) if pd.isna(row["position"]) else f"{row['metric']} ({int(row['position'])})"


def _level(row: dict[Any, Any]) -> str:
    error = "" if text.is_missing(row["standard_error"]) else f" ± {text.number(row['standard_error'])}"
    return text.number(row["value"]) + error


def _settings(study: StudySummary, trial_id: str, run: RunConfig) -> list[tuple[str, str]]:
    """The settings that the method reads; those that a population changed, as they were at the end."""
    settings = config.flatten(run)
    in_force = settings_in_force(study.results)
    for row in in_force[in_force["trial_id"] == trial_id].drop(columns=["trial_id", "from_attempt"]).to_dict("records"):
        settings |= {str(name): value for name, value in row.items()}
    unread = next((c.unread for c in study.configurations if (c.trials["trial_id"] == trial_id).any()), frozenset())
    return [(name, text.setting(value)) for name, value in settings.items() if name not in unread and value is not None]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
