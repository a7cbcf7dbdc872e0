"""Credentials in texts that leave this machine: error messages of libraries may hold them."""

from __future__ import annotations

import re

from ebft_study.storage.filesystems import SECRET_NAMES

REMOVED = "[removed]"
_PATTERNS = (
    re.compile(r"(?P<kept>\b[\w+.-]+://)[^\s/@\"']+:[^\s/@\"']*(?=@)"),  # user:password@ of a URL
    re.compile(rf"(?P<kept>[?&;][\w.-]*(?:{SECRET_NAMES})[\w.-]*=)[^&\s\"'#;]+", re.IGNORECASE),
    re.compile(r"(?P<kept>\b[A-Z0-9_]*(?:KEY|SECRET|TOKEN|PASSWORD)[A-Z0-9_]*[\"']?\s*[=:]\s*[\"']?)[^\s\"',;]+"),
    re.compile(r"(?P<kept>\b(?:bearer|basic)\s+)[\w.~+/=-]{8,}", re.IGNORECASE),
    re.compile(
        r"(?P<kept>)(?:\bhf_\w{20,}|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_\w{20,}|\bsk-[\w-]{20,}|\bxox[a-z]-[\w-]{10,})"
    ),
)


def redacted(words: str) -> str:
    """The text with what looks like a credential replaced: in URLs, assignments of the environment, and headers."""
    for pattern in _PATTERNS:
        words = pattern.sub(rf"\g<kept>{REMOVED}", words)
    return words
