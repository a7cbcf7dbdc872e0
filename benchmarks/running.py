"""One section after another."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool

import torch
import transformers

from benchmarks.rows import Row
from benchmarks.sections import RUN
from benchmarks.settings import SECTIONS, Settings
from benchmarks.shapes import device_type
from ebft_study.errors import ConfigError, EbftError


def run(
    settings: Settings, sections: Sequence[str], report: Callable[[str, list[Row]], None] | None = None
) -> list[Row]:
    """See `benchmarks.run`."""
    check(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    rows: list[Row] = []
    for name, own in _all_rows(settings, [name for name in SECTIONS if name in sections]):
        rows += own
        if report:
            report(name, own)
    return rows


def check(settings: Settings) -> None:
    """Refuse settings that cannot be measured.

    Raises:
        ConfigError: naming the setting.
    """
    for length in settings.sequence_lengths:
        settings.at(length).run()
    if device_type(settings) == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"bench: device={settings.device!r}: this machine has no usable GPU. Use --device cpu")


def _all_rows(settings: Settings, sections: Sequence[str]) -> Iterator[tuple[str, list[Row]]]:
    yield "setting", setting_rows(settings)
    for name in sections:
        yield name, _section(name, settings)
        # The next section, and its processes, find the machine as the first one did.
        gc.collect()
        if device_type(settings) == "cuda":
            torch.cuda.empty_cache()


def _section(name: str, settings: Settings) -> list[Row]:
    try:
        return RUN[name](settings)
    except (EbftError, BrokenProcessPool, MemoryError, torch.OutOfMemoryError) as error:
        return [Row(f"{name}/failed", " ".join(str(error).split())[:300], failed=True)]


def setting_rows(settings: Settings) -> list[Row]:
    """What was measured, and on what."""
    cuda = device_type(settings) == "cuda"
    facts: dict[str, float | str] = {
        "device": torch.cuda.get_device_name(settings.device) if cuda else settings.device,
        "threads": torch.get_num_threads(),
        "precision": settings.precision,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "model": settings.model,
        "sequence_lengths": " ".join(map(str, settings.sequence_lengths)),
        "n_samples": settings.n_samples,
        "completion_length": settings.completion_length,
        "stride": settings.stride,
        "batch_size": settings.batch_size,
        "naive_attention": settings.naive_attention,
        "repeats": settings.repeats,
    }
    return [Row(f"setting/{name}", value) for name, value in facts.items()]
