"""Opening `pyarrow.fs` file systems by URL, and the meaning of their errors.

Credentials come from the environment or the provider's own chain. A URL is written to study.yaml, logs and process
lists, so one that holds any is refused.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import urllib.parse
from collections.abc import Iterator
from typing import Any

from ebft_study.errors import ConfigError, StorageError, one_line

FULL_SIGNS = ("No space left on device", "Disk quota exceeded")
"""Signs of a full disk in the error messages of libraries."""
_CONNECT_SECONDS, _REQUEST_SECONDS, _ATTEMPTS = 3.0, 20.0, 3
_S3_KEYS = ("endpoint_override", "region", "scheme")
_CONTAINERS = ("abfs", "abfss", "hdfs", "wasb", "wasbs")
"""Schemes whose URLs have a container or a user's name, and no secret, before `@`."""
SECRET_NAMES = "key|secret|token|passw|sas|credential|sig"
"""Parts of the names of keys whose values are credentials, as a pattern in any case."""
_SECRET = re.compile(SECRET_NAMES, re.IGNORECASE)
_CREDENTIALS = "Check the credentials in the environment"
_ADDRESS = "Check endpoint_override, scheme and the network"
_MEANINGS = (
    (
        "NO_SUCH_BUCKET|NoSuchBucket|bucket does not exist",
        "the bucket does not exist",
        "Create it, or correct its name",
    ),
    ("ACCESS_DENIED|HTTP status 403", "no permission", f"{_CREDENTIALS}, and their permissions"),
    ("INVALID_ACCESS_KEY", "the store does not know the access key", _CREDENTIALS),
    ("SIGNATURE_DOES_NOT_MATCH", "the store refuses the secret key", _CREDENTIALS),
    ("NETWORK_CONNECTION", "the store does not answer", _ADDRESS),
    ("REQUEST_TIMEOUT", "the store does not answer in time", _ADDRESS),
    ("|".join(FULL_SIGNS), "", "Free some space, then resume the study"),
    ("Read-only file system|Permission denied|Operation not permitted", "", "Use a folder that you may write to"),
)
"""A pattern in an error's text, its meaning (the text itself where empty), and the remedy."""


def split_url(text: str) -> tuple[str, str]:
    """A URL without trailing slashes, and its query; refuses one with credentials, never repeating them."""
    parts = urllib.parse.urlsplit(text)
    user, _, host = parts.netloc.rpartition("@")
    pairs = urllib.parse.parse_qsl(parts.query, keep_blank_values=True)
    keys = [key for key, _ in pairs]
    shown = f"{parts.scheme}://{host}{parts.path}".rstrip("/")
    # In abfs://container@account the part before '@' is no user; elsewhere it may be a token, in values of keys, too.
    has_user = bool(user) and (":" in user or parts.scheme not in _CONTAINERS)
    if has_user or any(_SECRET.search(key) or "@" in value for key, value in pairs):
        raise ConfigError(
            f"{shown}: the URL holds credentials, which would end up in files and logs. "
            "Set them in the environment (AWS_ACCESS_KEY_ID, ...) or in the provider's own configuration"
        )
    unknown = [key for key in keys if key not in _S3_KEYS]
    if unknown and parts.scheme == "s3":
        raise ConfigError(f"{shown}: unknown key {unknown[0]!r} in the URL. Known keys: {', '.join(_S3_KEYS)}")
    return f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/"), parts.query


def open_store(url: str, query: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it: S3 with short timeouts, else what pyarrow or fsspec opens."""
    import pyarrow as pa
    from pyarrow import fs

    scheme, _, rest = url.partition("://")
    if scheme == "s3":
        return _s3(rest.partition("/")[0], query), rest
    if scheme in ("gs", "gcs") and "retry_limit_seconds" not in query:
        query = f"{query}&retry_limit_seconds={_REQUEST_SECONDS:g}".lstrip("&")
    try:
        store, path = fs.FileSystem.from_uri(url + (f"?{query}" if query else ""))
    except pa.ArrowInvalid as error:
        store, path = _through_fsspec(url, error)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{url}: cannot be opened ({one_line(error)}). Check the URL") from None
    return store, path.rstrip("/")


@functools.cache
def _s3(bucket: str, query: str) -> Any:
    """The file system of a bucket. Its timeouts are short: a wrong endpoint is an error within seconds."""
    from pyarrow import fs

    options = dict(urllib.parse.parse_qsl(query))
    region = options.pop("region", None) or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and "endpoint_override" not in options:
        try:
            region = fs.resolve_s3_region(bucket)
        except OSError as error:
            reason, remedy = reason_of(error)
            raise ConfigError(f"s3://{bucket}: cannot be reached ({reason}). {remedy}") from None
    return fs.S3FileSystem(
        region=region,
        connect_timeout=_CONNECT_SECONDS,
        request_timeout=_REQUEST_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        background_writes=False,
        allow_delayed_open=True,  # a small file is one request
        **options,
    )


def _through_fsspec(url: str, unknown: Exception) -> tuple[Any, str]:
    import fsspec
    from pyarrow import fs

    if url.partition("://")[0] not in fsspec.available_protocols():
        raise ConfigError(
            f"{url}: no known kind of storage ({one_line(unknown)}). Give a folder, or a URL that begins with "
            "s3://, gs://, abfs://, hdfs:// or file://"
        ) from None
    try:
        store, path = fs.FileSystem.from_uri(f"fsspec+{url}")
    except (ImportError, TypeError, ValueError) as error:
        raise ConfigError(f"{url}: cannot be opened ({one_line(error)}). Install the package that it names") from None
    return store, path


def reason_of(error: BaseException) -> tuple[str, str]:
    """The meaning of an error of a disk or a store, and the remedy."""
    for pattern, reason, remedy in _MEANINGS:
        if match := re.search(pattern, str(error)):
            return reason or match[0], remedy
    return one_line(error), "Check the storage, then try again"


@contextlib.contextmanager
def storage_errors(path: object, done: str = "written") -> Iterator[None]:
    """Turn an `OSError` of the block into a `StorageError` of one line; a `FileNotFoundError` of a read is left."""
    try:
        yield
    except FileNotFoundError:
        if done == "read":
            raise
        raise StorageError(f"{path}: cannot be {done} (the folder, or the bucket, does not exist). Create it") from None
    except OSError as error:
        reason, remedy = reason_of(error)
        raise StorageError(f"{path}: cannot be {done} ({reason}). {remedy}") from None
