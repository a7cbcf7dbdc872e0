"""What a stranger does, from an empty folder: `make journeys`.

Builds the wheel, installs it with its pins into an environment of its own, and follows the tour: a ready study, its
report in a browser, a study of own data, the trained model taken out and used as the model of another study, two
studies compared, a plug-in. Every command is one of the pages', with fewer steps. The exit code is 1 at the first
command that does not do what the tour says.

    python -m tests.journeys [--folder EMPTY] [--python OTHER]

With `--python`, that environment is used as it is, instead of a new one.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHORT = ["steps=8", "warm_start_steps=4", "validation_sequences=8", "heldout_sequences=8", "eval_every_steps=4"]
GENERATE = """
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("models/own")
tokenizer = AutoTokenizer.from_pretrained("models/own")
tokens = tokenizer("Return the mean of", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=12)[0]))
"""


class Stranger:
    """Someone in an empty folder, with a Python of their own."""

    def __init__(self, folder: Path, python: Path | None) -> None:
        self.folder, self.python = folder, python or folder / ".venv" / "bin" / "python"

    def run(self, *command: str, code: int = 0) -> str:
        """Run a command in the folder; returns what it printed."""
        print("   $", " ".join(command)[:150], flush=True)
        ran = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        if ran.returncode != code or "Traceback" in ran.stderr:
            sys.exit(f"{' '.join(command)}: exit code {ran.returncode}, not {code}\n{ran.stdout}\n{ran.stderr}")
        return ran.stdout

    def ebft(self, *arguments: str, code: int = 0) -> str:
        return self.run(str(self.python.parent / "ebft-study"), *arguments, code=code)


def install(stranger: Stranger) -> None:
    if not stranger.python.is_relative_to(stranger.folder):
        return
    wheels = stranger.folder / "wheels"
    build = (
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(wheels),
        str(ROOT),
    )
    stranger.run(sys.executable, *build)
    stranger.run(sys.executable, "-m", "venv", str(stranger.folder / ".venv"))
    pip = (str(stranger.python), "-m", "pip", "install", "--quiet", "--no-deps")
    stranger.run(*pip, "--require-hashes", "-r", str(ROOT / "requirements" / "base.txt"))
    build_of_torch = "torch-cpu.txt" if "+cpu" in _torch_here() else "torch.txt"
    stranger.run(*pip, "--require-hashes", "-r", str(ROOT / "requirements" / build_of_torch))
    stranger.run(*pip, *map(str, wheels.glob("*.whl")))


def _torch_here() -> str:
    import torch

    return str(torch.__version__)


def tour(stranger: Stranger) -> None:
    assert "ebft-study" in stranger.ebft("--version")
    assert "quickstart" in stranger.ebft("init", "--list")
    stranger.ebft("init", "quickstart")
    assert "15 trials" in stranger.ebft("plan", "quickstart.yaml", "--profile", "cpu")
    quick = [*SHORT, "seeds=[0, 1]", "sample_every_steps=8", "checkpoint_every_steps=8", "profile_lengths=[1, 4]"]
    stranger.ebft("study", "quickstart.yaml", "--profile", "cpu", *quick)
    assert "10 of 10 trials finished" in stranger.ebft("status", "quickstart")
    assert "quickstart" in stranger.ebft("list")


def mistake(stranger: Stranger) -> None:
    """A misspelt key ends in one line and exit code 2."""
    stranger.ebft("plan", "quickstart.yaml", "--profile", "cpu", "alfa=0.5", code=2)
    stranger.ebft("study", "nowhere.yaml", code=2)


def browser(stranger: Stranger) -> None:
    """The report opens without an error, and its table of trials filters."""
    from tests.browser import Window, chromium

    with chromium() as running, Window(running) as window:
        window.page.goto((stranger.folder / "studies" / "quickstart" / "report.html").as_uri())
        rows = "table[data-table=trials] > tbody > tr:not(.details)"
        everything = len(window.texts(rows))
        assert everything == 10, everything
        window.page.get_by_label("Filter the table trials").fill("sft")
        assert 0 < len(window.texts(rows)) < everything
        assert window.said == [], window.said


def own_study(stranger: Stranger) -> None:
    """The study of the tour, on docstrings of the standard library."""
    with (stranger.folder / "mine.jsonl").open("w") as file:
        for text in _docstrings(600):
            file.write(json.dumps({"text": text}) + "\n")
    tour = (ROOT / "docs" / "index.md").read_text()
    [content] = re.findall(r"```yaml\n(study: own\n.*?)```", tour, flags=re.DOTALL)
    (stranger.folder / "own.yaml").write_text(content)
    stranger.ebft("plan", "own.yaml")
    stranger.ebft("study", "own.yaml", "seeds=[0, 1]", *SHORT)
    assert (stranger.folder / "studies" / "own" / "report.html").exists()


def _docstrings(number: int) -> list[str]:
    """Docstrings of the standard library of at least 300 characters."""
    texts: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        nodes = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, nodes)]
        texts += [text for text in found if text and len(text) >= 300]
    return texts[:number]


def take_out(stranger: Stranger) -> None:
    """The trained model generates with transformers alone, and is the model of another study."""
    stranger.ebft("export", "own", "best", "--to", "models/own")
    assert "Return the mean of" in stranger.run(str(stranger.python), "-c", GENERATE)
    card = (stranger.folder / "models" / "own" / "README.md").read_text()
    assert "base_model: tiny-1m" in card
    stranger.ebft("study", "own.yaml", "--name", "further", "model=models/own", "seeds=[0, 1]", *SHORT)


def compare(stranger: Stranger) -> None:
    stranger.ebft("study", "own.yaml", "--name", "again", "seeds=[0, 1]", *SHORT)
    said = stranger.ebft("compare", "own", "again", "--output", "comparison.html")
    assert "again against own, 3 configurations in common" in said, said
    assert (stranger.folder / "comparison.html").exists()


def plug_in(stranger: Stranger) -> None:
    """The example of all kinds of plug-ins at once, from a folder of the stranger's."""
    shutil.copytree(ROOT / "examples" / "plugins", stranger.folder / "mine")
    stranger.ebft("study", "mine/study.yaml", "steps=8", "eval_every_steps=4", "search.num_configurations=3",
                  "scheduler.grace_period_steps=4")  # fmt: skip
    assert "distinct_tokens" in (stranger.folder / "studies" / "plugins" / "report.html").read_text()


JOURNEY: list[Callable[[Stranger], None]] = [
    *(install, tour, mistake, browser, own_study, take_out, compare, plug_in),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="empty; default: a temporary one, removed at the end")
    parser.add_argument("--python", type=Path, help="an environment that has the package already")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stranger-") as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        stranger = Stranger(folder, options.python and options.python.absolute())
        for number, step in enumerate(JOURNEY, start=1):
            print(f"{number} of {len(JOURNEY)}: {step.__name__.replace('_', ' ')}", flush=True)
            started = time.monotonic()
            step(stranger)
            print(f"   {time.monotonic() - started:.0f} s", flush=True)
    print("the journey went well")


if __name__ == "__main__":
    main()
