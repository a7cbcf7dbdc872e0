"""Studies compared: what is joined, what is paired, what is refused, and what is said of copies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from ebft_study import config
from ebft_study.analysis.comparison import Comparison, Difference, compare
from ebft_study.analysis.identity import identity
from ebft_study.analysis.summary import StudySummary, summarize
from ebft_study.errors import ResultsError
from ebft_study.results import load
from tests.synthetic_study import PAPER_LIKE, rewrite, write_study

SMALL = {key: PAPER_LIKE[key] for key in ((1.0, 0.0), (0.0, 0.1), None)}


def settings(**further: Any) -> Callable[[Any], dict[str, Any]]:
    """Settings of a configuration, with further ones that all have; they are part of its label."""
    return lambda key: {**further, "gamma": key[1], "alpha": key[0]}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("compared") / "first", effects=SMALL, with_scores=True)


def read(*folders: Path) -> dict[str, StudySummary]:
    return {folder.name: summarize(load(folder)) for folder in folders}


def only(comparison: Comparison, label: str, metric: str = "ce_loss") -> Difference:
    (found,) = (each for each in comparison.differences if each.label == label and each.metric == metric)
    return found


def test_a_copy_under_another_name_is_no_difference_and_the_same_trials(first: Path, tmp_path: Path) -> None:
    shutil.copytree(first, tmp_path / "copy")
    compared = compare(read(first, tmp_path / "copy"))
    assert {each.ruling for each in compared.differences} == {"same trials"}
    assert {each.interval.mean for each in compared.differences} == {0.0}
    assert compared.n_tested == 0
    assert compared.notes == ()


def test_equal_values_of_other_trials_are_equal_and_not_the_same_trials(first: Path, tmp_path: Path) -> None:
    again = write_study(tmp_path / "again", effects=SMALL, with_scores=True)
    for path in (again / "results" / "trials").glob("*.parquet"):
        table = pq.read_table(path)
        index = table.column_names.index("host")
        hosts = pa.array(["another machine"] * len(table))
        rewrite(path, table.set_column(index, table.schema.field("host"), hosts))
    compared = compare(read(first, again))
    assert {each.ruling for each in compared.differences} == {"equal"}


def test_a_copy_that_was_extended_is_no_evidence_by_the_trials_that_it_shares(first: Path, tmp_path: Path) -> None:
    longer = write_study(tmp_path / "longer", effects=SMALL, seeds=(0, 1, 2), with_scores=True)
    shorter = write_study(
        tmp_path / "shorter", effects=SMALL, seeds=(0, 1, 2), with_scores=True, statuses={((1.0, 0.0), 2): "failed"}
    )
    compared = compare(read(shorter, longer))
    assert only(compared, "α=1, γ=0").ruling == "same trials"
    assert len(only(compared, "α=1, γ=0").by_seed) == 2


def test_configurations_are_joined_by_settings_and_not_by_labels(first: Path, tmp_path: Path) -> None:
    effects = {(1.0, 0.0): SMALL[1.0, 0.0], (0.5, 0.5): (0.1, 0.1), None: SMALL[None]}
    other = write_study(
        tmp_path / "other", effects=effects, settings=settings(learning_rate=1e-4, validation_sequences=32), noise=0.003
    )
    studies = read(first, other)
    ours, theirs = ({c.name for c in study.configurations} for study in studies.values())
    assert ours & theirs == {"sft"}
    compared = compare(studies)
    assert [(pair.reference.label, pair.other.label) for pair in compared.pairs] == [
        ("α=1, γ=0", "α=1, γ=0"),
        ("SFT", "SFT"),
    ]
    assert any("Only in first: α=0, γ=0.1" in note for note in compared.notes)
    assert any("Only in other: α=0.5, γ=0.5" in note for note in compared.notes)


def test_settings_that_a_method_does_not_read_and_where_something_runs_are_no_part_of_a_configuration() -> None:
    def key(**changes: Any) -> dict[str, Any]:
        return identity(config.flatten(config.build_run(config.nest(changes, source="t"), source="t")))

    assert key(method="sft", alpha=0.0) == key(method="sft", alpha=1.0, n_samples=8)
    assert key(alpha=0.0) != key(alpha=1.0)
    assert key(seed=3, name="x", device="cpu", eval_every_steps=7, micro_batch_size=1) == key()
    for change in ({"steps": 7}, {"model": "tiny-4m"}, {"precision": "bfloat16"}, {"depths": [0.5]}, {"dataset": "qa"}):
        assert key(**change) != key(model="tiny-1m", dataset="mini_functions")


def test_a_setting_that_an_older_version_did_not_have_has_the_default_of_then() -> None:
    now = config.flatten(config.RunConfig())
    before = {**now, "anchor_region": None, "kl_estimator": None, "max_grad_norm": None}
    assert identity(before)["anchor_region"] == "all"
    assert identity({**before, "kl_coefficient": 0.1})["kl_estimator"] == "k3"
    assert "kl_estimator" not in identity(before), "without a KL term it has no effect"
    assert identity(before)["max_grad_norm"] is None, "none is a value of this setting: no clipping"


def test_a_difference_is_found_with_its_side_and_the_average_sees_it_too(first: Path, tmp_path: Path) -> None:
    effects = {key: (ce + 0.05, cfm) for key, (ce, cfm) in SMALL.items()}
    compared = compare(read(first, write_study(tmp_path / "worse", effects=effects, with_scores=True, noise=0.0021)))
    assert {each.ruling for each in compared.differences if each.metric == "ce_loss"} == {"higher"}
    assert {each.ruling for each in compared.differences if each.metric == "cfm_loss"} == {"cannot tell"}
    found = only(compared, "average")
    assert found.is_average
    assert not found.is_better
    assert found.interval.mean == pytest.approx(0.05, abs=0.002)
    singles = [each for each in compared.differences if each.metric == "ce_loss" and not each.is_average]
    assert found.interval.mean == pytest.approx(sum(each.interval.mean for each in singles) / 3)


def test_the_other_way_round_all_differences_change_their_signs(first: Path, tmp_path: Path) -> None:
    other = write_study(tmp_path / "other", effects=SMALL, noise=0.003, seeds=(0, 1, 5), with_scores=True)
    there, back = compare(read(first, other)), compare(read(other, first))
    for one, two in zip(there.differences, back.differences, strict=True):
        assert (one.label, one.p_value) == (two.label, pytest.approx(two.p_value))
        assert one.interval.mean == pytest.approx(-two.interval.mean)
        assert one.interval.half_width == pytest.approx(two.interval.half_width)


def test_other_seeds_are_not_paired_and_one_seed_tells_nothing(first: Path, tmp_path: Path) -> None:
    others = write_study(tmp_path / "others", effects=SMALL, seeds=(7, 8), with_scores=True)
    alone = write_study(tmp_path / "alone", effects=SMALL, seeds=(9,), with_scores=True)
    compared = compare(read(first, others, alone))
    by_study = {each.study: each for each in compared.differences if each.label == "SFT" and each.metric == "ce_loss"}
    assert by_study["others"].shared == "3 and 2 seeds, not paired; 120 sequences"
    assert by_study["others"].by_seed == ()
    assert by_study["alone"].interval.n == 1
    assert by_study["alone"].ruling == "cannot tell"
    # Only what has an interval is tested: three configurations and their average, by two metrics, of one study.
    assert compared.n_tested == 8


def test_each_further_study_is_part_of_the_correction(first: Path, tmp_path: Path) -> None:
    second, third = (write_study(tmp_path / name, effects=SMALL, noise=0.003) for name in ("second", "third"))
    both, one = compare(read(first, second, third)), compare(read(first, second))
    assert both.n_tested == 2 * one.n_tested
    assert all(b.p_value >= o.p_value for b, o in zip(both.of("second"), one.of("second"), strict=True))
    for compared in (both, one):
        smallest = min(each.interval.p_value for each in compared.differences)
        assert min(each.p_value for each in compared.differences) == pytest.approx(
            min(1.0, compared.n_tested * smallest)
        )


def test_metrics_that_measure_something_else_are_left_out_with_the_reason(first: Path, tmp_path: Path) -> None:
    other = write_study(tmp_path / "other", effects=SMALL, settings=settings(cfm_samples=8), noise=0.003)
    compared = compare(read(first, other))
    assert {(each.label, each.metric) for each in compared.differences} >= {("α=1, γ=0", "ce_loss")}
    assert ("α=1, γ=0", "cfm_loss") not in {(each.label, each.metric) for each in compared.differences}
    assert any(
        "cfm_loss is not compared with other: they measure it by different cfm_samples" in n for n in compared.notes
    )


def provenance(folder: Path, **changes: Any) -> None:
    content = yaml.safe_load((folder / "study.yaml").read_text())
    for kind, entries in changes.items():
        content["provenance"][kind] = entries
    (folder / "study.yaml").write_text(yaml.safe_dump(content))


def test_another_model_under_the_same_name_has_another_feature_map(first: Path, tmp_path: Path) -> None:
    folders = [shutil.copytree(first, tmp_path / name) for name in ("one", "two")]
    for folder, fingerprint in zip(folders, ("a" * 16, "b" * 16), strict=True):
        provenance(Path(folder), models={"tiny-1m": {"fingerprint": fingerprint}})
    compared = compare(read(*map(Path, folders)))
    assert {each.metric for each in compared.differences} == {"ce_loss"}
    assert any("tiny-1m is another model in each" in note for note in compared.notes)


def test_other_data_under_the_same_name_are_refused(first: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(first, tmp_path / "other"))
    provenance(other, data={"qa": {"fingerprint": "00" * 32}})
    with pytest.raises(ResultsError, match="first and other: their data 'qa' differ"):
        compare(read(first, other))


def test_without_a_common_configuration_the_nearest_ones_and_their_settings_are_named(
    first: Path, tmp_path: Path
) -> None:
    effects = {(1.0, 0.0): (0.1, 0.1)}
    other = write_study(tmp_path / "other", effects=effects, settings=settings(learning_rate=3e-4), steps=60)
    with pytest.raises(ResultsError) as refused:
        compare(read(first, other))
    assert "differ in learning_rate (1e-4, 3e-4) and steps (40, 60)" in str(refused.value)
    assert "--across learning_rate --across steps" in str(refused.value)
    compared = compare(read(first, other), across=["learning_rate", "steps"])
    assert [pair.label for pair in compared.pairs] == ["α=1, γ=0"]
    with pytest.raises(ResultsError, match=r"first: varies learning_rate, steps, alpha and gamma itself"):
        compare(read(first, other), across=["learning_rate", "steps", "alpha", "gamma"])


def test_nothing_compares_across_other_texts(first: Path, tmp_path: Path) -> None:
    other = write_study(tmp_path / "other", effects=SMALL, settings=settings(sequence_length=64))
    other_texts = write_study(
        tmp_path / "texts", effects={(1.0, 0.0): (0.1, 0.1)}, settings=settings(sequence_length=64)
    )
    with pytest.raises(ResultsError, match="No metric compares across sequence_length"):
        compare(read(first, other_texts))
    with pytest.raises(ResultsError, match=r"no metric compares\. ce_loss is not compared"):
        compare(read(first, other_texts), across=["sequence_length"])
    assert [pair.label for pair in compare(read(first, other)).pairs] == ["SFT"]


def test_a_study_without_a_result_is_refused(first: Path, tmp_path: Path) -> None:
    running = write_study(tmp_path / "running", effects={None: (0.0, 0.0)}, seeds=(0,), statuses={(None, 0): "running"})
    with pytest.raises(ResultsError, match="running: has no finished trial"):
        compare(read(first, running))
    with pytest.raises(ResultsError, match="needs two studies"):
        compare(read(first))


def test_held_out_texts_of_another_number_are_not_paired(first: Path, tmp_path: Path) -> None:
    """Older studies without values of sequences: their numbers alone say whether the texts are the same."""
    more = write_study(tmp_path / "more", effects=SMALL, settings=settings(heldout_sequences=512))
    fewer = write_study(tmp_path / "fewer", effects=SMALL)
    compared = compare(read(fewer, more))
    assert only(compared, "α=1, γ=0").interval.n == 1
    assert only(compared, "SFT").ruling == "same trials"
