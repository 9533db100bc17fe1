"""`finetune sensitivity` from a config to a folder that holds every figure, a table and a picture."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from finetune.config.command_options import SensitivityOptions
from finetune.config.schema import RunConfig
from finetune.distill.fingerprint import teacher_weights
from finetune.mixed_precision.examples import batches_of, load_rows, sample
from finetune.mixed_precision.journal import SENSITIVITY_VERSION, Journal, Sensitivities
from finetune.mixed_precision.layerwise import LayerwiseModel, four_bit_of
from finetune.mixed_precision.sensitivity import Sensitivity
from finetune.mixed_precision.summary import write_summary
from finetune.models.load import default_device
from finetune.system.console import Log
from finetune.system.machine import pick_threads, usable_cores

_SAY_EVERY_SECONDS = 10.0


def measure_sensitivity(cfg: RunConfig, options: SensitivityOptions, log: Log) -> Sensitivities:
    """Measure every linear layer, or what is left of it, and write the folder `options.out`.

    Raises: ConfigError for a folder that holds something else; what loading the model and the rows raises.
    """
    device = working_device()
    four_bit = options.type if options.type in ("nf4", "fp4") else four_bit_of(cfg.quant)
    kinds = [four_bit, "int8"] if options.type == "both" else [options.type]
    quant = cfg.quant.model_copy(update={"type": four_bit})
    documents = sample(load_rows(cfg, log)[0], options.rows)
    journal = Journal(
        Path(options.out).expanduser(),
        {
            "version": SENSITIVITY_VERSION,
            "weights": teacher_weights(cfg.model),
            "rows": documents.digest(),
            "kinds": kinds,
            "mode": options.mode,
            "double": quant.double,
            "compute_dtype": quant.compute_dtype,
            "dtype": cfg.model.dtype,
        },
    )
    model = LayerwiseModel(cfg.model, quant, device)
    count = (1 + len(model.linears)) * len(kinds)
    if journal.measured:
        log(f"{journal.folder}: {len(journal.measured)} of {count} are measured already")
    batches = batches_of(documents, cfg.data.max_length)
    watch = _Watch(log)
    for found in Sensitivity(model, batches, watch.progress).measure(kinds, options.mode, journal.measured):
        journal.append(found)
        watch.say_sometimes(f"{len(journal.measured)} of {count} measured")
    result = Sensitivities(
        cfg.model.name, options.mode, kinds, len(documents), dict(model.linears), journal.measured, journal.made_from
    )
    result.save(journal.folder)
    write_summary(result, journal.folder, quant.double, cfg.model.dtype)
    return result


def working_device() -> torch.device:
    """This machine's device, with as many threads as it is worth using on a CPU."""
    device = default_device()
    if device.type == "cpu" and (threads := pick_threads(os.environ, usable_cores())):
        torch.set_num_threads(threads)
    return device


class _Watch:
    """Says how far a measurement is and how long it will take, not too often."""

    def __init__(self, log: Log):
        self._say = log
        self._began = self._said = time.monotonic()
        self._share = 0.0

    def progress(self, done: int, total: int) -> None:
        self._share = done / total

    def say_sometimes(self, text: str) -> None:
        now = time.monotonic()
        if now - self._said >= _SAY_EVERY_SECONDS and self._share:
            self._said = now
            left_seconds = (now - self._began) * (1 - self._share) / self._share
            self._say(f"{text}, about {_duration(left_seconds)} left")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
