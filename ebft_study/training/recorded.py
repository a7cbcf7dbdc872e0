"""One attempt of a trial with its results recorded; the same with and without Ray.

Imported by every process of a trial, most of which need no model: modules that do are imported where they are used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import pkgutil
import time
from typing import TYPE_CHECKING, Any

from ebft_study.config import RunConfig
from ebft_study.plugins import search_in
from ebft_study.results import Fence, TrialRecorder
from ebft_study.results.copies import read_mapping
from ebft_study.storage import storage_path
from ebft_study.training.tracking import WandbRecorder

if TYPE_CHECKING:
    import torch

    from ebft_study.features import FeatureBackend
    from ebft_study.networks.loading import LoadedModel
    from ebft_study.rollouts import RolloutBackend

LOOP = "ebft_study.training.loop:train"


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One start of a trial."""

    study: str
    study_folder: str
    """Path or URL."""
    trial_id: str
    label: str
    """Name of the trial to display."""
    attempt: int
    start_from: str | None = None
    """Path or URL of the checkpoint to resume from."""
    loop: str = LOOP
    """The training loop, as `module:function`."""
    gpu_fraction: float = 1.0
    """The part of a GPU that each worker may use."""
    generation: int = 0
    """Of the driver that the attempt belongs to, in a store."""
    plugins: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of `plugins.search_in`."""

    @property
    def name(self) -> str:
        return attempt_name(self.trial_id, self.attempt)


def attempt_name(trial_id: str, attempt: int) -> str:
    """`t0007-2`: of its folder, and of the owner of its services."""
    return f"{trial_id}-{attempt}"


def train_recorded(
    config: RunConfig, attempt: Attempt, *, on_report: Any, rank: int = 0, world_size: int = 1
) -> dict[str, Any]:
    """Run the loop; returns its `RunResult` as a dictionary, with `started_at` (epoch seconds) and `train_seconds`."""
    started_at, started = time.time(), time.monotonic()
    if attempt.plugins:
        search_in(**attempt.plugins)
    recorder = _recorder(config, attempt) if rank == 0 else None
    saved = storage_path(attempt.start_from).on_disk() if attempt.start_from else contextlib.nullcontext()
    try:
        with saved as start_from:
            result = pkgutil.resolve_name(attempt.loop)(
                config,
                recorder=recorder,
                on_report=on_report,
                start_from=start_from,
                rank=rank,
                world_size=world_size,
                services=Services(owner=attempt.name, rank=rank, gpu_fraction=attempt.gpu_fraction),
            )
    finally:
        if isinstance(recorder, WandbRecorder):
            recorder.close()
    return {**dataclasses.asdict(result), "started_at": started_at, "train_seconds": time.monotonic() - started}


def _recorder(config: RunConfig, attempt: Attempt) -> Any:
    """Writer of the tables, wrapped by one for W&B when the configuration enables it."""
    folder, study, trial_id = storage_path(attempt.study_folder), attempt.study, attempt.trial_id
    fence = Fence(folder, attempt.generation)
    tables = TrialRecorder(folder, study=study, trial_id=trial_id, attempt=attempt.attempt, fence=fence)
    if config.tracking.wandb == "off":
        return tables
    if folder.local is None:
        folder.local_dir.mkdir(parents=True, exist_ok=True)
    # Studies of one name differ in their time of creation.
    record, _ = read_mapping(folder / "study.yaml")
    created = hashlib.sha256(str((record or {}).get("created_at")).encode()).hexdigest()[:8]
    run_id = f"{study}-{trial_id}-{created}"
    return WandbRecorder(tables, config, study=study, run_id=run_id, label=attempt.label, folder=folder.local_dir)


@dataclasses.dataclass(frozen=True)
class Services:
    """What its study gives one worker of a trial: backends as configured, which may be shared actors; part of a GPU.

    Ray is imported only for those that need it.
    """

    owner: str
    """Trial and attempt."""
    rank: int = 0
    gpu_fraction: float = 1.0

    def rollouts(self, config: RunConfig, device: torch.device) -> RolloutBackend:
        """The backend that training samples from; evaluation has its own, whose noise is the same for all models."""
        if not config.uses_engine:
            from ebft_study.rollouts.strided import StridedRollouts

            return StridedRollouts(config.training.attention)
        from ebft_study.networks.loading import source_of
        from ebft_study.rollouts import vllm

        shared = config.vllm.engine_scope == "study"
        options = vllm.options_of(config, source=source_of(config.model), device=device)
        return vllm.VllmRollouts(
            options,
            policy=self.owner,
            engine_name=vllm.shared_name(options) if shared else f"engine-{self.owner}",
            shared=shared,
            sync_every_steps=config.rollout.sync_every_steps,
            timeout_seconds=config.vllm.engine_timeout_seconds,
            rank=self.rank,
        )

    def networks(self, config: RunConfig, base: LoadedModel) -> tuple[FeatureBackend, FeatureBackend | None]:
        """The backend that training and evaluation embed with, and the judge.

        A judge is in the service only where the service has its network already.
        """
        from ebft_study.features.local import load_judge, load_networks

        if config.features.backend != "service":
            return load_networks(config, base)
        from ebft_study.features import NetworkOptions
        from ebft_study.features.keys import FeatureSpec
        from ebft_study.features.service import ServiceFeatures

        options = NetworkOptions.from_config(config, device=next(base.model.parameters()).device)
        seconds = config.features.service_timeout_seconds
        judge: FeatureBackend | None = load_judge(config, base)
        if config.judge_is_feature_network:
            judge = ServiceFeatures(options, FeatureSpec.of_judge(config), timeout_seconds=seconds)
        return ServiceFeatures(options, FeatureSpec.from_config(config), timeout_seconds=seconds), judge
