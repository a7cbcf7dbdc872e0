"""Rules that stop a single trial: pure functions from its evaluations so far to a reason, or to ''.

Schedulers compare configurations; these rules look at one trial alone, so they also work where all are bad. Users add
their own (`StoppingRule`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ebft_study import plugins
from ebft_study.errors import EbftError
from ebft_study.study.folder.trial_states import Evaluation
from ebft_study.study.spec.study_spec import ObjectiveSpec, StoppingSpec

FUNCTIONS = "stopping.functions"
_ROUNDING = 1e-9  # of a mean over contexts that are all at the largest possible rate


class StoppingRule(Protocol):
    """Why a trial should stop after the last of its evaluations, in a few words; '' if it continues.

    Is asked after each new evaluation but the last one of a trial, in the driver. `history` begins with the base model,
    at step 0, and holds what trials report: `evaluation.step`, and `evaluation.get("ce_loss")` (NaN where it is not
    measured). The same history has the same answer, for a resumed study and a replay.
    """

    def __call__(self, history: Sequence[Evaluation], /, **options: Any) -> str: ...


def reason_to_stop(
    history: Sequence[Evaluation],
    rules: StoppingSpec,
    objective: ObjectiveSpec,
    *,
    n_samples: int,
    warm_start_steps: int = 0,
) -> str:
    """The reason of the first rule that stops the trial; '' if it continues."""
    checks: dict[str, Callable[..., str]] = {
        "divergence": diverged,
        "collapse": functools.partial(collapsed, n_samples=n_samples),
        "stagnation": functools.partial(stagnated, objective=objective, start=warm_start_steps),
        "reward_hacking": hacked,
    }
    for name, rule in rules:
        if name in checks and rule and (reason := checks[name](history, **rule.model_dump())):
            return str(reason)
    asked = (_asked(path, options, history) for path, options in rules.functions.items())
    return next(filter(None, asked), "")


def _asked(path: str, options: Mapping[str, Any], history: Sequence[Evaluation]) -> str:
    """The answer of a rule of the user.

    Raises:
        ConfigError: it has raised an error, or returned something else.
    """
    rule: StoppingRule = plugins.load(path, key=FUNCTIONS)
    try:
        reason = rule(list(history), **options)
    except EbftError:
        raise
    except Exception as error:
        raise plugins.raised(FUNCTIONS, path, error) from error
    if not isinstance(reason, str):
        raise plugins.refused(FUNCTIONS, path, f"it has returned {reason!r}", "Return a reason to stop, or ''")
    return reason and f"{plugins.name_of(path)}: {' '.join(reason.split())}"


def diverged(history: Sequence[Evaluation], *, margin: float, evaluations: int) -> str:
    """Cross-entropy above the base model's by more than `margin` nats/token in the last `evaluations` ones.

    What happens with alpha < 1 and gamma = 0 (section 4 of the paper). Without an evaluation of the base model there is
    nothing to compare with.
    """
    last = _last(history, evaluations)
    if not last or history[0].step != 0:
        return ""
    base = history[0].get("ce_loss")
    if not all(evaluation.get("ce_loss") > base + margin for evaluation in last):
        return ""
    return (
        f"diverged: ce_loss {last[-1].get('ce_loss'):.4g} is above the base model's {base:.4g} by more than {margin:g} "
        f"for {evaluations} evaluations"
    )


def collapsed(
    history: Sequence[Evaluation], *, duplicate_rate: float, entropy: float, evaluations: int, n_samples: int
) -> str:
    """Samples repeat each other, or the policy's entropy is below `entropy` nats/token, in the last `evaluations` ones.

    Of n equal samples n - 1 repeat an earlier one, so the rate of duplicates is at most 1 - 1/n: `duplicate_rate` is
    the fraction of that from which the samples count as collapsed. One sample per context repeats nothing.
    """
    last = _last(history, evaluations)
    rates, entropies = ([e.get(name) for e in last] for name in ("duplicate_rate", "policy_entropy"))
    limit = duplicate_rate * (1 - 1 / n_samples)
    if last and n_samples > 1 and all(rate >= limit - _ROUNDING for rate in rates):
        share = f"{duplicate_rate:g} of the largest possible with n_samples={n_samples}"
        is_alike = f"duplicate_rate {rates[-1]:.3g} is at least {limit:.3g} ({share})"
        return f"collapsed: {is_alike} for {evaluations} evaluations"
    if last and all(value < entropy for value in entropies):
        return f"collapsed: policy_entropy {entropies[-1]:.3g} is below {entropy:g} for {evaluations} evaluations"
    return ""


def stagnated(
    history: Sequence[Evaluation],
    objective: ObjectiveSpec,
    *,
    improvement: float,
    evaluations: int,
    start: int = 0,
) -> str:
    """The best objective of the last `evaluations` ones is not better by `improvement` than the best one before.

    Looks at the evaluations after step `start`, the end of the warm start: a trial that first loses to the base model
    and has improved since is not at its end.
    """
    trained = [evaluation for evaluation in history if evaluation.step > start]
    last, earlier = trained[-evaluations:], trained[:-evaluations]
    sign = 1.0 if objective.mode == "min" else -1.0
    before = [sign * value for e in earlier if math.isfinite(value := e.get(objective.metric))]
    now = [sign * value for e in last if math.isfinite(value := e.get(objective.metric))]
    if not before or len(now) < evaluations or min(now) <= min(before) - improvement:
        return ""
    return (
        f"no progress: {objective.metric} {sign * min(now):.4g} at best in {evaluations} evaluations, against "
        f"{sign * min(before):.4g} before"
    )


def hacked(history: Sequence[Evaluation], *, evaluations: int) -> str:
    """Reward and validation feature-matching loss both rise from each of the last evaluations to the next.

    The reward is meant to lower that loss: what raises both serves the feature network, not the data. `evaluations`
    counts the rises.
    """
    last = _last(history, evaluations + 1)
    rises = list(itertools.pairwise(last))
    both = all(b.get("reward") > a.get("reward") and b.get("cfm_loss") > a.get("cfm_loss") for a, b in rises)
    if not rises or not both:
        return ""
    return (
        f"reward hacking: reward rose to {last[-1].get('reward'):.4g} and cfm_loss to "
        f"{last[-1].get('cfm_loss'):.4g}, {evaluations} evaluations in a row"
    )


class RuleMonitor:
    """Collects the evaluations of running trials and applies the rules to each new one."""

    def __init__(
        self, rules: StoppingSpec, objective: ObjectiveSpec, past: Mapping[str, Sequence[Evaluation]] | None = None
    ) -> None:
        """`past`: evaluations of trials in earlier sessions of the study."""
        self._rules, self._objective = rules, objective
        self._histories = {trial_id: list(history) for trial_id, history in (past or {}).items()}
        self.reasons: dict[str, str] = {}
        """Trial -> reason why it was stopped."""

    def should_stop(
        self,
        trial_id: str,
        metrics: Mapping[str, float],
        *,
        total_steps: int,
        n_samples: int,
        warm_start_steps: int = 0,
    ) -> bool:
        """Whether a trial that has just reported should stop.

        Ignores a report that repeats an evaluation (`evaluated_step` is below `step`), and one of a step that was
        evaluated before, as a retried trial sends it.
        """
        step, history = int(metrics["step"]), self._histories.setdefault(trial_id, [])
        if metrics.get("evaluated_step") != step or (history and step <= history[-1].step) or step >= total_steps:
            return False
        history.append(Evaluation(step, dict(metrics)))
        reason = reason_to_stop(
            history, self._rules, self._objective, n_samples=n_samples, warm_start_steps=warm_start_steps
        )
        if reason:
            self.reasons[trial_id] = f"{reason}; {steps_saved(step, total_steps)}"
        return bool(reason)


def steps_saved(step: float, total_steps: int) -> str:
    return f"{total_steps - step:g} of {total_steps} steps saved"


def _last(history: Sequence[Evaluation], count: int) -> Sequence[Evaluation]:
    """The last `count` evaluations after step 0; none if there are fewer."""
    trained = [evaluation for evaluation in history if evaluation.step > 0]
    return trained[-count:] if len(trained) >= count else []
