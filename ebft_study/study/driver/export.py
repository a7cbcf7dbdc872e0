"""A trial's trained model as a Hugging Face folder with a model card, written here and put on a hub if wanted."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ebft_study import results
from ebft_study.analysis import selection
from ebft_study.analysis.summary import StudySummary, summarize
from ebft_study.errors import ConfigError, ResultsError, StorageError, one_line
from ebft_study.report.model_card import card
from ebft_study.storage import StoragePath
from ebft_study.study.driver import trained

BEST = "best"


@dataclass(frozen=True)
class Exported:
    """A model that was written to `folder`."""

    folder: Path
    trial_id: str
    label: str
    step: int
    url: str = ""
    """Of the repository on the hub that it was put into."""

    def in_words(self) -> str:
        where = f", and at {self.url}" if self.url else ""
        return f"{self.trial_id} ({self.label}), step {self.step}: {self.folder}{where}"


def export(
    folder: StoragePath,
    trial: str,
    *,
    to: Path,
    checkpoint: str = "last",
    merge: bool = False,
    push: str | None = None,
) -> Exported:
    """Write a trial's model; see `api.export`."""
    from ebft_study.training.export import write_model

    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"command line: --to {to}: is there already. Give a new folder, or remove it")
    study = results.load(folder)
    summary = summarize(study)
    model = trained.trained_model(study, best_trial(summary) if trial == BEST else trial, checkpoint)
    trained.check_base(study, model.run)
    has_adapters = model.run.lora.lora_rank > 0
    if merge and not has_adapters:
        raise ConfigError(f"command line: --merge: trial {model.trial_id} has no adapters. Drop it")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}-") as temporary:
            written = Path(temporary) / to.name
            written.mkdir()
            with model.checkpoint.on_disk() as saved:
                step = write_model(model.run, saved, written, merge=merge)
            card(summary, model.trial_id, model.run, step, is_adapter=has_adapters and not merge).save(
                written / "README.md"
            )
            if to.exists():
                to.rmdir()
            shutil.move(written, to)
    except OSError as error:
        raise StorageError(f"{to}: cannot be written ({one_line(error)}). Give another folder") from error
    return Exported(to, model.trial_id, model.label, step, _push(to, push) if push else "")


def best_trial(study: StudySummary) -> str:
    """The trial of the best configuration by the mean over seeds of the validation objective, at its best seed.

    Raises:
        ResultsError: nothing has finished, or configurations cannot be compared.
    """
    row = selection.best_trial(study.configurations)
    if row is None:
        raise ResultsError(
            f"{study.name}: no configuration is the best by {study.objective[0]}. Name a trial: see its report"
        )
    return str(row["trial_id"])


def _push(folder: Path, name: str) -> str:
    """Put the folder into a private repository of the hub; returns its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    hub = HfApi()
    try:
        address = hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder)
    except (OSError, HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as error:
        raise ConfigError(
            f"command line: --push {name}: the hub took nothing ({one_line(error)}). The model is in {folder}: log in "
            "with 'hf auth login', or upload it from there"
        ) from error
    return str(address)
