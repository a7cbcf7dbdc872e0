"""The benchmark compares two ways of doing the same thing: they must agree. No test here looks at a time."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import agreement, figure, measure, naive, sections, weights, workload
from benchmarks.contenders import Naive, Networks, Ours
from benchmarks.rows import Row, judged, line, measured
from benchmarks.settings import MODELS, PAPER, Section, Settings, ladder
from benchmarks.workload import Inputs
from ebft_study import cli
from ebft_study.algorithm.anchors import Anchors, find_anchors
from ebft_study.algorithm.rewards import feature_matching_rewards
from ebft_study.algorithm.whitening import whitened_products
from ebft_study.cost import ModelShape, StepShape
from ebft_study.features import local
from ebft_study.training.update import Run
from tests.benchmarks import assert_refused, run_command
from tests.small_models import small_batch, small_model
from tests.tiny_run import tiny_config

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

# --- contenders ------------------------------------------------------------------------------------------------

LAYOUTS = {
    "one document": [[0] * 16],
    "packed": [[0] * 9 + [1] * 15, [0] * 24],
    "ragged": [[0] * 24, [0] * 13 + [-1] * 11, [0] * 9 + [1] * 9 + [-1] * 6],
    "no anchor in one sequence": [[0] * 16, [0] * 5 + [-1] * 11],
    "one anchor": [[0] * 9],
}


def contenders(layouts: list[list[int]], architecture: str = "qwen2-tied", **changes: Any) -> tuple[Ours, Naive]:
    """Both contenders on a small model and random tokens of the given documents."""
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
def test_both_contenders_draw_embed_score_and_differentiate_alike(layout: str, changes: dict[str, Any]) -> None:
    rows = compared(*contenders(LAYOUTS[layout], **changes))
    assert rows["identical_completions"].value == 1
    assert [name for name, row in rows.items() if row.failed] == []


@pytest.mark.parametrize("architecture", ["qwen2-tied", "llama-untied"])  # whose attention PyTorch's own kernel knows
def test_both_contenders_agree_for_other_architectures(architecture: str) -> None:
    rows = compared(*contenders(LAYOUTS["packed"], architecture))
    assert rows["identical_completions"].value == 1
    assert [name for name, row in rows.items() if row.failed] == []


def test_a_step_leaves_weights_as_they_were_and_no_gradients() -> None:
    ours, other = contenders(LAYOUTS["ragged"])
    before = [p.clone() for p in ours.networks.parameters]
    for contender in (ours, other):
        contender.step()
        assert all(p.grad is None for p in contender.networks.parameters)
        assert all(map(torch.equal, before, contender.networks.parameters)), "the next step is the same as this one"


def change(other: Naive, section: str, **values: Any) -> None:
    other.config = replace(other.config, **{section: replace(getattr(other.config, section), **values)})


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
    ours, other = contenders(LAYOUTS["packed"], n_samples=4)
    spoil(other)
    assert compared(ours, other)[name].failed


def test_no_number_is_no_agreement() -> None:
    assert judged("x", float("nan"), 1.0).failed
    assert agreement.largest([0.0, float("nan"), 1.0]) != agreement.largest([0.0, 1.0])


def test_nothing_is_carried_over_from_one_step_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = contenders(LAYOUTS["packed"])
    calls = []
    original = local.run_prefix
    monkeypatch.setattr(local, "run_prefix", lambda *arguments: calls.append(1) or original(*arguments))
    ours.step()
    ours.step()
    completions = ours.rollouts()
    ours.features(completions)
    ours.features(completions)
    assert len(calls) == 4
    assert len(ours.accumulators) == 2


# --- parts of the naive contender --------------------------------------------------------------------------------


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
    tokens = [(None, i, int(documents[i])) for i in range(T)]
    for b, position in enumerate(anchors.positions[s].tolist()):
        tokens += [(b, t, int(documents[position])) for t in range(length)]
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for i, (block, at, document) in enumerate(tokens):
        for j, (other_block, other_at, other_document) in enumerate(tokens):
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
    ("name", "parameters"),
    [("7m", 7.1e6), ("50m", 51.7e6), ("1.5b", 1.54e9), ("3b", 3.09e9), ("7b", 7.62e9), ("tiny-4m", 4.2e6)],
)
def test_models_have_the_size_of_their_names(name: str, parameters: float) -> None:
    assert ModelShape.from_config(workload.model_config(name)).n_parameters == pytest.approx(parameters, rel=0.05)


@pytest.mark.parametrize(
    "settings",
    [TINY, PAPER, replace(PAPER, lora_rank=16), replace(PAPER, weight_dtype="bfloat16", activation_checkpointing=True)],
)
def test_what_a_step_reads_is_that_of_a_run(settings: Settings) -> None:
    """The benchmark's plain settings take no value for granted that the run's sections have, too."""
    run = settings.run()
    plain = asdict(settings.config)
    assert plain.pop("uses_engine") == run.uses_engine
    for section, values in plain.items():
        assert {name: getattr(getattr(run, section), name) for name in values} == values
    assert settings.shape == StepShape.from_config(run)


def test_the_measured_model_is_the_one_that_is_planned() -> None:
    settings = replace(TINY, precision="bfloat16", lora_rank=2, activation_checkpointing=True)
    networks = Networks.from_settings(settings)
    assert networks.generator.is_gradient_checkpointing
    assert {p.dtype for p in networks.parameters} == {torch.float32}
    assert {p.dtype for p in networks.generator.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert networks.features.network is networks.generator
    # Two moments of four bytes for every trained weight.
    assert workload.memory_of(settings).optimizer_bytes == 8 * sum(p.numel() for p in networks.parameters)
    everything = Networks.from_settings(replace(TINY, weight_dtype="bfloat16"))
    assert {p.dtype for p in everything.parameters} == {torch.bfloat16}
    assert len(everything.parameters) == len(list(everything.generator.parameters()))
    assert not everything.generator.is_gradient_checkpointing


def test_options_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Settings] = []
    monkeypatch.setattr(sections, "run", lambda settings, _: chosen.append(settings) or [])
    arguments = "--device cuda --model 1.5b --sequence-length 1024 --batch-size 16 --precision bfloat16 --threads 3"
    adapters = "--lora-rank 16 --weight-dtype bfloat16 --activation-checkpointing"
    for words in ("", arguments, "--sequence-length 64 128 --threads 1", adapters):
        assert run_command(words).exit_code == 0
    several = replace(Settings(), sequence_lengths=(64, 128), threads=1)
    adapted = replace(Settings(), lora_rank=16, weight_dtype="bfloat16", activation_checkpointing=True)
    assert chosen == [Settings(), replace(PAPER, threads=3), several, adapted]
    assert set(MODELS).isdisjoint(ladder())


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("--sections step", "No such option: --sections"),
        ("--section steps", "'steps' is not one of 'agreement', 'rollouts'"),
        ("--repeats 0", "Invalid value for '--repeats'"),
        ("--n-samples 1", "rollout.n_samples=1"),
        ("--sequence-length 512 12", "a sequence of 12 tokens"),
        ("--device cuda", "no usable GPU"),
    ],
)
def test_mistakes_are_named(arguments: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(arguments, part)


def bench(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """The exit code of `ebft-study bench`."""
    monkeypatch.setattr(sys, "argv", ["ebft-study", "bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_the_command_line_passes_options_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(monkeypatch, "--help") == 0
    assert bench(monkeypatch, "--repeats", "0") == 2
    out, err = capsys.readouterr()
    assert "--sequence-length" in out
    assert "example: ebft-study bench" in out
    assert "Invalid value for '--repeats'" in err
    assert bench(monkeypatch, "--n-samples", "1") == 2
    assert capsys.readouterr().err.startswith("error: bench: rollout.n_samples=1")


def test_outside_the_checkout_the_remedy_is_named(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        f"sys.path.append({str(Path(cli.__file__).parents[1])!r})\n"
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "PathFinder.find_spec = lambda name, *rest: None if name == 'benchmarks' else find(name, *rest)\n"
        "sys.argv[1:] = ['bench', '--help']\n"
        "from ebft_study import cli; cli.main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 2
    expected = "error: bench: benchmarks are part of the source checkout. Run pip install -e '.[dev]' there\n"
    assert ended.stderr == expected


def test_importing_the_benchmark_imports_only_what_it_needs() -> None:
    program = (
        "import sys, benchmarks.cli\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)\n"
        "import benchmarks.sections\n"
        "heavy = {'ray', 'vllm', 'pandas', 'datasets', 'matplotlib', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)


# --- sections --------------------------------------------------------------------------------------------------


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small matrix product, and memory without new processes."""
    monkeypatch.setattr(measure, "CEILING_SIZE", {"cpu": 64})
    monkeypatch.setattr(sections, "_step_peak_in_fresh_process", sections.step_peak)


@pytest.mark.usefixtures("cheap")
def test_every_section_gives_the_promised_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.cli._settings", lambda *_, **__: TINY)
    files = tmp_path / "new" / "bench.json", tmp_path / "new" / "bench.png"
    result = run_command(f"--json {files[0]} --plot {files[1]}")
    assert result.exit_code == 0
    rows = json.loads(files[0].read_text())
    for row in rows:
        assert {"name", "value", "unit", "target", "holds"} <= set(row) <= {*row, "low", "high"}
        assert row.get("low", 0) <= row["value"] <= row["high"] if "low" in row else True
    names = [row["name"] for row in rows]
    assert len(names) == len(set(names))
    assert {name.split("/")[0] for name in names} == {"setting", *Section}
    step = {f"step/T={T}/{name}" for T in (32, 48) for name in ("ours", "naive", "speedup", "utilisation")}
    phases = {f"step/T=32/{phase}/seconds" for phase in ("rollouts", "features", "scoring", "optimizer")}
    grown = {
        f"growth/{point}/{kind}"
        for point in ("T=8", "n=4", "G=8", "model=tiny-16m")
        for kind in ("seconds", "predicted")
    }
    assert step | phases | grown | {"memory/T=48/ratio", "rollouts/speedup", "growth/n=2->4"} <= set(names)
    assert files[1].stat().st_size > 10_000
    assert all(section in result.stdout for section in Section)


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
    assert line(slow) == ("x", "2 s", "1 to 9", ">= 3", "missed")
    assert line(judged("y", 2.0, 1.0))[-1] == "FAILED"
    assert line(Row("z", 1.5e9, "FLOP"))[:2] == ("z", "1.5 GFLOP")


def test_disagreement_and_sections_that_break_fail_the_benchmark_but_slowness_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(_: Settings) -> list[Row]:
        raise torch.OutOfMemoryError("no room\nfor this")

    monkeypatch.setitem(sections.RUN, Section.memory, broken)
    monkeypatch.setitem(sections.RUN, Section.agreement, lambda _: [judged("agreement/features", 1.0, 1e-5)])
    monkeypatch.setitem(sections.RUN, Section.rollouts, lambda _: [Row("rollouts/speedup", 1.0, "x", target=10.0)])
    assert run_command("--section agreement").exit_code == 1
    assert run_command("--section rollouts").exit_code == 0
    assert run_command("--section rollouts memory").exit_code == 1
    rows = [row for _, table in sections.run(Settings(), ["memory", "rollouts"]) for row in table]
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


# --- weights ---------------------------------------------------------------------------------------------------


def test_weights_are_loaded_saved_and_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: bytes of the checkpoint are weights and two states, and nothing of a number depends on time."""
    monkeypatch.setattr(weights, "in_fresh_process", lambda function, *arguments: function(*arguments))
    settings = Settings(model="tiny-1m", weight_dtype="bfloat16")
    rows = {row.name: row for _, table in weights.tables(settings) for row in table}
    parts = ("start", "start_of_other_workers", "checkpoint", "resume")
    assert all(isinstance(rows[f"{part}/seconds"].value, float) for part in parts)
    n_parameters = ModelShape.from_config(workload.model_config("tiny-1m")).n_parameters
    assert rows["checkpoint/files"].value == pytest.approx(3 * 2 * n_parameters, rel=0.02)


def test_what_is_left_of_steps_is_measured_along_those_of_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves = {"nearest": [0, 0, 0, 1], "stochastic": [0, 4, 0, 3], "float32": [1, 2, 3, 4]}

    def moved(model: str, steps: int, rate: float, changes: dict[str, str]) -> torch.Tensor:
        assert (model, steps, rate) == ("m", 3, 0.5)
        (name,) = [name for name, value in weights.TYPES.items() if value == changes]
        return torch.tensor(moves[name]).float()

    monkeypatch.setattr(weights, "_moves", moved)
    result = run_command(f"rounding --model m --steps 3 --learning-rate 0.5 --json {tmp_path / 'rows.json'}")
    assert result.exit_code == 0
    rows = {row["name"]: row["value"] for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows == pytest.approx(
        {"nearest/changed": 25, "nearest/way": 100 * 4 / 30, "stochastic/changed": 50, "stochastic/way": 100 * 20 / 30}
        | {"float32/changed": 100, "float32/way": 100}
    )


def test_moves_are_differences_of_matrices_after_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model and data of a test, at a rate at which every type moves."""

    def configured(settings: dict[str, Any], source: str) -> Any:
        training = {name: settings["training"][name] for name in ("steps", "weight_dtype", "precision")}
        rate = settings["optimizer"]["learning_rate"]
        return tiny_config(tmp_path, method=settings["method"], learning_rate=rate, **training)

    monkeypatch.setattr(weights, "build_run", configured)
    name = tiny_config(tmp_path).model
    move = weights._moves(name, 2, 0.01, weights.TYPES["float32"])
    run = Run(tiny_config(tmp_path, method="sft", precision="bfloat16", learning_rate=0.01, steps=2))
    before = {n: p.detach().clone() for n, p in run.model.named_parameters() if p.dim() > 1}
    for _ in range(2):
        run.update()
    after = dict(run.model.named_parameters())
    assert torch.equal(move, torch.cat([(after[n].detach() - p).flatten() for n, p in before.items()]))
