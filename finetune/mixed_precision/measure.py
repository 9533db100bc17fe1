"""Measure the sensitivity of each layer and write a folder with every value, a table and a picture."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from finetune.config.command_options import SensitivityOptions
from finetune.config.schema import RunConfig
from finetune.distill.fingerprint import teacher_weights
from finetune.mixed_precision.examples import batches_of, load_rows, sample
from finetune.mixed_precision.journal import SENSITIVITY_VERSION, Journal, Sensitivities
from finetune.mixed_precision.layerwise import LayerwiseModel
from finetune.mixed_precision.sensitivity import Sensitivity
from finetune.mixed_precision.summary import write_summary
from finetune.models.load import default_device
from finetune.system.console import Log
from finetune.system.format import format_duration
from finetune.system.machine import use_all_cores

_LOG_EVERY_SECONDS = 10.0


def measure_sensitivity(cfg: RunConfig, options: SensitivityOptions, log: Log) -> Sensitivities:
    """Measure every linear layer that `options.out` does not hold yet, and write that folder.

    Raises:
        ConfigError: the folder holds something else.
        FinetuneError: as loading the model and the rows.
    """
    device = working_device()
    kinds = ["nf4", "int8"] if options.type == "both" else [options.type]
    quant = cfg.quant.model_copy(update={"type": "nf4"})
    documents = sample(load_rows(cfg, log)[0], options.rows)
    journal = Journal(
        Path(options.out).expanduser(),
        {
            "version": SENSITIVITY_VERSION,
            "weights": teacher_weights(cfg.model),
            "rows": documents.digest(),
            "kinds": kinds,
            "double": quant.double,
            "compute_dtype": quant.compute_dtype,
            "dtype": cfg.model.dtype,
        },
    )
    model = LayerwiseModel(cfg.model, quant, device)
    count = (1 + len(model.linears)) * len(kinds)
    if journal.measured:
        log(f"sensitivity: resumed={journal.folder}, measured={len(journal.measured)}/{count}")
    began = logged = time.monotonic()
    share = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal share
        share = done / total

    batches = batches_of(documents, cfg.data.max_length)
    for found in Sensitivity(model, batches, progress).measure(kinds, journal.measured):
        journal.append(found)
        now = time.monotonic()
        if now - logged >= _LOG_EVERY_SECONDS:
            logged = now
            left = format_duration((now - began) * (1 - share) / share)
            log(f"sensitivity: measured={len(journal.measured)}/{count}, time_left={left}")
    result = Sensitivities(
        cfg.model.name, kinds, len(documents), dict(model.linears), journal.measured, journal.made_from
    )
    result.save(journal.folder)
    write_summary(result, journal.folder, quant.double, cfg.model.dtype)
    return result


def working_device() -> torch.device:
    """Return this machine's device, and set the number of threads on a CPU."""
    device = default_device()
    use_all_cores(device.type)
    return device
