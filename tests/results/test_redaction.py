"""Credentials are removed from texts, and nothing else is."""

from __future__ import annotations

import json

import pytest

from ebft_study.results.redaction import REMOVED, redacted

HELD = "s3cr3tValue"


@pytest.mark.parametrize(
    "words",
    [
        f"cannot open https://anna:{HELD}@host/x",
        f"GET s3://bucket/x?region=eu&secret_key={HELD}&y=1 failed",
        f"https://host/file?X-Amz-Signature={HELD}",
        f"AZURE: https://a.blob/x?sv=1&sig={HELD}",
        f"WANDB_API_KEY={HELD} is wrong",
        f"AWS_SECRET_ACCESS_KEY: '{HELD}'",
        json.dumps({"environment": {"HF_TOKEN": HELD}}),
        f"header Authorization: Bearer {HELD}",
        f"Basic {HELD}==",
        f"invalid token hf_{HELD * 3}",
        "key AKIAABCDEFGHIJKLMNOP",
        f"ghp_{HELD * 4}",
        f"sk-{HELD * 3}",
    ],
)
def test_credentials_are_removed(words: str) -> None:
    clean = redacted(words)
    assert REMOVED in clean
    assert HELD not in clean
    assert "AKIAABCDEFGHIJKLMNOP" not in clean


@pytest.mark.parametrize(
    "words",
    [
        "mini-1m; micro_batch_size=16, anchors_at_once=11: about 0.35 of 4.00 GiB",
        "benchmark_max_tokens=64, max_answer_tokens=56, tokens: 103909",
        "s3://bucket/studies?region=eu-central-1&endpoint_override=http://host:9000",
        "abfs://container@account/path",
        "fingerprint: 9e79b27717a3f026002a585bf994f4f02e56f7e3040d5edbaccd6f50c274bb1f",
        "git@github.com:owner/name.git http://host:8265/x@y",
        "RuntimeError: worker died; basic tests passed",
        '{"kinds": [{"label": "task=qa arm=sft", "seconds": 104.16}]}',
    ],
)
def test_other_texts_stay(words: str) -> None:
    assert redacted(words) == words
