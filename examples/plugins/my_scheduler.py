"""A scheduler: a configuration stops when another one is better by more than a margin."""

from dataclasses import dataclass

from ebft_study.study.stopping.schedulers import Curve


@dataclass
class Margin:
    """`margin`: in units of the objective. Curves are such that less is better, whatever the objective's mode."""

    margin: float

    def group(self, configuration: str) -> int:
        """All are compared with each other."""
        return 0

    def is_due(self, group: int, before: float, step: float) -> bool:
        """At every evaluation after the grace period."""
        return True

    def judged(self, curve: Curve, step: float) -> float:
        return curve.best(step) - self.margin

    def standard(self, curve: Curve, step: float) -> float:
        return curve.best(step)

    def is_behind(self, better: int, others: int, trials: int) -> bool:
        return better > 0

    def verdict(self, others: int) -> str:
        return f"is worse than the best of {others} others by more than {self.margin:g}"
