"""A stopping rule: a metric is beyond a limit, several evaluations in a row."""

from collections.abc import Sequence

from ebft_study.study.folder.trial_states import Evaluation


def beyond(history: Sequence[Evaluation], metric: str, limit: float, evaluations: int = 2) -> str:
    """A reason to stop, or ''."""
    last = history[-evaluations:]
    if len(last) < evaluations or not all(evaluation.get(metric) > limit for evaluation in last):
        return ""
    return f"{metric} {last[-1].get(metric):.3g} is beyond {limit:g} for {evaluations} evaluations"
