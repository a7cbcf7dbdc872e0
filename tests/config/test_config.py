"""Configurations: names, types, ranges and rules between settings; a broken one is reported in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ebft_study.config import RunConfig, build_run, flatten, load_run, merge, nest, parse_override, resolve_key
from ebft_study.errors import ConfigError


def build(**settings: Any) -> RunConfig:
    return build_run(nest(settings, source="run.yaml"), source="run.yaml")


BROKEN = [
    ({"alfa": 1}, "unknown key 'alfa'. Did you mean 'alpha'"),
    ({"reward": {"alpah": 1}}, "unknown key 'reward.alpah'. Did you mean 'alpha'"),
    ({"rollouts": {"n_samples": 2}}, "unknown key 'rollouts'"),
    ({"reward": 3}, "reward=3: is a section"),
    ({"n_samples": "many"}, "rollout.n_samples='many'"),
    ({"alpha": 1.5}, "reward.alpha=1.5"),
    ({"gamma": -0.1}, "loss.gamma=-0.1"),
    ({"temperature": 0}, "rollout.temperature=0"),
    ({"learning_rate": ".inf"}, "optimizer.learning_rate"),
    ({"whitening": "variant_iv"}, "reward.whitening='variant_iv'"),
    ({"depths": [0.0, 0.5]}, "every depth must lie in (0, 1]"),
    ({"depths": [0.5, 1.2]}, "every depth must lie in (0, 1], but got 1.2"),
    ({"depths": [0.5, 0.5]}, "depths must differ"),
    ({"depths": []}, "features.depths"),
    ({"n_samples": 1}, "rollout.n_samples=1: the diversity term (alpha=1.0) compares samples"),
    ({"n_samples": 1, "alpha": 0.1}, "rollout.n_samples=1: the diversity term (alpha=0.1) compares samples"),
    ({"n_samples": 1, "alpha": 0}, "reward.baseline='rloo': with n_samples=1 there are no other samples"),
    ({"completion_length": 200}, "rollout.completion_length=200: a sequence of 128 tokens"),
    ({"completion_length": 121}, "rollout.completion_length=121: a sequence of 128 tokens"),
    (
        {"first_context_length": 128},
        "must hold the first context (128) and one completion. Use a longer sequence_length",
    ),
    ({"keep_every_steps": 75}, "checkpoint.keep_every_steps=75: there is a checkpoint every 50 steps only"),
    ({"profile_lengths": [8, 125]}, "evaluation.profile_lengths=[8, 125]"),
    ({"judge_pooling": "mean"}, "evaluation.judge_pooling='mean': no judge is named"),
    ({"judge_completion_length": 4}, "evaluation.judge_completion_length=4: no judge is named"),
    (
        {"verifier": "unit_test"},
        "verifier.verifier='unit_test': there is no such verifier. Use unit_tests, or package.",
    ),
    (
        {"verifier.verifier": "??"},
        "Use unit_tests, bleu, exact_match, comet, or package.module:name for one of your own",
    ),
    ({"stop_strings": "END"}, "verifier.stop_strings=['END']: no verifier is named, so nothing reads it"),
    ({"parse_rule": "text"}, "verifier.parse_rule='text': no verifier is named, so nothing reads it"),
    ({"stop_strings": [""], "verifier": "bleu"}, "verifier.stop_strings.0=''"),
    ({"partial_reward": True}, "verifier.partial_reward=True: only the verifier unit_tests reads it"),
    ({"verifier": "bleu", "verifier_workers": 3}, "verifier.verifier_workers=3: only the verifier unit_tests reads it"),
    ({"verifier": "my.module:f", "test_cpu_seconds": 1}, "verifier.test_cpu_seconds=1.0: only the verifier unit_tests"),
    ({"verifier": "exact_match", "test_memory_mib": 1}, "verifier.test_memory_mib=1: only the verifier unit_tests"),
    ({"verifier": "comet", "bleu_tokenizer": "zh"}, "verifier.bleu_tokenizer='zh': only the verifier bleu reads it"),
    ({"verifier": "bleu", "comet_python": "/p"}, "verifier.comet_python='/p': only the verifier comet reads it"),
    ({"verifier": "bleu", "comet_model": "m"}, "verifier.comet_model='m': only the verifier comet reads it"),
    ({"benchmarks": "mini", "partial_reward": True}, "verifier.partial_reward=True: only the verifier unit_tests"),
    ({"method": "rlvr"}, "verifier.verifier=None: method=rlvr with verifier_weight=0.0 learns from"),
    (
        {"method": "rlvr", "verifier": "bleu", "max_answer_tokens": 128},
        "rollout.max_answer_tokens=128: a sequence of 128 tokens must hold a prompt and an answer of 128",
    ),
    ({"method": "rlvr", "verifier": "bleu", "packing": True}, "data.packing=True: answers are sampled to one prompt"),
    ({"method": "rlvr", "verifier": "bleu", "dataset": "stdlib"}, "method='rlvr': data set 'stdlib' is raw text"),
    ({"method": "rlvr", "verifier": "bleu", "baseline": "naive"}, "reward.baseline='naive': the rewards of a verifier"),
    ({"method": "rlvr", "verifier": "bleu", "n_samples": 1}, "reward.baseline='rloo': with n_samples=1"),
    ({"verifier_weight": 1, "verifier": "bleu", "pooling": "concat"}, "features.pooling='concat': whole answers"),
    ({"verifier_weight": 1, "verifier": "bleu", "features.backend": "service"}, "features.backend='service': the serv"),
    ({"aggregation": "constant"}, "loss.aggregation='constant': all completions have completion_length=8 tokens"),
    ({"comet_timeout_seconds": 1}, "verifier.comet_timeout_seconds=1.0: only the verifier comet reads it"),
    ({"verifier": "comet"}, "verifier.comet_python=None: COMET needs transformers < 5 and numpy < 2, so"),
    ({"verifier": "comet", "comet_python": "env/bin/python"}, "pip install unbabel-comet==2.2.7"),
    ({"anchor_region": "answer", "dataset": "stdlib"}, "rollout.anchor_region='answer'"),
    ({"ce_region": "answer", "text_column": "t"}, "loss.ce_region='answer'"),
    ({"prompt_column": "q"}, "prompt_column and answer_column must be given together"),
    ({"text_column": "t", "prompt_column": "q", "answer_column": "a"}, "not both"),
    ({"ema_decay": 1.0}, "optimizer.ema_decay=1.0"),
    ({"cfm_samples": 1}, "evaluation.cfm_samples=1"),
    ({"name": "../escape"}, "name='../escape'"),
    ({"weight_dtype": "bfloat16"}, "training.weight_dtype='bfloat16': precision=float32 computes more exactly"),
    ({"sharding": "ddp"}, "training.sharding='ddp'"),
    ({"lora_rank": -1}, "lora.lora_rank=-1"),
    ({"lora_targets": []}, "lora.lora_targets"),
    ({"lora_targets": ["all-linear", "q_proj"]}, "all-linear alone"),
]


@pytest.mark.parametrize(("settings", "expected"), BROKEN, ids=[expected[:40] for _, expected in BROKEN])
def test_a_broken_rule_is_one_line_naming_file_and_key(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(**settings)
    message = str(caught.value)
    assert message.startswith("run.yaml: ")
    assert expected in message
    assert "\n" not in message


def test_a_single_sample_is_allowed_without_diversity_and_baseline() -> None:
    assert build(n_samples=1, alpha=0, baseline="none").rollout.n_samples == 1
    assert build(n_samples=1, method="sft").rollout.n_samples == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"verifier": "unit_tests", "partial_reward": True, "verifier_workers": 1, "test_cpu_seconds": 1},
        {"verifier": "unit_tests", "test_memory_mib": 64, "parse_rule": "statement", "stop_strings": ["\n\n", "x"]},
        {"verifier": "bleu", "bleu_tokenizer": "zh", "stop_strings": "\n"},
        {"verifier": "comet", "comet_python": "/env/bin/python", "comet_model": "m", "comet_timeout_seconds": 1},
        {"verifier": "comet", "comet_python": "~/env/bin/python"},
        {"verifier": "package.module:name", "parse_rule": "text"},
        {"verifier": "exact_match", "method": "sft"},
    ],
)
def test_a_verifier_has_its_own_settings(settings: dict[str, Any]) -> None:
    assert build(**settings).verifier.verifier == settings["verifier"]
    assert isinstance(build(**settings).verifier.stop_strings, tuple)


def test_benchmarks_read_the_resources_of_verifiers() -> None:
    settings = {"verifier_workers": 3, "test_cpu_seconds": 9.0, "comet_python": "/env/bin/python", "comet_model": "m"}
    verifier = build(benchmarks="mini", **settings).verifier
    assert {name: getattr(verifier, name) for name in settings} == settings


def test_a_completion_may_fill_the_sequence() -> None:
    assert build(completion_length=120, profile_lengths=[120]).rollout.completion_length == 120


def test_one_target_of_adapters_needs_no_list() -> None:
    assert build(lora_targets="q_proj").lora.lora_targets == ("q_proj",)
    assert build(lora_targets=["q_proj", "v_proj"]).lora.lora_targets == ("q_proj", "v_proj")


def test_short_names_paths_and_sections_mean_the_same() -> None:
    assert build(alpha=0.5) == build(**{"reward.alpha": 0.5}) == build(reward={"alpha": 0.5})
    assert resolve_key("alpha") == "reward.alpha"
    assert flatten(build(alpha=0.5))["alpha"] == 0.5


@pytest.mark.parametrize(
    ("item", "key", "value"),
    [
        ("alpha=0.5", "alpha", 0.5),
        ("learning_rate=1e-4", "learning_rate", 1e-4),
        ("depths=[0.25, 1e-0]", "depths", [0.25, 1.0]),
        ("dataset=a=b", "dataset", "a=b"),
        ("ema_decay=null", "ema_decay", None),
    ],
)
def test_overrides_are_read_as_yaml_and_exponents_as_numbers(item: str, key: str, value: object) -> None:
    assert parse_override(item) == (key, value)


@pytest.mark.parametrize("item", ["alpha", "=3", "alpha={"])
def test_a_malformed_override_says_how_to_write_one(item: str) -> None:
    with pytest.raises(ConfigError, match="command line"):
        parse_override(item)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"- 1\n- 2\n", "not a mapping"),
        (b"a: [1", "not valid YAML"),
        (b"\xff\xfe\x00", "cannot be read as text"),
        (b"", "NoneType"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=expected):
        load_run(file)


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_run(Path("nowhere.yaml"))


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("alpha: 0.5\nloss: {gamma: 0.1}\n")
    run = load_run(file, ["gamma=0.03"])
    assert (run.reward.alpha, run.loss.gamma) == (0.5, 0.03)


def test_a_resolved_configuration_reads_back_as_itself() -> None:
    run = build(alpha=0.5, depths=[0.5, 1.0], warm_start_steps=3)
    assert build_run(yaml.safe_load(yaml.safe_dump(run.model_dump(mode="json"))), source="copy") == run


def test_merging_leaves_its_arguments_alone() -> None:
    base = {"reward": {"alpha": 1.0}}
    assert merge(base, {"reward": {"whitening": "none"}}) == {"reward": {"alpha": 1.0, "whitening": "none"}}
    assert base == {"reward": {"alpha": 1.0}}
