"""Write and read checkpoints that are complete or absent: safetensors and JSON under a SHA-256 manifest, no pickle.

A checkpoint folder is a PEFT adapter folder with three more files:

- `training.safetensors`: value and optimizer state of every trained parameter, by name
- `state.json`: counters
- `manifest.json`: size and SHA-256 of every other file, and of its own entries

It is written under a temporary name, fsynced, then renamed: the rename is the commit. A resumed run reads
`training.safetensors`, which is exact for every kind of adapter; the adapter files are for other programs.

There is no random state to store: the loop seeds every generator from (seed, step, rank) at the start of each step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Parameter

from finetune.models.adapters.folder import list_checkpoints
from finetune.models.safetensors_index import save_tensors
from finetune.system.accelerator import on_gpu
from finetune.system.atomic import commit_folder
from finetune.system.console import Log
from finetune.system.errors import FinetuneError, IntegrityError, os_errors_as
from finetune.system.manifest import MANIFEST, differences, read_manifest, record_files

TRAINING, STATE = "training.safetensors", "state.json"
_TEMPORARY = ".incomplete-"
# Advice for a full disk.
FULL_DISK = "free space and continue with train.resume=auto; earlier checkpoints are valid"
# The state of a parameter in torch's AdamW, in AdamW of bitsandbytes and in its Lion; the latter two keep small ones
# in 32 bits.
_TORCH_STATES = ({"step", "exp_avg", "exp_avg_sq"},)
_TWO_MOMENTS = ({"step", "state1", "state2"}, {"step", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"})
_ONE_MOMENT = ({"step", "state1"}, {"step", "state1", "qmap1", "absmax1"})


@dataclass
class TrainState:
    """The state of a run apart from its adapter and optimizer.

    Attributes:
        trajectory: settings that decide the run's result, by dotted key.
        data_digest: SHA-256 of the training tokens and labels.
        choices: what the run chose by itself and its last bits depend on; see recipe.py.
        step: optimizer steps done.
        tokens: all tokens so far, over all ranks; target_tokens likewise.
        seconds: training time so far.
        best_step: step of the evaluation with the lowest `eval_loss`, which is best_loss.
        evaluations_since_best: for early stopping.
        evaluations: figures of the latest evaluation.
        before: answers and figures of the untrained model.
        breaches: entries of guard.py, one for each evaluation beyond `guard.max`.
        halvings: steps that were repeated because memory ran out, each with its new `micro_batch`.
    """

    trajectory: dict[str, Any]
    data_digest: str
    choices: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    tokens: int = 0
    target_tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None
    evaluations_since_best: int = 0
    last_loss: float | None = None
    evaluations: dict[str, float] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)
    breaches: list[dict[str, Any]] = field(default_factory=list)
    halvings: list[dict[str, int]] = field(default_factory=list)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder, then rename it to `folder`."""
    temporary = folder.with_name(_TEMPORARY + folder.name)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with os_errors_as(FinetuneError, f"{folder}: cannot be written", FULL_DISK):
            temporary.mkdir(parents=True)
            write(temporary)
            commit_folder(temporary, folder)
    except FinetuneError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_checkpoint(
    folder: Path, write_adapter: Callable[[Path], None], optimizer: torch.optim.Optimizer, state: TrainState
) -> None:
    """Write one checkpoint. A crash at any moment leaves it absent."""

    def write(temporary: Path) -> None:
        write_adapter(temporary)
        save_tensors(training_tensors(optimizer), temporary / TRAINING)
        (temporary / STATE).write_text(json.dumps(asdict(state), indent=2))
        record_files(temporary, [file.name for file in temporary.iterdir()])

    write_folder(folder, write)


def verify_checkpoint(folder: Path) -> None:
    """Compare every file with the manifest. Raises: IntegrityError naming each missing or corrupt file."""
    problems = differences(folder)
    if missing := {TRAINING, STATE} - read_manifest(folder).keys():
        problems.append(f"{MANIFEST} lists no {', '.join(sorted(missing))}")
    if problems:
        raise IntegrityError(f"{folder}: {'; '.join(problems)}")


def newest_valid(run: Path, warn: Log) -> Path | None:
    """Return the newest checkpoint that passes its manifest. Each newer, corrupt one is named through `warn`."""
    for folder in reversed(list_checkpoints(run)):
        try:
            verify_checkpoint(folder)
            return folder
        except IntegrityError as error:
            warn(f"{error}; trying the checkpoint before it")
    return None


def read_state(folder: Path) -> TrainState:
    """Read the state of a verified checkpoint."""
    try:
        return TrainState(**json.loads((folder / STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise IntegrityError(f"{folder / STATE} not a state of this version: {error}") from error


def training_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return every trained parameter and its optimizer state, as `NAME/value`, `NAME/step`, `NAME/exp_avg` …"""
    tensors = {
        f"{name}/{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for name, parameter in _named(optimizer)
        for key, value in {"value": parameter, **optimizer.state[parameter]}.items()
    }
    # 8-bit states share their small tables, and safetensors stores no tensor twice.
    return {key: tensor.clone() if "/qmap" in key else tensor for key, tensor in tensors.items()}


def load_training(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Restore saved parameters and optimizer states bit for bit."""
    saved: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / TRAINING).items():
        name, _, part = key.rpartition("/")
        saved.setdefault(name, {})[part] = tensor
    wanted = dict(_named(optimizer))
    unfit = [name for name, parameter in wanted.items() if not _fits(saved.get(name, {}), parameter, optimizer)]
    if problems := [*unfit, *sorted(saved.keys() - wanted.keys())]:
        raise IntegrityError(f"{folder / TRAINING} does not fit this run's parameters: {', '.join(problems[:5])}")
    for name, parameter in wanted.items():
        parameter.data.copy_(saved[name].pop("value"))
        optimizer.state[parameter] = {
            key: _restored(key, tensor, parameter, optimizer) for key, tensor in saved[name].items()
        }


def _fits(tensors: dict[str, Tensor], parameter: Parameter, optimizer: torch.optim.Optimizer) -> bool:
    states = _TORCH_STATES
    if not isinstance(optimizer, torch.optim.AdamW):
        from bitsandbytes.optim.optimizer import Optimizer1State

        states = _ONE_MOMENT if isinstance(optimizer, Optimizer1State) else _TWO_MOMENTS
    moments = ("value", "exp_avg", "exp_avg_sq", "state1", "state2")
    return tensors.keys() - {"value"} in states and all(
        tensors[key].shape == parameter.shape for key in moments if key in tensors
    )


def _restored(key: str, tensor: Tensor, parameter: Parameter, optimizer: torch.optim.Optimizer) -> Tensor | int:
    """Return a part of the state as its optimizer keeps it."""
    if isinstance(optimizer, torch.optim.AdamW):
        on_device = key != "step" or optimizer.defaults["fused"]
        return tensor.to(parameter.device) if on_device else tensor
    if key == "step":
        return int(tensor)
    if getattr(optimizer, "is_paged", False) and key in ("state1", "state2") and on_gpu(parameter):
        return optimizer.get_state_buffer(parameter, dtype=tensor.dtype).copy_(tensor)  # type: ignore[attr-defined]
    return tensor.to(parameter.device)


def _named(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Parameter]]:
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)


def prune_checkpoints(run: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best one, and leftovers of interrupted writes."""
    for folder in list_checkpoints(run)[:-keep]:
        if folder.name != f"checkpoint-{best_step}":
            # Rename first: an interrupted deletion must not leave half a checkpoint under its own name.
            doomed = folder.with_name(_TEMPORARY + folder.name)
            shutil.rmtree(doomed, ignore_errors=True)
            folder.rename(doomed)
    for leftover in run.glob(f"{_TEMPORARY}checkpoint-*"):
        shutil.rmtree(leftover, ignore_errors=True)
