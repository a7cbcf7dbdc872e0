"""Some of what `make architectures` finds out about all architectures, and the page that it writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.architectures import examine

PAGE = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text()
EQUAL = ["mistral", "gemma2", "gemma3_text", "gpt_neox", "mixtral", "qwen2_moe", "deepseek_v3"]
REFUSED = {
    "gpt_oss": "its attention depends on 's_aux'",
    "jamba": "layers have no attention that block attention can replace",
    "phimoe": "differ from its own forward pass",
    "falcon": "has attention of its own",
    "bart": "not a list of layers with a norm after them",
    "rwkv": "has no num_attention_heads",
}


@pytest.mark.parametrize("model_type", [*EQUAL, *REFUSED])
def test_an_architecture_is_equal_or_refused_as_the_page_says(model_type: str) -> None:
    for outcome in examine(model_type).values():
        assert outcome.kind == ("equal" if model_type in EQUAL else "refused"), outcome
        assert REFUSED.get(model_type, "") in outcome.detail
    assert section_of(model_type) == ("Equal" if model_type in EQUAL else "Refused")


def test_nothing_on_the_page_is_silently_different() -> None:
    assert set(re.findall(r"^## (.*):", PAGE, flags=re.MULTILINE)) == {"Equal", "Refused", "Not examined"}


def section_of(model_type: str) -> str:
    return re.findall(r"^## (.*):", PAGE[: PAGE.index(f"\n| {model_type} |")], flags=re.MULTILINE)[-1]
