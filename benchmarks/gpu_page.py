"""One page of text about the check of a GPU (`gpu.py`), from its JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

PHASES = ("rollouts", "features", "scoring", "optimizer")
STEPS = ("step", "checkpointed", "lora_3b", "lora_7b")


def page(result: Mapping[str, Any]) -> str:
    """The page; what was not measured has a line that says why."""
    about = " · ".join(f"{name} {value}" for name, value in result["machine"].items())
    return "\n".join(["Check of the GPU path", about, "", *_lines(result["parts"])]) + "\n"


def one_line(name: str, record: Mapping[str, Any]) -> str:
    """What became of a part."""
    facts, text = record["facts"], f"{name}: {record['state']}"
    if "part_seconds" in record:
        text += f" in {record['part_seconds']:.0f} s"
    if "outcomes" in facts:
        text += f", {facts['wrong']} wrong"
    if name in STEPS and "seconds" in facts:
        text += f", {facts['seconds']['step']:.3g} s a step"
    return f"{text}: {record['why']}" if record["why"] else text


def _lines(parts: Mapping[str, Any]) -> Iterator[str]:
    for name, record in parts.items():
        yield one_line(name, record)
        facts = record["facts"]
        if name in STEPS:
            yield from _step(facts)
        elif name == "tests" and facts:
            yield f"  {facts['outcomes']}"
            yield from (f"  FAILED {test}" for test in facts["failures"])
        elif name == "architectures" and facts:
            for model, by_dtype in facts["outcomes"].items():
                yield f"  {model}: " + "; ".join(f"{dtype} {outcome}" for dtype, outcome in by_dtype.items())
        elif name == "published" and facts:
            yield from _published(facts, parts.get("step", {"facts": {}})["facts"])
        elif name.startswith("kernels") and facts:
            yield from _kernels(facts)
        yield ""


def _step(facts: Mapping[str, Any]) -> Iterator[str]:
    if "flops" not in facts:
        return
    settings, ceiling = facts["settings"], facts["ceiling_flops_per_second"]
    yield (
        f"  model {settings['model']}, T {settings['sequence_lengths'][0]}, n {settings['n_samples']}, "
        f"G {settings['completion_length']}, batch {settings['batch_size']}, {settings['precision']}, "
        f"lora_rank {settings['lora_rank']}; {facts['flops']['total'] / 1e12:.3g} TFLOP, "
        f"products at most {ceiling / 1e12:.3g} TFLOP/s"
    )
    if "plan" in facts:
        plan = facts["plan"]
        yield (
            f"  {facts['parts']} parts: micro_batch_size {plan['micro_batch_size']}, "
            f"anchors_at_once {plan['anchors_at_once']}"
        )
    predicted, measured = facts["predicted_bytes"], facts.get("measured_bytes", {})
    taken, used = facts.get("seconds", {}), facts.get("utilisation", {})
    yield f"  {'':10}{'seconds':>9}{'utilisation':>13}{'GiB':>8}{'predicted':>11}{'ratio':>7}"
    for phase in (*PHASES, "all"):
        time, memory = ("step", "peak") if phase == "all" else (phase, phase)
        gib, planned = (numbers[memory] / 2**30 if memory in numbers else None for numbers in (measured, predicted))
        ratio = gib / planned if gib and planned else None
        cells = ((taken.get(time), 9), (used.get(time), 13), (gib, 8), (planned, 11), (ratio, 7))
        yield f"  {phase:10}" + "".join(_cell(value, width) for value, width in cells)
    if taken:
        hours = taken["step"] * 100_000 / settings["batch_size"] / 3600
        yield f"  {hours:.3g} h an epoch of 100k sequences; first step {facts['first_step_seconds']:.3g} s"


def _published(facts: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[str]:
    for attention, seconds in facts["seconds_per_sequence"].items():
        text = f"  {attention}: {seconds:.3g} s a sequence"
        if "seconds" in ours:
            batch = ours["settings"]["batch_size"]
            speedup = seconds * batch / (ours["seconds"]["step"] - ours["seconds"]["optimizer"])
            text += f", {seconds * batch:.3g} s a batch; our gradient is {speedup:.3g} times as fast"
        yield text


def _kernels(facts: Mapping[str, Any]) -> Iterator[str]:
    of_step = f"a step has {facts['parts_of_a_step']} parts of this size"
    yield f"  {facts['sequences']} sequences as one part: {facts['seconds']:.3g} s; {of_step}"
    if "phases" not in facts:
        return
    predicted = f"{facts['predicted_kernels']:,.0f} predicted without the optimizer's"
    yield f"  {facts['kernels']:,} kernels ({predicted}), which take {facts['device_seconds']:.3g} s; by phase:"
    for phase, counts in facts["phases"].items():
        others = ", ".join(f"{counts[k]:,} {k}" for k in ("launches", "copies", "synchronisations") if k in counts)
        busy = counts.get("device_nanoseconds", 0) / 1e9
        yield f"  {phase:10} {counts.get('kernels', 0):>9,} kernels {busy:9.3g} s  {others}"
    for kernel in facts["longest"]:
        yield f"  {kernel['seconds']:9.3g} s {kernel['calls']:>8,} x {kernel['name'][:90]}"


def _cell(value: float | None, width: int) -> str:
    return f"{'' if value is None else f'{value:.3g}':>{width}}"
