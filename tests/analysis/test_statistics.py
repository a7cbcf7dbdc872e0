"""Intervals against closed forms, and the degenerate cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from ebft_study.analysis.statistics import (
    Interval,
    Score,
    bootstrap,
    detectable,
    difference,
    holm,
    mean_interval,
    paired_difference,
    pairs_seeds,
)

# Quantiles of Student's t at 0.975 from printed tables.
T_QUANTILE = {2: 12.706, 3: 4.303, 5: 2.776, 10: 2.262}


@pytest.mark.parametrize("n", sorted(T_QUANTILE))
def test_interval_is_the_textbook_one(n: int) -> None:
    values = np.random.default_rng(n).normal(3.0, 2.0, n)
    interval = mean_interval(values)
    mean = sum(values) / n
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    margin = T_QUANTILE[n] * deviation / math.sqrt(n)
    assert interval.mean == pytest.approx(mean)
    assert (interval.low, interval.high) == pytest.approx((mean - margin, mean + margin), abs=1e-3 * margin)
    assert interval.half_width == pytest.approx(margin, rel=1e-3)


def test_two_seeds_by_hand() -> None:
    interval = mean_interval([1.0, 3.0])
    # s = sqrt(2), s / sqrt(2) = 1
    assert (interval.mean, interval.high) == pytest.approx((2.0, 2.0 + 12.7062), abs=1e-4)


def test_intervals_cover_the_true_mean_about_95_times_in_100() -> None:
    random = np.random.default_rng(0)
    intervals = [mean_interval(random.normal(1.0, 1.0, 4)) for _ in range(1000)]
    assert 0.93 < np.mean([i.low < 1.0 < i.high for i in intervals]) < 0.97


def test_pairing_removes_what_seeds_share() -> None:
    shared = np.random.default_rng(1).normal(0, 10, 5)
    left = {seed: shared[seed] + 1.0 + 0.01 * seed for seed in range(5)}
    right = {seed: shared[seed] for seed in range(5)}
    difference = paired_difference(left, right)
    assert difference.mean == pytest.approx(1.02)
    assert difference.half_width < 0.03
    assert difference.side == "above"


def test_only_seeds_that_both_have_are_compared() -> None:
    difference = paired_difference({0: 5.0, 1: 6.0, 2: 100.0}, {1: 4.0, 0: 4.0, 3: 9.0})
    assert (difference.mean, difference.n) == (1.5, 2)


def test_one_seed_has_no_interval_and_no_side() -> None:
    interval = mean_interval([-3.0])
    assert (interval.mean, interval.n, interval.side) == (-3.0, 1, "unclear")
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_no_common_seed_is_no_number() -> None:
    interval = paired_difference({0: 1.0}, {1: 1.0})
    assert interval.n == 0
    assert math.isnan(interval.mean)
    assert interval.side == "unclear"


def test_equal_values_give_an_interval_of_no_width() -> None:
    interval = mean_interval([0.5, 0.5, 0.5])
    assert interval.low == interval.high == 0.5
    assert interval.side == "above"
    assert mean_interval([0.0, 0.0]).side == "unclear"


def test_non_finite_values_are_left_out() -> None:
    assert mean_interval([1.0, math.nan, 2.0, math.inf]).n == 2


def test_differences_carry_sign_interval_and_enough_digits() -> None:
    assert Interval(-0.031, 0.01 / T_QUANTILE[3], 3).as_difference() == "−0.031 ± 0.010"
    assert Interval(0.0021, 0.0027 / T_QUANTILE[3], 3).as_difference() == "+0.0021 ± 0.0027"
    assert Interval(0.2, math.nan, 1).as_difference() == "+0.200"
    assert Interval(math.nan, math.nan, 0).as_difference() == "–"
    interval = Interval(-0.031, 0.01 / T_QUANTILE[3], 3)
    assert interval.in_words() == "−0.031 (95 % interval −0.041 to −0.021, 3 seeds)"
    over_both = Interval(-0.031, 0.006 / T_QUANTILE[3], 3, 0.008 / 1.96, 100_000)
    assert over_both.in_words() == "−0.031 (95 % interval −0.041 to −0.021, 3 seeds and 100000 sequences)"
    assert Interval(0.2, math.nan, 1).in_words() == "+0.200 (1 seed, so no interval)"


# --- seeds and sequences ---------------------------------------------------------------------------------------


def scores(table: np.ndarray, counts: np.ndarray | None = None) -> list[Score]:
    """One value for each row (seed) of a table of sequences."""
    counts = np.ones(table.shape[1]) if counts is None else counts
    return [Score(float(np.average(row, weights=counts)), range(len(row)), counts, row) for row in table]


def drawn(random: np.random.Generator, seeds: int, sequences: int, of_seeds: float) -> list[Score]:
    """Values around 0 that vary with the seed, the sequence and both; `of_seeds` is the seeds' part of the variance."""
    seed = random.normal(0, math.sqrt(of_seeds * seeds), (seeds, 1))
    deviation = math.sqrt((1 - of_seeds) * sequences)
    return scores(seed + random.normal(0, deviation, sequences) + random.normal(0, deviation, (seeds, sequences)))


def test_an_interval_over_sequences_follows_from_its_definition() -> None:
    random, counts = np.random.default_rng(0), np.array([1, 3, 2, 5])
    table = random.normal(2.0, 1.0, (3, 4))
    interval = mean_interval(scores(table, counts))
    means = [sum(c * v for c, v in zip(counts, row, strict=True)) / 11 for row in table]
    over_seeds = [sum(column) / 3 for column in table.T]
    mean = sum(means) / 3
    error = math.sqrt(sum((m - mean) ** 2 for m in means) / 2 / 3)
    residuals = [c * (v - mean) / 11 for c, v in zip(counts, over_seeds, strict=True)]
    sequence_error = math.sqrt(4 / 3 * sum(r**2 for r in residuals))
    assert (interval.mean, interval.error, interval.sequence_error) == pytest.approx((mean, error, sequence_error))
    assert (interval.n, interval.n_sequences) == (3, 4)
    # Quantiles for 2 and 3 degrees of freedom from a printed table.
    assert interval.half_width == pytest.approx(math.hypot(4.3027 * error, 3.1824 * sequence_error), rel=1e-4)


def test_differences_are_paired_by_sequence() -> None:
    """What sequences share cancels: the difference is known exactly, the level is not."""
    easy = np.random.default_rng(1).normal(0, 10, 50)
    left, right = (dict(enumerate(scores(easy + np.full((3, 1), shift)))) for shift in (1.5, 1.0))
    assert mean_interval(left.values()).half_width > 2
    difference = paired_difference(left, right)
    assert (difference.mean, difference.n_sequences) == (pytest.approx(0.5), 50)
    assert difference.half_width == pytest.approx(0, abs=1e-9)


def test_other_sequences_or_contexts_are_not_paired() -> None:
    (a,) = scores(np.arange(4.0)[None])
    for other in (Score(1.0, [0, 1, 2, 5], a.counts, a.values), Score(1.0, a.sequences, 2 * a.counts, a.values)):
        assert type(a - other) is float
        assert mean_interval([a, other]).n_sequences == 0
    assert a - 0.5 == 1.0
    half = 0.5 * a
    assert isinstance(half, Score)
    assert half.values.tolist() == [0, 0.5, 1.0, 1.5]


@pytest.mark.parametrize("values", [[1.0, 1.4, 1.3], scores(np.random.default_rng(3).normal(0.3, 0.4, (3, 20)))])
def test_the_p_value_is_that_of_the_interval(values: list[float]) -> None:
    interval = mean_interval(values)
    assert interval.half_width_at(interval.p_value) == pytest.approx(abs(interval.mean))
    at_bound = interval.minus(interval.low)
    assert at_bound.p_value == pytest.approx(0.05)
    assert (interval.p_value < 0.05) == (interval.side != "unclear")


def test_the_p_value_of_seeds_alone_is_that_of_the_t_test() -> None:
    from scipy import stats

    values = [0.3, 0.1, 0.4, 0.15]
    assert mean_interval(values).p_value == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-6)


@pytest.mark.parametrize("of_seeds", [0.02, 0.2, 0.5, 0.8, 0.98])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_over_seeds_and_sequences_cover_at_least_nominally(seeds: int, of_seeds: float) -> None:
    random = np.random.default_rng([seeds, int(100 * of_seeds)])
    intervals = [mean_interval(drawn(random, seeds, 64, of_seeds)) for _ in range(400)]
    # Three standard errors of a share of 400 below 0.95.
    assert np.mean([i.low < 0 < i.high for i in intervals]) > 0.917


def test_seeds_alone_and_the_bootstrap_cover_too_little() -> None:
    """Why neither decides: one forgets the sequences, the other draws from three seeds as if they were all."""
    random = np.random.default_rng(5)
    mostly_sequences = [mean_interval(map(float, drawn(random, 5, 64, 0.1))) for _ in range(200)]
    assert np.mean([i.low < 0 < i.high for i in mostly_sequences]) < 0.85
    mostly_seeds = [bootstrap(drawn(random, 3, 64, 0.9)) for _ in range(200)]
    assert np.mean([low < 0 < high for low, high in mostly_seeds]) < 0.88


def test_the_bootstrap_is_that_of_its_definition() -> None:
    """Quantiles of replicates drawn one by one."""
    table, counts = np.random.default_rng(2).normal(1.0, 1.0, (4, 9)), np.arange(1, 10)
    random, means = np.random.default_rng(9), []
    for _ in range(4000):
        rows, columns = random.integers(0, 4, 4), random.integers(0, 9, 9)
        weights = counts[columns]
        means.append(float((table[np.ix_(rows, columns)].mean(axis=0) * weights).sum() / weights.sum()))
    low, high = bootstrap(scores(table, counts), replicates=4000)
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.06)


@pytest.mark.parametrize(("seed_deviation", "sequence_deviation"), [(1.0, 0.01), (1.0, 3.0), (0.05, 3.0)])
@pytest.mark.parametrize("seeds", [3, 5])
def test_the_detectable_difference_is_seen_in_about_80_of_100(
    seeds: int, seed_deviation: float, sequence_deviation: float
) -> None:
    true = detectable(seed_deviation, sequence_deviation, seeds=seeds, sequences=64)
    random = np.random.default_rng(4)
    seen = 0
    for _ in range(300):
        table = random.normal(0, seed_deviation, (seeds, 1)) + random.normal(0, sequence_deviation, 64)
        seen += mean_interval(scores(true + table)).side == "above"
    assert 0.68 < seen / 300 < 0.9
    assert math.isnan(detectable(seed_deviation, sequence_deviation, seeds=1, sequences=64))


# --- differences of studies ------------------------------------------------------------------------------------


def test_shared_seeds_are_paired_as_within_a_study() -> None:
    random = np.random.default_rng(3)
    left, right = ({seed: float(value) for seed, value in enumerate(random.normal(0, 1, 4))} for _ in range(2))
    assert difference(left, right, same_sequences=True) == paired_difference(left, right)


def test_other_seeds_are_compared_by_welchs_test() -> None:
    random = np.random.default_rng(4)
    left = dict(enumerate(random.normal(0.0, 1.0, 3).tolist()))
    right = dict(enumerate(random.normal(1.0, 3.0, 6).tolist(), start=10))
    interval = difference(left, right, same_sequences=True)
    expected = scipy.stats.ttest_ind(list(left.values()), list(right.values()), equal_var=False)
    assert interval.p_value == pytest.approx(expected.pvalue)
    assert (interval.low, interval.high) == pytest.approx(tuple(expected.confidence_interval()))


def test_few_shared_seeds_of_many_are_not_all_that_is_compared() -> None:
    left, right = ({seed: float(seed % 3) for seed in range(*ends)} for ends in ((0, 10), (8, 18)))
    assert not pairs_seeds(left, right)
    assert difference(left, right, same_sequences=True).n == 20
    assert pairs_seeds(left, dict.fromkeys(range(5, 15), 0.0))
    assert not pairs_seeds({0: 1.0}, {0: 2.0})


def test_values_on_other_sequences_have_no_interval_unless_their_sequences_are_known() -> None:
    values = dict.fromkeys(range(3), 1.0)
    assert math.isnan(difference(values, values).half_width)
    assert difference(values, values, same_sequences=True).half_width == 0.0


@pytest.mark.parametrize("same_seeds", [True, False])
@pytest.mark.parametrize("same_sequences", [True, False])
def test_two_runs_of_one_configuration_differ_in_about_5_of_100_cases(same_seeds: bool, same_sequences: bool) -> None:
    """Seeds move whole runs, sequences differ far more than runs do, and each run sees each sequence a little anew.

    The interval adds the half-widths of seeds and sequences, each with its own t, so where both matter it is wider than
    need be: down to 2 in 100.
    """
    random, rejected, repetitions = np.random.default_rng([same_seeds, same_sequences]), 0, 2000
    for _ in range(repetitions):
        sequences = [random.normal(0, 0.5, 60) for _ in range(2)]
        of_seed = random.normal(0, 0.2, 8)
        runs = []
        for study in range(2):
            first = 0 if same_seeds else 4 * study
            easy, number = sequences[0 if same_sequences else study], 0 if same_sequences else 100 * study
            values = {
                seed: random.normal(0, 0.05) + of_seed[seed] + easy + random.normal(0, 0.1, 60)
                for seed in range(first, first + 4)
            }
            runs.append({s: Score(v.mean(), range(number, number + 60), np.ones(60), v) for s, v in values.items()})
        rejected += difference(*runs).side != "unclear"
    assert 0.02 < rejected / repetitions < 0.06


def test_a_difference_of_sequences_alone_is_no_difference_of_runs() -> None:
    """Without the error over sequences, studies with different held-out texts would nearly always differ."""
    random = np.random.default_rng(8)
    texts = [random.normal(0, 0.5, 60) for _ in range(2)]
    runs = [
        {s: Score(t.mean() + 1e-4 * s, range(60 * k, 60 * k + 60), np.ones(60), t + 1e-4 * s) for s in range(3)}
        for k, t in enumerate(texts)
    ]
    interval = difference(*runs)
    # Both values move with the seed alike: what is left is the difference of two means of 60 texts.
    assert interval.error == pytest.approx(0.0, abs=1e-12)
    expected = scipy.stats.ttest_ind(*texts, equal_var=False)
    assert interval.p_value == pytest.approx(expected.pvalue, rel=1e-6)


def test_of_many_differences_without_any_one_is_called_clear_in_5_of_100_studies_at_most() -> None:
    random, false, repetitions = np.random.default_rng(9), 0, 600
    for _ in range(repetitions):
        p_values = []
        for _ in range(10):
            runs = [{seed: float(value) for seed, value in enumerate(random.normal(0, 1, 3))} for _ in range(2)]
            p_values.append(difference(*runs, same_sequences=True).p_value)
        false += min(holm(p_values)) < 0.05
    assert false / repetitions < 0.05 + 3 * math.sqrt(0.05 * 0.95 / repetitions)
