"""Examples for clusters: they parse, their commands are ours, their study files load, their options exist."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer
import yaml

from ebft_study.cli import app
from ebft_study.study.resolving import study_file

ROOT = Path(__file__).parent.parent
SBATCH, RAYJOB = ROOT / "examples" / "slurm" / "study.sbatch", ROOT / "examples" / "kuberay" / "rayjob.yaml"

# From `man sbatch` (24.05), as far as options are usual in job scripts.
SBATCH_OPTIONS = {
    *("account", "array", "begin", "chdir", "comment", "constraint", "cores-per-socket", "cpus-per-gpu"),
    *("cpus-per-task", "deadline", "dependency", "distribution", "error", "exclude", "exclusive", "export"),
    *("gpu-bind", "gpus", "gpus-per-node", "gpus-per-socket", "gpus-per-task", "gres", "hint", "hold", "input"),
    *("job-name", "kill-on-invalid-dep", "licenses", "mail-type", "mail-user", "mem", "mem-per-cpu", "mem-per-gpu"),
    *("nice", "no-requeue", "nodelist", "nodes", "ntasks", "ntasks-per-core", "ntasks-per-gpu", "ntasks-per-node"),
    *("open-mode", "output", "overcommit", "partition", "priority", "qos", "quiet", "requeue", "reservation"),
    *("signal", "spread-job", "switches", "threads-per-core", "time", "time-min", "tmp", "use-min-nodes", "wckey"),
}

# Fields and their types of ray.io/v1, written down by hand from the operator's Go types; not its OpenAPI schema.
RAYJOB_FIELDS: dict[str, Any] = {
    "entrypoint": str, "submissionMode": str, "backoffLimit": int, "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int, "runtimeEnvYAML": str, "activeDeadlineSeconds": int, "rayClusterSpec": dict,
}  # fmt: skip
CLUSTER_FIELDS: dict[str, Any] = {"rayVersion": str, "headGroupSpec": dict, "workerGroupSpecs": list}
HEAD_FIELDS: dict[str, Any] = {"rayStartParams": dict, "template": dict, "serviceType": str}
WORKER_FIELDS: dict[str, Any] = {
    "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int, "numOfHosts": int,
    "rayStartParams": dict, "template": dict,
}  # fmt: skip


def parsed(words: list[str]) -> dict[str, Any]:
    """The options of an ebft-study command, as the command line itself reads them."""
    command = typer.main.get_command(app)
    context = command.make_context("ebft-study", list(words), resilient_parsing=False)
    name, subcommand, rest = command.resolve_command(context, context._protected_args + context.args)  # type: ignore[attr-defined]
    return dict(subcommand.make_context(name, rest).params)


def test_the_slurm_script_is_bash_with_options_that_sbatch_has() -> None:
    assert subprocess.run(["bash", "-n", SBATCH], capture_output=True).returncode == 0
    text = SBATCH.read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert len(options) == text.count("\n#SBATCH ")
    assert set(options) <= SBATCH_OPTIONS
    assert re.fullmatch(r"B:TERM@\d+", options["signal"])
    assert "requeue" in options
    # sbatch stops looking for options at the first command.
    assert text.index("set -euo") > text.rindex("#SBATCH")


def test_the_slurm_script_runs_our_command_on_a_file_that_loads() -> None:
    text = SBATCH.read_text()
    (line,) = re.findall(r"^ebft-study (.*) &$", text, re.MULTILINE)
    defaults = dict(re.findall(r"^(FILE|PROFILE)=\$\{\d:-(\S+)\}$", text, re.MULTILINE))
    values = {**defaults, "HEAD": "10.0.0.1", "PORT": "20001"}
    words = [re.sub(r"\$([A-Z]+)", lambda match: values[match[1]], word) for word in shlex.split(line)]
    arguments = parsed(words)
    assert arguments["address"] == "10.0.0.1:20001"
    assert arguments["resume"]
    spec = study_file.load_study(ROOT / str(arguments["file"]), arguments["profile"]).spec
    assert spec.resources.gpus_per_worker


STUB = """#!/bin/bash
echo "$(basename "$0") $*" >> "$LOG"
case "$(basename "$0") $1" in
  "$BLOCKED") trap 'exit "$CODE"' TERM; echo blocked >> "$LOG"; for _ in {1..3000}; do sleep 0.1; done ;;
esac
"""


@pytest.mark.parametrize(
    ("blocked", "code", "requeued"),
    [
        ("ebft-study study", 130, True),
        ("ebft-study study", 143, True),  # it was not yet there to handle the signal
        ("ebft-study study", 0, False),
        ("ebft-study study", 1, False),
        ("ray status", 1, True),  # the cluster is still starting
    ],
)
def test_the_slurm_script_requeues_a_job_that_was_stopped(
    blocked: str, code: int, requeued: bool, tmp_path: Path
) -> None:
    """With stubs for all commands; SIGTERM arrives while one of them waits, and so does the script."""
    for name in ("srun", "scontrol", "ray", "python", "hostname", "ebft-study"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(STUB)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "bin" / "activate").write_text("")
    log = tmp_path / "log"
    log.write_text("")
    environment = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "VIRTUAL_ENV": str(tmp_path), "LOG": str(log), "CODE": str(code),
        "BLOCKED": blocked, "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURMD_NODENAME": "n",
    }  # fmt: skip
    job = subprocess.Popen(["bash", SBATCH], env=environment, start_new_session=True)
    try:
        while "blocked" not in log.read_text().splitlines():
            assert job.poll() is None
            time.sleep(0.05)
        # SLURM signals the batch script alone; bash handles it when the command in the foreground has ended.
        job.terminate()
        if blocked == "ray status":
            for child in psutil.Process(job.pid).children():
                child.terminate()
        job.wait(timeout=300)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    assert ("scontrol requeue 7" in log.read_text().splitlines()) == requeued


def check_fields(fields: dict[str, Any], known: dict[str, Any], required: set[str]) -> None:
    assert set(fields) <= set(known)
    assert required <= set(fields)
    for name, value in fields.items():
        assert isinstance(value, known[name]), name


def test_the_kuberay_manifest_has_the_fields_of_its_kinds() -> None:
    claim, job = yaml.safe_load_all(RAYJOB.read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    check_fields(job["spec"], RAYJOB_FIELDS, {"entrypoint", "rayClusterSpec"})
    assert job["spec"]["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode")
    cluster = job["spec"]["rayClusterSpec"]
    check_fields(cluster, CLUSTER_FIELDS, {"headGroupSpec", "rayVersion"})
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    check_fields(head, HEAD_FIELDS, {"rayStartParams", "template"})
    for group in workers:
        check_fields(group, WORKER_FIELDS, {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"})
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (head, *workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
        assert claims == [claim["metadata"]["name"]]


def test_the_kuberay_manifest_runs_our_command_with_the_ray_that_is_pinned() -> None:
    _, job = yaml.safe_load_all(RAYJOB.read_text())
    program, *words = shlex.split(job["spec"]["entrypoint"])
    assert program == "ebft-study"
    arguments = parsed(words)
    mounts = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    shared = [mount["mountPath"] for mount in mounts]
    assert any(str(arguments["storage"]).startswith(f"{path}/") for path in shared)
    environment = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    assert environment["EBFT_STUDY_CACHE"].startswith("/shared/")
    study_file.load_study(ROOT / Path(*Path(arguments["file"]).parts[2:]), arguments["profile"])
    assert f"=={job['spec']['rayClusterSpec']['rayVersion']}" in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("text", [SBATCH.read_text(), RAYJOB.read_text()])
def test_examples_hold_no_secret_and_no_folder_of_a_person(text: str) -> None:
    assert not re.search(r"/home/|/Users/|hf_[A-Za-z0-9]{8}|AKIA", text)
