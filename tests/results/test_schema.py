"""The schema: typed columns for every setting, registered metrics, descriptions and versions in the files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from ebft_study import config
from ebft_study.results import METRICS, metric, schema
from ebft_study.study.folder import attempts


def test_every_setting_is_a_typed_column_of_trials() -> None:
    fields = {f.name: f.type for f in schema.arrow_schema("trials")}
    flat = config.flatten(config.RunConfig())
    assert set(flat) <= set(fields)
    assert fields["alpha"] == pa.float64()
    assert fields["n_samples"] == pa.int64()
    assert fields["packing"] == pa.bool_()
    assert fields["whitening"] == pa.string()
    assert fields["depths"] == fields["betas"] == pa.list_(pa.float64())
    assert fields["profile_lengths"] == pa.list_(pa.int64())
    assert fields["max_examples"] == pa.int64(), "an optional setting has the type of its value"
    assert fields["max_grad_norm"] == pa.float64()


def test_no_setting_collides_with_a_state_column() -> None:
    for table in schema.TABLES:
        names = [column.name for column in schema.columns(table)]
        assert len(names) == len(set(names))


def test_default_settings_fit_their_columns() -> None:
    for name, value in config.flatten(config.RunConfig()).items():
        plain = list(value) if isinstance(value, tuple) else value
        field = schema.arrow_schema("trials").field(name)
        assert pa.array([plain], type=field.type).to_pylist() == [plain]


@pytest.mark.parametrize("table", schema.TABLES)
def test_every_column_is_described_and_every_file_carries_its_version(table: str) -> None:
    arrow = schema.arrow_schema(table)
    assert arrow.metadata[b"schema_version"] == str(schema.SCHEMA_VERSION).encode()
    assert arrow.metadata[b"table"] == table.encode()
    assert all(field.metadata[b"description"] for field in arrow)


def test_metrics_have_the_agreed_names() -> None:
    evaluation = (
        "ce_loss ce_answer_loss perplexity cfm_loss judge_cfm_loss cfm_standard_error benchmark_score "
        "evaluation_seconds"
    )
    training = (
        "loss policy_loss train_ce_loss kl reward alignment diversity advantage_std zero_variance_fraction "
        "duplicate_rate policy_entropy train_cfm_loss fm_whitened grad_norm learning_rate "
        "unchanged_weight_fraction tokens_per_second "
        "step_seconds rollout_seconds feature_seconds scoring_seconds optimizer_seconds sync_seconds checkpoint_seconds"
    )
    engine = (
        "policy_lag parity_mean_difference parity_max_difference parity_off_fraction rechunk_mean_difference "
        "rechunk_off_fraction importance_ratio importance_ratio_min importance_ratio_max importance_weight "
        "importance_clipped_fraction effective_sample_fraction"
    )
    service = (
        "feature_hit_rate_memory feature_hit_rate_disk sample_hit_rate ground_truth_hit_rate feature_tokens_embedded "
        "feature_tokens_saved feature_queue_seconds feature_batch_requests feature_cache_bytes"
    )
    verifier = "verifier_reward unparsed_rate verifier_failure_rate answer_tokens truncated_rate verifier_seconds"
    progress = "peak_memory_bytes sequences_seen tokens_seen"
    cost = (
        "flops rollout_flops feature_flops scoring_flops evaluation_flops sampled_tokens update_seconds cpu_seconds "
        "energy_joules"
    )
    columns = (
        "study trial_id attempt step",
        evaluation,
        training,
        engine,
        service,
        verifier,
        progress,
        cost,
        "written_at",
    )
    assert [column.name for column in schema.columns("metrics")] == " ".join(columns).split()
    of_benchmarks = (
        "greedy_pass_rate pass_at_k greedy_bleu best_of_k_bleu corpus_bleu greedy_comet best_of_k_comet "
        "unparsed_answers unjudged_answers distinct_answers contaminated_fraction"
    )
    beside = {"entropy", *of_benchmarks.split()}
    assert METRICS.keys() - {column.name for column in schema.columns("metrics")} == beside
    assert metric("ce_loss").direction == "min"
    assert metric("reward").direction == "max"
    assert metric("learning_rate").direction is None
    assert metric("entropy").unit == "nats/token"


def test_attempts_are_numbered_as_the_column_says(tmp_path: Path) -> None:
    (column,) = [column for column in schema.columns("metrics") if column.name == "attempt"]
    assert "from 1" in column.description
    assert [attempts.begin(tmp_path, "t0001") for _ in range(2)] == [1, 2]


def test_reading_modules_import_nothing_heavy() -> None:
    modules = "ebft_study.config, ebft_study.errors, ebft_study.results, ebft_study.report"
    code = (
        f"import sys, {modules}; "
        "print([m for m in ('torch', 'ray', 'transformers', 'vllm', 'datasets', 'pandas', 'pyarrow', 'matplotlib') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_config_and_results_takes_less_than_half_a_second() -> None:
    # Of processor time, the best of several: other processes of the machine must not fail this test.
    code = "import time, ebft_study.config, ebft_study.results; print(time.process_time())"

    def seconds() -> float:
        return float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)

    assert min(seconds() for _ in range(5)) < 0.5
