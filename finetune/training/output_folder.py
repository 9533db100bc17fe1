"""The folder of a run and its lock, and the checks of a run that need no torch."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from itertools import chain, count
from pathlib import Path

from finetune.config.schema import RunConfig
from finetune.models.adapters.folder import find_adapter, list_checkpoints
from finetune.models.families import shape_of
from finetune.models.families.family import LINEARS
from finetune.models.hub import check_model, check_window, find_texts, read_config
from finetune.models.module_matching import absent_modules
from finetune.planning.static_memory import module_names
from finetune.report.run import ADAPTER
from finetune.system.errors import ConfigError, os_errors_as
from finetune.system.locks import Lock, try_lock


def check_run(cfg: RunConfig) -> None:
    """Check the folders, the model, the first adapter and the names of modules of a run, before torch is imported.

    Raises:
        ConfigError: the folder holds a run, or a checkpoint, model, adapter or module is not found.
        IntegrityError: a local weight file is corrupt.
    """
    if is_given(cfg):
        refuse_other_run(cfg)
    check_resume(cfg)
    check_model(cfg.model)
    if cfg.model.attention in ("auto", "segmented"):
        folder = find_texts(cfg.model.name, cfg.model.revision, "model.name").folder
        check_window(read_config(folder, cfg.model.name), cfg.model.name, cfg.data.max_length, "data.max_length")
    if cfg.lora.init_adapter is not None:
        find_adapter(cfg.lora.init_adapter, "lora.init_adapter")
    if (shape := shape_of(cfg.model.name)) is not None:
        problems = absent_modules(cfg.lora, module_names(shape), LINEARS, shape["num_hidden_layers"])
        if text := "\n".join(problems):
            raise ConfigError(text)


def refuse_other_run(cfg: RunConfig) -> None:
    """Raise ConfigError if the folder holds a run that this one does not continue."""
    folder = Path(cfg.output_dir)
    if cfg.train.resume == "never" and holds_run(folder):
        raise ConfigError(
            f"output_dir: {folder} already holds a run\n"
            "help: set train.resume=auto to continue it, or another output_dir"
        )


def check_resume(cfg: RunConfig) -> None:
    """Raise ConfigError if `train.resume` names a folder that does not exist."""
    if cfg.train.resume not in ("auto", "never") and not Path(cfg.train.resume).is_dir():
        known = ", ".join(str(place) for place in list_checkpoints(Path(cfg.output_dir))) or "none"
        raise ConfigError(
            f"train.resume: not a folder, found {cfg.train.resume}\n"
            f"help: set auto, never or a checkpoint; existing: {known}"
        )


def is_given(cfg: RunConfig) -> bool:
    """Return whether the user chose the folder of a run."""
    return "output_dir" in cfg.model_fields_set


def choose_folder(cfg: RunConfig) -> str:
    """Return the folder of a run: `output_dir` if it is given, else outputs/NAME, outputs/NAME-2 … for new runs.

    Without a given folder, `train.resume=auto` continues the run that outputs/NAME-latest links to, and a checkpoint of
    one of these folders continues there.
    """
    folder = Path(cfg.output_dir)
    if is_given(cfg):
        return cfg.output_dir
    if cfg.train.resume == "auto":
        latest = _latest(folder)
        return str(latest.with_name(os.readlink(latest)) if latest.is_symlink() and latest.is_dir() else folder)
    if cfg.train.resume != "never":
        parent = Path(cfg.train.resume).parent
        is_ours = parent.parent == folder.parent and re.fullmatch(rf"{re.escape(folder.name)}-\d+", parent.name)
        return str(parent if is_ours else folder)
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return next(str(place) for place in chain([folder], numbered) if not holds_run(place))


def link_latest(cfg: RunConfig, folder: str) -> None:
    """Let outputs/NAME-latest link to the folder of a run, if the user did not choose it."""
    latest = _latest(Path(cfg.output_dir))
    temporary = latest.with_name(f".{latest.name}.{os.getpid()}")
    # Some file systems have no links, and a folder of this name is the user's: the run goes on without a link.
    if not is_given(cfg):
        with suppress(OSError):
            temporary.symlink_to(Path(folder).name)
            os.replace(temporary, latest)
        temporary.unlink(missing_ok=True)


def _latest(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-latest")


def holds_run(folder: Path) -> bool:
    """Return whether a folder has an adapter or a checkpoint."""
    return (folder / ADAPTER).exists() or bool(list_checkpoints(folder))


def claim_folder(cfg: RunConfig) -> Lock:
    """Create and lock the run's folder. The lock ends with `release()` or with the process."""
    folder = Path(cfg.output_dir)
    with os_errors_as(ConfigError, f"output_dir: {folder} cannot be written to"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = try_lock(folder / ".lock")
    if lock is None:
        raise ConfigError(
            f"output_dir: another process is training into {folder}\nhelp: wait for it, or set another output_dir"
        )
    try:
        refuse_other_run(cfg)
    except ConfigError:
        lock.release()
        raise
    return lock


def release_folder(lock: Lock) -> None:
    """Unlock a run's folder, and remove it if it is empty."""
    path = Path(lock.lock_file)
    with suppress(OSError):  # the folder is gone, or its disk failed
        if [file.name for file in path.parent.iterdir()] == [path.name]:
            path.unlink()
            path.parent.rmdir()
    lock.release()
