"""Opening `pyarrow.fs` file systems by URL: which keys a URL may have, how long a store may take, what its errors mean.

Credentials come from the environment or the provider's own chain. A URL lands in study.yaml, logs and process lists,
so one that holds any is refused.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import textwrap
import urllib.parse
from typing import Any

from ebft_study.errors import ConfigError

WITHOUT_FOLDERS = ("s3", "gcs", "abfs")
CONNECT_SECONDS, REQUEST_SECONDS, ATTEMPTS = 3.0, 20.0, 3
_S3_KEYS = ("endpoint_override", "region", "scheme")
_SECRET = re.compile(r"key|secret|token|passw|sas|credential|sig", re.IGNORECASE)
_FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_SIGNS = tuple(os.strerror(number) for number in _FULL)
"""How errors of others' code tell of a disk that takes no more."""
_MEANINGS = (
    ("NO_SUCH_BUCKET", "the bucket does not exist", "Create it, or mend its name"),
    ("NoSuchBucket", "the bucket does not exist", "Create it, or mend its name"),
    ("bucket does not exist", "the bucket does not exist", "Create it, or mend its name"),
    ("ACCESS_DENIED", "no permission", "Check the credentials in the environment, and what they may do"),
    ("HTTP status 403", "no permission", "Check the credentials in the environment, and what they may do"),
    ("INVALID_ACCESS_KEY", "the store does not know the access key", "Check the credentials in the environment"),
    ("SIGNATURE_DOES_NOT_MATCH", "the store refuses the secret key", "Check the credentials in the environment"),
    ("NETWORK_CONNECTION", "the store does not answer", "Check endpoint_override, scheme and the network"),
    ("REQUEST_TIMEOUT", "the store does not answer in time", "Check endpoint_override, scheme and the network"),
)


def checked(url: str) -> tuple[str, str]:
    """A URL without trailing slashes, and its query; refuses one with credentials, never repeating them."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    shown = f"{parts.scheme}://{host}{parts.path}".rstrip("/")
    user = parts.netloc.rpartition("@")[0]
    keys = [key for key, _ in urllib.parse.parse_qsl(parts.query, keep_blank_values=True)]
    # In abfs://container@account the part before '@' is no user.
    if ":" in user or (user and parts.scheme == "s3") or any(_SECRET.search(key) for key in keys):
        raise ConfigError(
            f"{shown}: the URL holds credentials, which would end up in files and logs. "
            "Set them in the environment (AWS_ACCESS_KEY_ID, ...) or in the provider's own configuration"
        )
    if parts.scheme == "s3":
        for key in keys:
            if key not in _S3_KEYS:
                raise ConfigError(f"{shown}: unknown key {key!r} in the URL. Known keys: {', '.join(_S3_KEYS)}")
    return f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/"), parts.query


@functools.lru_cache(maxsize=256)
def open_store(url: str, query: str) -> tuple[Any, str]:
    """The file system of a checked URL, and the path in it."""
    scheme, _, rest = url.partition("://")
    options = dict(urllib.parse.parse_qsl(query))
    if scheme == "s3":
        return _s3(rest.partition("/")[0], tuple(sorted(options.items()))), rest
    return _other(url, query, scheme)


@functools.cache
def _s3(bucket: str, options: tuple[tuple[str, str], ...]) -> Any:
    """Small times to wait: a wrong endpoint is an error within seconds."""
    from pyarrow import fs

    given = dict(options)
    region = given.pop("region", None) or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and "endpoint_override" not in given:
        try:
            region = fs.resolve_s3_region(bucket)
        except OSError as error:
            reason, remedy = reason_of(error)
            raise ConfigError(f"s3://{bucket}: cannot be reached ({reason}). {remedy}") from None
    return fs.S3FileSystem(
        region=region,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=REQUEST_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        background_writes=False,
        allow_delayed_open=True,  # a small file is one request
        **given,
    )


def _other(url: str, query: str, scheme: str) -> tuple[Any, str]:
    """What pyarrow knows by itself, else what fsspec knows."""
    import pyarrow as pa
    from pyarrow import fs

    if scheme in ("gs", "gcs") and "retry_limit_seconds" not in query:
        query = f"{query}&retry_limit_seconds={REQUEST_SECONDS:g}".lstrip("&")
    try:
        store, path = fs.FileSystem.from_uri(url + (f"?{query}" if query else ""))
        return store, path.rstrip("/")
    except pa.ArrowInvalid as error:
        known = _through_fsspec(url, scheme)
        if known is None:
            raise ConfigError(
                f"{url}: no known kind of storage ({_one_line(error)}). Give a folder, or a URL that begins with "
                "s3://, gs://, abfs://, hdfs:// or file://"
            ) from None
        return known
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{url}: cannot be opened ({_one_line(error)}). Check the URL") from None


def _through_fsspec(url: str, scheme: str) -> tuple[Any, str] | None:
    import fsspec
    from pyarrow import fs

    if scheme not in fsspec.available_protocols():
        return None
    try:
        store, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{url}: cannot be opened ({_one_line(error)}). Install what it names") from None
    return fs.PyFileSystem(fs.FSSpecHandler(store)), path.rstrip("/")


def reason_of(error: BaseException) -> tuple[str, str]:
    """What an error of a disk or a store means, and what to do about it."""
    text = str(error)
    if isinstance(error, OSError) and error.errno in _FULL:
        return os.strerror(error.errno or 0), "Free some space, then resume the study"
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return os.strerror(error.errno or 0), "Use a folder that you may write to"
    for sign, reason, remedy in _MEANINGS:
        if sign in text:
            return reason, remedy
    for sign in FULL_SIGNS:
        if sign in text:
            return sign, "Free some space, then resume the study"
    return textwrap.shorten(_one_line(error), 300, placeholder="…"), "Check the storage, then try again"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
