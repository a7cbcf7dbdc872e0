"""The benchmark compares two ways of doing the same thing: they must agree. No test here looks at a time."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks
from benchmarks import SECTIONS, Settings, agreement, figure, measure, naive, output, running, sections, shapes
from benchmarks.__main__ import main, parser, settings_of
from benchmarks.rows import Row, judged, measured
from benchmarks.settings import MODELS, ladder
from benchmarks.shapes import Inputs
from benchmarks.sides import Naive, Networks, Ours
from ebft_study import cli
from ebft_study.algorithm.anchors import Anchors, find_anchors
from ebft_study.algorithm.rewards import feature_matching_rewards
from ebft_study.algorithm.whitening import whitened_products
from ebft_study.cost import ModelShape
from ebft_study.errors import ConfigError
from ebft_study.features import local
from tests.small_models import ARCHITECTURES, small_batch, small_model

TINY = Settings(
    model="tiny-1m",
    sequence_lengths=(32, 48),
    n_samples=2,
    completion_length=4,
    stride=4,
    repeats=1,
    anchors_at_once=3,
    contexts=5,
    feature_size=12,
)

# --- both sides ------------------------------------------------------------------------------------------------

LAYOUTS = {
    "one document": [[0] * 16],
    "packed": [[0] * 9 + [1] * 15, [0] * 24],
    "ragged": [[0] * 24, [0] * 13 + [-1] * 11, [0] * 9 + [1] * 9 + [-1] * 6],
    "no anchor in one sequence": [[0] * 16, [0] * 5 + [-1] * 11],
    "one anchor": [[0] * 9],
}


def sides(layouts: list[list[int]], architecture: str = "qwen2-tied", **changes: Any) -> tuple[Ours, Naive]:
    """Both sides on a small model and random tokens of the given documents."""
    settings = replace(TINY, sequence_lengths=(len(layouts[0]),), batch_size=len(layouts), **changes)
    batch = small_batch(layouts)
    anchors = find_anchors(
        batch.document_ids,
        completion_length=settings.completion_length,
        stride=settings.stride,
        first_context_length=settings.stride,
    )
    shape = (*anchors.positions.shape, settings.n_samples, settings.completion_length)
    inputs = Inputs(batch, anchors, torch.rand(shape, generator=torch.Generator().manual_seed(2)))
    networks = Networks(small_model(architecture))
    return Ours(settings, networks, inputs), Naive(settings, networks, inputs)


def compared(ours: Ours, other: Naive) -> dict[str, Row]:
    return {row.name.removeprefix("agreement/"): row for row in agreement.compare(ours, other)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "changes", [{"n_samples": 4}, {"completion_length": 1}, {"anchors_at_once": 1}, {"naive_attention": "eager"}]
)
def test_both_sides_draw_embed_score_and_differentiate_alike(layout: str, changes: dict[str, Any]) -> None:
    rows = compared(*sides(LAYOUTS[layout], **changes))
    assert rows["identical_completions"].value == 1
    assert [name for name, row in rows.items() if row.failed] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_sides_agree_for_other_architectures(architecture: str) -> None:
    rows = compared(*sides(LAYOUTS["packed"], architecture))
    assert rows["identical_completions"].value == 1
    assert [name for name, row in rows.items() if row.failed] == []


def test_a_step_leaves_weights_as_they_were_and_no_gradients() -> None:
    ours, other = sides(LAYOUTS["ragged"])
    before = [p.clone() for p in ours.networks.parameters]
    for side in (ours, other):
        side.step()
        assert all(p.grad is None for p in side.networks.parameters)
        assert all(map(torch.equal, before, side.networks.parameters)), "the next step is the same as this one"


def change(other: Naive, section: str, **values: Any) -> None:
    changed = getattr(other.config, section).model_copy(update=values)
    other.config = other.config.model_copy(update={section: changed})


@torch.no_grad()
def change_weights(other: Naive) -> None:
    other.networks.whole.get_decoder().layers[0].mlp.down_proj.weight.mul_(1.01)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("contradicted_draws", lambda other: change(other, "rollout", temperature=2.0)),
        ("log_probs", lambda other: change(other, "rollout", temperature=0.601)),
        ("features", change_weights),
        ("gradients", lambda other: change(other, "loss", gamma=0.031)),
        ("gradients", lambda other: change(other, "reward", baseline="none")),
    ],
)
def test_a_difference_is_found(name: str, spoil: Any) -> None:
    ours, other = sides(LAYOUTS["packed"], n_samples=4)
    spoil(other)
    assert compared(ours, other)[name].failed


def test_no_number_is_no_agreement() -> None:
    assert judged("x", float("nan"), 1.0).failed
    assert agreement._worst([0.0, float("nan"), 1.0]) != agreement._worst([0.0, 1.0])


def test_nothing_is_carried_over_from_one_step_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = sides(LAYOUTS["packed"])
    calls = []
    original = local.run_prefix
    monkeypatch.setattr(local, "run_prefix", lambda *arguments: calls.append(1) or original(*arguments))
    ours.step()
    ours.step()
    completions = ours.rollouts()
    ours.features(completions)
    ours.features(completions)
    assert len(calls) == 4
    assert len(ours.tallies) == 2


# --- the naive side's own parts --------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_dense_mask_is_that_of_a_loop(layout: str, length: int) -> None:
    documents = torch.tensor(LAYOUTS[layout])
    anchors = find_anchors(documents, completion_length=4, stride=4, first_context_length=4)
    mask = naive.dense_mask(documents, anchors, length)
    assert mask.shape == (len(documents), 1, *[documents.shape[1] + anchors.positions.shape[1] * length] * 2)
    for s in range(len(documents)):
        assert torch.equal(mask[s, 0], looped_mask(documents[s], anchors, s, length))


def looped_mask(documents: torch.Tensor, anchors: Anchors, s: int, length: int) -> torch.Tensor:
    """Token by token: who is where, and may therefore see whom."""
    T = len(documents)
    places = [(None, i, int(documents[i])) for i in range(T)]
    for b, position in enumerate(anchors.positions[s].tolist()):
        places += [(b, t, int(documents[position])) for t in range(length)]
    mask = torch.zeros(len(places), len(places), dtype=torch.bool)
    for i, (block, at, document) in enumerate(places):
        for j, (other_block, other_at, other_document) in enumerate(places):
            if other_block is None:
                end = at + 1 if block is None else int(anchors.positions[s, block])
                mask[i, j] = other_at < end and document == other_document
            else:
                mask[i, j] = block == other_block and other_at <= at
    return mask


@pytest.mark.parametrize("duplicates", [False, True])
def test_naive_whitening_gives_the_products_of_the_gram_matrix(duplicates: bool) -> None:
    phi, psi = torch.randn(5, 4, 30, dtype=torch.double), torch.randn(5, 30, dtype=torch.double)
    if duplicates:
        phi[:, 3] = phi[:, 1]
    expected = whitened_products(phi @ phi.mT, (phi @ psi[..., None])[..., 0])
    samples, target = naive.naive_whitened(phi, psi)
    torch.testing.assert_close(samples @ samples.mT, expected.samples)
    torch.testing.assert_close((samples @ target[..., None])[..., 0], expected.target)
    torch.testing.assert_close(target.square().sum(-1), expected.target_norm_squared)


def test_naive_rewards_are_those_of_the_paper() -> None:
    phi, psi = torch.randn(5, 4, 30, dtype=torch.double), torch.randn(5, 30, dtype=torch.double)
    phi[0] = 0.0
    phi[1, 0] = phi[1, 2]
    expected = feature_matching_rewards(phi, psi, alpha=0.5, whitening="variant_i")
    alignment, diversity = naive.naive_rewards(phi, psi)
    torch.testing.assert_close(alignment, expected.alignment)
    torch.testing.assert_close(diversity, expected.diversity)


# --- models and settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"), [("7m", 7.1e6), ("50m", 51.7e6), ("1.5b", 1.54e9), ("7b", 7.62e9), ("tiny-4m", 4.2e6)]
)
def test_models_have_the_size_of_their_names(name: str, parameters: float) -> None:
    assert ModelShape.from_config(shapes.model_config(name)).n_parameters == pytest.approx(parameters, rel=0.05)


def test_options_are_settings() -> None:
    assert settings_of(parser().parse_args([])) == Settings()
    arguments = "--device cuda --model 1.5b --sequence-length 1024 --batch-size 16 --precision bfloat16 --threads 3"
    chosen = settings_of(parser().parse_args(arguments.split()))
    assert chosen == replace(benchmarks.settings.PAPER, threads=3)
    assert set(MODELS).isdisjoint(ladder())


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("--sections step", "unrecognized arguments"),
        ("--section steps", "invalid choice: 'steps'"),
        ("--repeats 0", "0 is not positive"),
        ("--n-samples 1", "rollout.n_samples=1"),
        ("--sequence-length 512 12", "a sequence of 12 tokens"),
        ("--device cuda", "no usable GPU"),
    ],
)
def test_mistakes_are_named(arguments: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError) as caught:
        main(arguments.split())
    assert part in str(caught.value)


def test_the_command_line_passes_options_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, code in ((["--help"], 0), (["--repeats", "0"], 2)):
        monkeypatch.setattr(sys, "argv", ["ebft-study", "bench", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == code
    out, err = capsys.readouterr()
    assert "--sequence-length" in out
    assert "example: ebft-study bench" in out
    assert err == "error: bench: argument --repeats: 0 is not positive. See --help\n"


def test_importing_the_benchmark_imports_only_what_it_needs() -> None:
    program = (
        "import sys, benchmarks.__main__\n"
        "assert not {'torch', 'typer', 'rich'} & set(sys.modules)\n"
        "import benchmarks.running, benchmarks.output\n"
        "heavy = {'ray', 'vllm', 'pandas', 'datasets', 'matplotlib', 'typer', 'rich', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# --- sections --------------------------------------------------------------------------------------------------


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small matrix product, and memory without new processes."""
    monkeypatch.setattr(measure, "CEILING_SIZE", {"cpu": 64})
    monkeypatch.setattr(sections, "_ask_fresh_process", sections.step_peak)


@pytest.mark.usefixtures("cheap")
def test_every_section_gives_the_promised_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.__main__.settings_of", lambda _: TINY)
    files = tmp_path / "new" / "bench.json", tmp_path / "new" / "bench.png"
    assert main(["--json", str(files[0]), "--plot", str(files[1])]) == 0
    rows = json.loads(files[0].read_text())
    for row in rows:
        assert {"name", "value", "unit", "target", "holds"} <= set(row) <= {*row, "low", "high"}
        assert row.get("low", 0) <= row["value"] <= row["high"] if "low" in row else True
    names = [row["name"] for row in rows]
    assert len(names) == len(set(names))
    assert {name.split("/")[0] for name in names} == {"setting", *SECTIONS}
    step = {f"step/T={T}/{name}" for T in (32, 48) for name in ("ours", "naive", "speedup", "utilisation")}
    phases = {f"step/T=32/{phase}/seconds" for phase in ("rollouts", "features", "scoring", "optimizer")}
    grown = {
        f"growth/{point}/{kind}"
        for point in ("T=8", "n=4", "G=8", "model=tiny-16m")
        for kind in ("seconds", "predicted")
    }
    assert step | phases | grown | {"memory/T=48/ratio", "rollouts/speedup", "growth/n=2->4"} <= set(names)
    assert files[1].stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(section in printed for section in SECTIONS)


def test_targets_belong_to_the_settings_they_are_stated_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "in_turn", lambda works, **_: {name: [1.0] for name in works})
    (*_, speedup) = sections.rollouts(replace(Settings(), model="tiny-1m"))
    assert speedup.target is None
    (*_, speedup) = sections.rollouts(Settings())
    assert (speedup.target, speedup.holds, speedup.failed) == (10.0, False, False)


def test_what_is_seen_of_a_row() -> None:
    slow, fast = (measured("x", [1.0, 2.0, 9.0], "s", target=t) for t in (3.0, 2.0))
    assert slow.as_json() == {
        "name": "x",
        "value": 2.0,
        "unit": "s",
        "target": 3.0,
        "holds": False,
        "low": 1.0,
        "high": 9.0,
    }
    assert fast.holds
    assert replace(slow, at_most=True).holds
    assert output._line(slow) == ("x", "2 s", "1 to 9", ">= 3", "missed")
    assert output._line(judged("y", 2.0, 1.0))[-1] == "FAILED"
    assert output._line(Row("z", 1.5e9, "FLOP"))[:2] == ("z", "1.5 GFLOP")


def test_rows_are_shown_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    output.show("step", [Row("step/a", 3.0, "s"), Row("step/T=1/b/seconds", 2.0, "s", cell=True)])
    assert capsys.readouterr().out == "step  median  spread  target\nstep/a  3 s\nstep  seconds\nT=1/b  2 s\n"


def test_disagreement_and_sections_that_break_fail_the_benchmark_but_slowness_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(_: Settings) -> list[Row]:
        raise torch.OutOfMemoryError("no room\nfor this")

    monkeypatch.setitem(running.RUN, "memory", broken)
    monkeypatch.setitem(running.RUN, "agreement", lambda _: [judged("agreement/features", 1.0, 1e-5)])
    monkeypatch.setitem(running.RUN, "rollouts", lambda _: [Row("rollouts/speedup", 1.0, "x", target=10.0)])
    assert main(["--section", "agreement"]) == 1
    assert main(["--section", "rollouts"]) == 0
    assert main(["--section", "rollouts", "memory"]) == 1
    rows = benchmarks.run(Settings(), ["memory", "rollouts"])
    assert [row.name for row in rows if row.name.split("/")[0] != "setting"] == ["rollouts/speedup", "memory/failed"]
    assert rows[-1].value == "no room for this"


def test_no_figure_without_anything_to_draw(tmp_path: Path) -> None:
    figure.draw([Row("rollouts/ours", 1.0)], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


# --- measuring -------------------------------------------------------------------------------------------------


def test_works_run_in_turn_after_a_warm_up() -> None:
    order: list[str] = []
    times = measure.in_turn({name: lambda name=name: order.append(name) for name in "ab"}, repeats=2, device="cpu")
    assert order == ["a", "b"] * 3
    assert {name: len(taken) for name, taken in times.items()} == {"a": 2, "b": 2}


def test_a_fresh_process_knows_nothing_of_the_memory_of_its_parent() -> None:
    size = 2**26
    large = torch.ones(8 * size, dtype=torch.uint8)
    work = functools.partial(torch.ones, size, dtype=torch.uint8)
    assert 0.9 * size < measure.in_fresh_process(measure.peak_bytes, work, "cpu") < 1.5 * size
    assert measure.resident_bytes()[1] > len(large)
