"""The folder of a run and its lock, and the checks of a run that need no torch."""

from __future__ import annotations

from pathlib import Path

from finetune.config.schema import RunConfig
from finetune.models.adapters.folder import find_adapter, list_checkpoints
from finetune.models.families import shape_of
from finetune.models.hub import check_model
from finetune.models.module_matching import absent_modules
from finetune.planning.static_memory import LINEARS, module_names
from finetune.report.run import ADAPTER
from finetune.system.errors import ConfigError
from finetune.system.locks import Lock, try_lock


def check_run(cfg: RunConfig) -> None:
    """Check the folder, the model, the first adapter and the names of modules of a run, before torch is imported.

    Raises:
        ConfigError: the folder holds a run, the model or adapter is not found, or the model has no such modules.
        IntegrityError: a local weight file is corrupt.
    """
    refuse_other_run(cfg)
    check_model(cfg.model)
    if cfg.lora.init_adapter is not None:
        find_adapter(cfg.lora.init_adapter, "lora.init_adapter")
    if (shape := shape_of(cfg.model.name)) is not None:
        problems = absent_modules(cfg.lora, module_names(shape), LINEARS, shape["num_hidden_layers"])
        if text := "\n".join(problems):
            raise ConfigError(text)


def refuse_other_run(cfg: RunConfig) -> None:
    """Raise ConfigError if the folder holds a run that this one does not continue."""
    folder = Path(cfg.output_dir)
    if cfg.train.resume == "never" and ((folder / ADAPTER).exists() or list_checkpoints(folder)):
        raise ConfigError(
            f"output_dir: {folder} already holds a run\n"
            "help: set train.resume=auto to continue it, or another output_dir"
        )


def claim_folder(cfg: RunConfig) -> Lock:
    """Create and lock the run's folder. The lock ends with `release()` or with the process."""
    folder = Path(cfg.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = try_lock(folder / ".lock")
    except OSError as error:
        raise ConfigError(f"output_dir: {folder} cannot be written to: {error.strerror}") from error
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
    if [file.name for file in path.parent.iterdir()] == [path.name]:
        path.unlink()
        path.parent.rmdir()
    lock.release()
