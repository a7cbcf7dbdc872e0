"""Studies with known answers to the questions of the notebooks, and all notebooks executed on one study, or on these.

python -m tests.notebooks [STUDY]     # make notebooks: writes outputs/notebooks/*.html and *.ipynb
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ebft_study
from ebft_study.errors import EbftError
from ebft_study.results import StudyRecorder
from ebft_study.storage import atomic_write
from tests.synthetic_study import EFFECTS, LEVELS, PAPER_LIKE, Effect, of_method, write_benchmark, write_study

FOLDER = Path(__file__).parent.parent / "analysis"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
DEFAULT = re.compile(r'environ\.get\("EBFT_STUDY", "(\w+)"\)')

NETWORKS: dict[str, dict[str, Any]] = {
    "default": {},
    "no_whitening": {"whitening": "none"},
    "mean_pooling": {"pooling": "mean"},
    "larger": {"feature_network": "tiny-4m"},
}
"""An axis of choices like that of search_spaces/feature_network.yaml."""
OF_NETWORKS: dict[Any, Effect] = {
    "default": (-0.10, -0.05),
    "no_whitening": (-0.02, 0.02),
    "mean_pooling": (-0.04, 0.01),
    "larger": (-0.10, -0.05),
    None: (-0.2, -0.01),
}
RATES = (1e-5, 3e-5, 1e-4, 3e-4)
OF_SEARCH: dict[Any, Effect] = {
    (rate, gamma): (-0.1, -0.02 * index) for index, rate in enumerate(RATES) for gamma in (0.0, 0.1, 0.3)
}
"""Learning rate and gamma: only the first has an effect."""
SIZES, STEPS, TOKENS = {"tiny-1m": 1_000_000}, 40, 128
BATCHES = (2, 4, 8, 16, 32, 64)
SPEEDUP = 2.0
"""The tokens of SFT that one token of EBFT is worth."""


def alpha_gamma(folder: Path, effects: Mapping[Any, Effect] = PAPER_LIKE) -> Path:
    """A grid of alpha and gamma with SFT."""
    return write_study(folder, effects=effects)


def networks(folder: Path, effects: Mapping[Any, Effect] = OF_NETWORKS) -> Path:
    """Feature networks under one judge, with SFT."""
    common = {"whitening": "variant_i", "judge": "tiny-16m"}
    return write_study(folder, effects=effects, settings=lambda key: dict(common), choices={"network": NETWORKS})


def methods(folder: Path, effects: Mapping[Any, Effect] = EFFECTS, levels: Mapping[str, float] = LEVELS) -> Path:
    """The methods of Table 1 with pass@1 on a benchmark."""
    write_study(folder, effects=effects, settings=of_method)
    write_benchmark(folder, levels)
    return folder


def scaling(folder: Path, speedup: float = SPEEDUP) -> Path:
    """Six amounts of data of one size, along a law of which EBFT makes `speedup` tokens of one."""

    def loss(method: str, batch: int) -> float:
        tokens = batch * TOKENS * STEPS * (speedup if method == "ebft" else 1.0)
        return 2.5 + (tokens / 1e4) ** -0.5 - 3.639

    keys = [(method, batch) for method in ("sft", "ebft") for batch in BATCHES]
    return write_study(
        folder,
        effects={key: (loss(*key), -0.01) for key in keys},
        settings=lambda key: {"method": key[0], "model": "tiny-1m", "batch_size": key[1], "sequence_length": TOKENS},
        seeds=(0, 1),
        noise=1e-3,
        steps=STEPS,
        parameters=SIZES,
    )


def search(folder: Path, effects: Mapping[Any, Effect] = OF_SEARCH) -> Path:
    """A grid of learning rates and gammas, of which a race stopped one configuration with all its seeds."""
    stopped = list(effects)[1]
    write_study(
        folder,
        effects=effects,
        settings=lambda key: {"learning_rate": key[0], "gamma": key[1]},
        seeds=(0, 1),
        statuses={(stopped, seed): "stopped" for seed in (0, 1)},
        with_savings=True,
    )
    compared = {"configuration": "learning_rate=1e-05 gamma=0.1", "best": "learning_rate=0.0003 gamma=0.0"}
    numbers = {"difference": 0.04, "half_width": 0.02, "n_seeds": 2, "n_sequences": 0}
    StudyRecorder(folder, study=folder.name).event(
        "race", "race at step 20", step=20, comparisons=[compared | numbers], stopped=[compared["configuration"]]
    )
    return folder


MADE_UP: dict[str, Callable[[Path], Path]] = {
    "01_reading_results": alpha_gamma,
    "02_alpha_gamma": alpha_gamma,
    "03_feature_matching_by_length": alpha_gamma,
    "04_feature_networks": networks,
    "05_methods": methods,
    "06_scaling": scaling,
    "07_search_and_early_stopping": search,
    "08_paper_tables": methods,
}
"""A study for each notebook that answers its question."""


def default_study(notebook: Path) -> str:
    """The study that a notebook takes where none is named."""
    found = DEFAULT.search(notebook.read_text(encoding="utf-8").replace('\\"', '"'))
    assert found, notebook
    return found.group(1)


def main() -> int:
    parser = argparse.ArgumentParser(description="Executes the notebooks in analysis/.")
    parser.add_argument("study", nargs="?", help="a name in ./studies, a folder or a URL; default: each notebook's own")
    parser.add_argument("--out", type=Path, default=Path("outputs/notebooks"))
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            for notebook in NOTEBOOKS:
                _write(notebook, _study(notebook, arguments.study, Path(temporary)), arguments.out)
    except EbftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _study(notebook: Path, named: str | None, temporary: Path) -> Any:
    """The study named, or the notebook's own if it is there, or one that is made up."""
    if named:
        return ebft_study.api.find(named)
    own = Path("studies") / default_study(notebook)
    if own.exists():
        return own
    make = MADE_UP[notebook.stem]
    folder = temporary / f"made_up_{make.__name__}"
    return folder if folder.exists() else make(folder)


def _write(notebook: Path, study: Any, out: Path) -> None:
    import nbformat

    from ebft_study.report.notebooks import answer, execute, page

    node = execute(notebook, study)
    out.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".ipynb", nbformat.writes(node)), (".html", page(node, notebook.stem))):
        with atomic_write(out / f"{notebook.stem}{suffix}") as temporary:
            temporary.write_text(content, encoding="utf-8")
    print(f"{out / notebook.stem}.html, on {study}\n{answer(node).strip()}\n")


if __name__ == "__main__":
    sys.exit(main())
