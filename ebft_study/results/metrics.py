"""The registry of metrics: a line for everything that runs measure. Imports neither torch nor pandas.

All else follows from a line: the column of the table `metrics`, the place in `evaluations`, how training combines the
observations of micro-batches, steps and workers, the units in reports, the metrics that a search may optimize. A name
that has no line is refused wherever it is accumulated or recorded. To add a metric, add its line and report it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ebft_study.errors import ResultsError
from ebft_study.plugins import is_path, name_of

Aggregation = Literal["measured", "mean", "std", "effective_fraction", "min", "max", "sum", "per_step", "per_worker"]
"""How a row of training metrics follows from the observations since the row before, over all workers.

measured            not at all: the value is that of the row's step
mean, std, min, max of all observations
effective_fraction  Kish's effective sample size of weights over their number: (mean w)^2 / mean w^2
sum                 of all observations
per_step            sum of all observations over the number of steps: parts that add up to a step's value
per_worker          per_step over the number of workers: a duration that all workers spend concurrently
"""
FEATURE_MAP = (
    *("model", "feature_network", "random_weights", "depths", "pooling", "normalize", "dataset", "sequence_length"),
    *("packing", "stride", "first_context_length", "anchor_region", "evaluation_temperature", "cfm_samples"),
    *("temperature", "completion_length"),
)
"""Settings that change what feature matching measures: the feature map, the contexts, length and temperature."""
JUDGE = (
    *("judge", "judge_depths", "judge_pooling", "judge_normalize", "judge_completion_length", "dataset"),
    *("sequence_length", "packing", "stride", "first_context_length", "anchor_region", "evaluation_temperature"),
    *("cfm_samples", "temperature"),
)
"""Settings that change what the judge measures: its own feature map and length, the contexts and the temperature."""
REWARD = (
    *(name for name in FEATURE_MAP if name not in ("evaluation_temperature", "cfm_samples")),
    *("alpha", "whitening", "n_samples"),
)
"""Settings that change the scale of rewards."""
VERIFIER = (
    *("verifier", "parse_rule", "stop_strings", "partial_reward", "bleu_tokenizer", "comet_model"),
    *("dataset", "sequence_length", "max_answer_tokens", "overlong", "temperature"),
)
"""Settings that change the rewards of a verifier."""
CONTEXTS = (
    *("dataset", "sequence_length", "packing", "stride", "first_context_length", "anchor_region"),
    *("evaluation_temperature", "cfm_samples", "temperature", "completion_length"),
)
"""Settings that change the texts, contexts and completions of an evaluation."""
BENCHMARK = (
    *("benchmarks", "benchmark_problems", "benchmark_samples", "benchmark_temperature", "benchmark_top_p"),
    *("benchmark_max_tokens", "benchmark_protocol"),
)
"""Settings that change the scores of a benchmark."""
TEXT = ("dataset", "sequence_length", "packing")
"""Settings that change the tokens that cross-entropy is measured on."""


@dataclass(frozen=True)
class Metric:
    """One measured number.

    Args:
        direction: the better side; None where neither is.
        of: the quantity whose observations are aggregated, `name` by default; several metrics may share one.
        tables: where it is recorded: in `metrics` as a column, in `evaluations` as rows.
        position: the meaning of `position` in `evaluations`; '' for one value per evaluation.
        of_benchmarks: measured on benchmarks, not on the splits of the data.
        is_objective: whether searches, schedulers and stopping rules can ask for it: trials report it when evaluated.
        comparable_within: settings that two configurations must share for their values to be compared.
    """

    name: str
    unit: str
    description: str
    direction: Literal["min", "max"] | None = None
    aggregation: Aggregation = "measured"
    of: str = ""
    tables: tuple[Literal["metrics", "evaluations"], ...] = ("metrics",)
    position: Literal["", "completion length", "token", "samples"] = ""
    of_benchmarks: bool = False
    is_objective: bool = False
    comparable_within: tuple[str, ...] = ()
    plugin: str = ""
    """The import path of one that a user has written."""

    @classmethod
    def of_plugin(
        cls,
        path: str,
        *,
        unit: str,
        description: str,
        direction: Literal["min", "max"],
        comparable_within: Sequence[str],
    ) -> Metric:
        """A metric that a user has declared, or that a study has recorded; it has the name of its function.

        Raises:
            ResultsError: a value is not what it should be.
        """
        texts = (unit, description, *comparable_within)
        if not is_path(path):
            raise ResultsError(f"results: metric {path!r}: is no import path")
        if direction not in ("min", "max") or not all(isinstance(each, str) and len(each) < 1000 for each in texts):
            raise ResultsError(f"results: metric {path!r}: has no direction, or a text that is none")
        return cls(
            name_of(path),
            unit,
            description,
            direction,
            tables=_BOTH,
            is_objective=True,
            comparable_within=tuple(comparable_within),
            plugin=path,
        )

    @property
    def declaration(self) -> dict[str, Any]:
        """What `of_plugin` takes, as plain values."""
        within = list(self.comparable_within)
        return {
            "unit": self.unit,
            "description": self.description,
            "direction": self.direction,
            "comparable_within": within,
        }

    def defined_by(self, *, own_temperature: bool) -> tuple[str, ...]:
        """`comparable_within`, as far as it has an effect.

        Args:
            own_temperature: whether evaluations set their own; what they measure does not follow that of training then.
        """
        is_moot = own_temperature and "evaluation_temperature" in self.comparable_within
        return tuple(name for name in self.comparable_within if not (is_moot and name == "temperature"))

    def map_of(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of one configuration, by short name, that define what its values of the metric measure."""
        own_temperature = settings.get("evaluation_temperature") is not None
        return {name: settings.get(name) for name in self.defined_by(own_temperature=own_temperature)}

    @property
    def quantity(self) -> str:
        """Name under which observations are accumulated."""
        return self.of or self.name


def _by_name(*metrics: Metric) -> dict[str, Metric]:
    return {entry.name: entry for entry in metrics}


def _benchmark(
    name: str,
    description: str,
    direction: Literal["min", "max"] | None = "max",
    position: Literal["", "samples"] = "",
) -> Metric:
    where: tuple[Literal["evaluations"]] = ("evaluations",)
    return Metric(name, "", description, direction, tables=where, position=position, of_benchmarks=True)


_BOTH: tuple[Literal["metrics", "evaluations"], ...] = ("metrics", "evaluations")

METRICS: dict[str, Metric] = _by_name(
    # On evaluation steps, on the validation split; in `evaluations` on the held-out split.
    Metric(
        "ce_loss", "nats/token", "cross-entropy of all ground-truth tokens at temperature 1", "min",
        tables=_BOTH, is_objective=True, comparable_within=TEXT,
    ),
    Metric(
        "ce_answer_loss", "nats/token", "cross-entropy of the answer's tokens at temperature 1", "min",
        tables=_BOTH, is_objective=True, comparable_within=TEXT,
    ),
    Metric("perplexity", "", "exp(ce_loss)", "min", is_objective=True, comparable_within=TEXT),
    Metric(
        "cfm_loss", "squared feature norm", "unbiased conditional feature-matching loss, unwhitened, at G", "min",
        tables=_BOTH, position="completion length", is_objective=True, comparable_within=FEATURE_MAP,
    ),
    Metric(
        "judge_cfm_loss", "squared feature norm", "cfm_loss by the features of the judge, at its length", "min",
        tables=_BOTH, is_objective=True, comparable_within=JUDGE,
    ),
    Metric("cfm_standard_error", "squared feature norm", "standard error of cfm_loss over contexts"),
    Metric(
        "benchmark_score", "", "of one sampled answer on the first benchmark: pass@1, or mean BLEU", "max",
        is_objective=True, comparable_within=BENCHMARK,
    ),
    Metric("evaluation_seconds", "s", "duration of the evaluation", "min"),
    # On training steps, on the training batch.
    Metric("loss", "", "differentiated: policy_loss + gamma * cross-entropy + kl_coefficient * kl (* G with sum)",
           aggregation="per_step"),
    Metric("policy_loss", "", "-advantage * log-probability (rlvr: * ratio), mean over contexts and samples",
           aggregation="per_step"),
    Metric("train_ce_loss", "nats/token", "cross-entropy of the batch's ground-truth tokens", "min", "mean"),
    Metric("kl", "nats/token", "KL divergence of completions from the base model over G, by the value of kl_estimator",
           aggregation="mean"),
    Metric("reward", "", "alignment - alpha * diversity, mean over contexts and samples", "max", "mean",
           is_objective=True, comparable_within=REWARD),
    Metric("alignment", "", "reward's agreement with the ground truth's features", "max", "mean"),
    Metric("diversity", "", "agreement with the other samples of the context, which the reward subtracts alpha times",
           aggregation="mean"),
    Metric("advantage_std", "", "standard deviation of the advantages", aggregation="std", of="advantage"),
    Metric("zero_variance_fraction", "", "fraction of contexts whose samples all have the same reward", "min", "mean"),
    Metric("duplicate_rate", "", "fraction of samples that repeat an earlier one of their context, at most 1 - 1/n",
           "min", "mean"),
    Metric("policy_entropy", "nats/token", "entropy of the tempered policy at sampled positions", aggregation="mean"),
    Metric("train_cfm_loss", "squared feature norm", "cfm_loss of the batch's rollouts", "min", "mean"),
    Metric("fm_whitened", "", "whitened feature-matching objective with the sign of a loss", "min", "mean"),
    Metric("grad_norm", "", "global norm of the gradient before clipping", aggregation="mean"),
    Metric("learning_rate", "", "learning rate of this update"),
    Metric("unchanged_weight_fraction", "", "weights with a gradient that a step leaves as they are: too few digits",
           "min", "mean"),
    Metric("tokens_per_second", "tokens/s", "training tokens, prefix and sampled, per second", "max"),
    Metric("step_seconds", "s", "duration of the optimizer step", "min", "per_worker"),
    Metric("rollout_seconds", "s", "part of step_seconds spent sampling", "min", "per_worker"),
    Metric("feature_seconds", "s", "part of step_seconds spent in the feature network and on rewards", "min",
           "per_worker"),
    Metric("scoring_seconds", "s", "part of step_seconds spent on log-probabilities and the backward pass", "min",
           "per_worker"),
    Metric("optimizer_seconds", "s", "part of step_seconds spent on the update", "min", "per_worker"),
    Metric("sync_seconds", "s", "time to hand new weights to the rollout engine, its reading of them included", "min",
           "per_worker"),
    Metric("checkpoint_seconds", "s", "time to write a checkpoint and to hand it over, of those since the row before",
           "min", "mean"),
    # With rollouts from an engine.
    Metric("policy_lag", "updates", "updates by which the sampling weights were behind, mean over contexts", "min",
           "mean"),
    Metric("parity_mean_difference", "nats/token", "mean |log-probability of the engine - of the trainer|", "min",
           "mean"),
    Metric("parity_max_difference", "nats/token", "largest such difference since the row before", "min",
           "max", of="parity_mean_difference"),
    Metric("parity_off_fraction", "", "sampled tokens whose probability the engine and the trainer put more than 10 % "
           "apart", "min", "mean"),
    Metric("rechunk_mean_difference", "nats/token", "mean |difference| of log-probabilities between two of the "
           "trainer's own passes over the same tokens, in bfloat16", "min", "mean"),
    Metric("rechunk_off_fraction", "", "tokens whose probabilities in these passes are more than 10 % apart", "min",
           "mean"),
    Metric("importance_ratio", "", "probability of a completion under the trainer over that under the engine, mean",
           aggregation="mean"),
    Metric("importance_ratio_min", "", "smallest such ratio since the row before",
           aggregation="min", of="importance_ratio"),
    Metric("importance_ratio_max", "", "largest such ratio since the row before",
           aggregation="max", of="importance_ratio"),
    Metric("importance_weight", "", "mean ratio after truncation at importance_ratio_clip", aggregation="mean"),
    Metric("importance_clipped_fraction", "", "completions whose ratio was truncated (rlvr: tokens that were clipped)",
           "min", "mean"),
    Metric("effective_sample_fraction", "", "effective over actual number of completions, by their ratios", "max",
           "effective_fraction", of="importance_ratio"),
    # With features from a service; a feature counts once per request, however often the request contains it.
    Metric("feature_hit_rate_memory", "", "features that the service had in memory", "max", "mean"),
    Metric("feature_hit_rate_disk", "", "features that the service had on disk", "max", "mean"),
    Metric("sample_hit_rate", "", "features of samples that the service had", "max", "mean"),
    Metric("ground_truth_hit_rate", "", "features of the ground truth that the service had", "max", "mean"),
    Metric("feature_tokens_embedded", "tokens", "run through the service's network since the row before", "min", "sum"),
    Metric("feature_tokens_saved", "tokens", "that the cache, or another trial's request, made unnecessary", "max",
           "sum"),
    Metric("feature_queue_seconds", "s", "wait for the service's turn, mean over requests", "min", "mean"),
    Metric("feature_batch_requests", "requests", "requests that the service embedded in one pass, mean",
           aggregation="mean"),
    Metric("feature_cache_bytes", "B", "size of the service's cache, both tiers", aggregation="mean"),
    # With a verifier.
    Metric("verifier_reward", "", "mean reward of the sampled answers that the verifier judged", "max", "mean",
           is_objective=True, comparable_within=VERIFIER),
    Metric("unparsed_rate", "", "judged answers in whose text the verifier found no answer", "min", "mean"),
    Metric("verifier_failure_rate", "", "answers that the verifier could not judge, which are left out", "min", "mean"),
    Metric("answer_tokens", "tokens", "length of sampled answers, end token included, mean", aggregation="mean"),
    Metric("truncated_rate", "", "sampled answers that were cut at max_answer_tokens", "min", "mean"),
    Metric("verifier_seconds", "s", "part of step_seconds spent waiting for the verifier", "min", "per_worker"),
    Metric("peak_memory_bytes", "B", "largest memory of the process so far (of the device, on a GPU)", "min"),
    Metric("sequences_seen", "sequences", "training sequences consumed so far"),
    Metric("tokens_seen", "tokens", "ground-truth training tokens consumed so far"),
    # Cost of all that led to the model of the row, from the base model on (`COST`).
    Metric("flops", "FLOPs", "of all updates so far, by the cost model: sampling, features and scoring", "min"),
    Metric("rollout_flops", "FLOPs", "part of flops for sampling", "min"),
    Metric("feature_flops", "FLOPs", "part of flops in the feature network", "min"),
    Metric("scoring_flops", "FLOPs", "part of flops for log-probabilities and the backward pass", "min"),
    Metric("evaluation_flops", "FLOPs", "of all evaluations so far, no part of flops", "min"),
    Metric("sampled_tokens", "tokens", "tokens of completions that updates sampled and trained on so far"),
    Metric("update_seconds", "s", "duration of all updates so far, without evaluations and checkpoints", "min"),
    Metric("cpu_seconds", "s", "processor time of the training processes so far, evaluations included", "min"),
    Metric("energy_joules", "J", "energy of the training devices so far; null where they do not measure it", "min"),
    # In `evaluations` alone.
    Metric(
        "entropy", "nats/token", "entropy of the k-th generated token's distribution; position is k, from 1",
        tables=("evaluations",), position="token",
    ),
    # On benchmarks.
    _benchmark("greedy_pass_rate", "share of problems whose most probable answer passes all tests"),
    _benchmark("pass_at_k", "chance that one of k samples passes all tests", position="samples"),
    _benchmark("greedy_bleu", "BLEU of the most probable translation of a sentence, from 0 to 1"),
    _benchmark("best_of_k_bleu", "best BLEU of a sentence among k samples", position="samples"),
    _benchmark("corpus_bleu", "BLEU of the corpus: of greedy translations, or of those that COMET prefers among k",
               position="samples"),
    _benchmark("greedy_comet", "COMET of the most probable translation of a sentence"),
    _benchmark("best_of_k_comet", "best COMET of a sentence among k samples", position="samples"),
    _benchmark("unparsed_answers", "share of samples that hold no answer", "min"),
    _benchmark("unjudged_answers", "share of samples that the verifier failed to judge; in no other score", "min"),
    _benchmark("distinct_answers", "distinct samples of a problem over samples", None),
    _benchmark("contaminated_fraction", "share of problems whose text the training data repeat, by n-grams", "min"),
)  # fmt: skip

_OURS = frozenset(METRICS) | {
    *("study", "trial_id", "attempt", "step", "written_at", "evaluated_step", "best_checkpoint", "host", "outcome"),
    *("done", "config", "date", "timestamp", "pid", "hostname", "node_ip", "training_iteration", "time_total_s"),
}
"""Metrics of this package, other columns, and what else a report to Ray Tune holds: plug-ins `register` other names."""

_LOADED: set[str] = set()
"""Names of metrics whose code this process has loaded."""


def metric(name: str, table: Literal["metrics", "evaluations"] | None = None) -> Metric:
    """The registered metric `name`, of `table` if that is given; refuses others with the nearest name."""
    known = METRICS if table is None else in_table(table)
    if name not in known:
        raise unknown("metric" if table is None else f"metric of {table}", name, known, REGISTER)
    return known[name]


def register(entry: Metric, *, is_recorded: bool = False) -> None:
    """Add the metric of a plug-in, or replace it; its column in `metrics` follows.

    Args:
        is_recorded: it was read from a study, and gives way to one that this process has loaded.

    Raises:
        ResultsError: the name is taken.
    """
    if entry.name in _OURS:
        raise ResultsError(f"results: metric {entry.name!r}: this name is taken. Give yours another one")
    if is_recorded and entry.name in _LOADED:
        if METRICS[entry.name] != entry:
            raise ResultsError(f"results: metric {entry.name!r}: this process has loaded another one of this name")
        return
    if not is_recorded:
        _LOADED.add(entry.name)
    METRICS[entry.name] = entry


def in_table(table: str) -> dict[str, Metric]:
    """The metrics of a table, in the order of its columns or rows."""
    return {name: entry for name, entry in METRICS.items() if table in entry.tables}


COST = (
    *("flops", "rollout_flops", "feature_flops", "scoring_flops", "evaluation_flops"),
    *("sampled_tokens", "update_seconds", "cpu_seconds", "energy_joules"),
)
"""Metrics that add up what a run costs. In `trials` they are sums over all attempts, with what was done twice."""
REGISTER = "Register new metrics, with their aggregation, in ebft_study/results/metrics.py"
AGGREGATED = tuple(entry for entry in METRICS.values() if entry.aggregation != "measured")
"""Metrics that training steps accumulate."""
QUANTITIES: dict[str, tuple[Metric, ...]] = {
    quantity: tuple(entry for entry in AGGREGATED if entry.quantity == quantity)
    for quantity in dict.fromkeys(entry.quantity for entry in AGGREGATED)
}
"""What training steps observe -> the metrics that follow from it."""


def unknown(what: str, name: str, known: Iterable[str], remedy: str) -> ResultsError:
    """The error for a name that no schema holds: one line with the nearest known name."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(names)}."
    return ResultsError(f"results: unknown {what} {name!r}. {hint} {remedy}")
