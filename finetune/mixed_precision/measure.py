"""Measure the sensitivity of each layer and write a folder with every value, a table and a picture."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from finetune.config.command_options import SensitivityOptions
from finetune.config.schema import RunConfig
from finetune.data.batch import Batch, build_batch, groups_of
from finetune.data.documents import Documents
from finetune.data.loader import load_chat_template, load_data
from finetune.data.tokens.prepare import Preparation, console_progress
from finetune.distill.fingerprint import teacher_weights
from finetune.mixed_precision.journal import SENSITIVITY_VERSION, Journal, Sensitivities
from finetune.mixed_precision.layerwise import LayerwiseModel
from finetune.mixed_precision.sensitivity import Sensitivity
from finetune.mixed_precision.summary import write_summary
from finetune.models.load import default_device
from finetune.models.tokenizer import extend_tokenizer, load_tokenizer
from finetune.system.console import Log
from finetune.system.format import format_duration
from finetune.system.machine import use_all_cores

_LOG_EVERY_SECONDS = 10.0
# In smaller batches, reading a layer's weights takes longer than the products with them.
_LEAST_BATCH_TOKENS = 2048


def measure_sensitivity(cfg: RunConfig, options: SensitivityOptions, log: Log) -> Sensitivities:
    """Measure every linear layer that `options.out` does not hold yet, and write that folder.

    Raises:
        ConfigError: the folder holds something else.
        FinetuneError: as loading the model and the rows.
    """
    kinds = ["nf4", "int8"] if options.type == "both" else [options.type]
    documents = sample(load_rows(cfg, log)[0], options.rows)
    made_from = {
        "version": SENSITIVITY_VERSION,
        "weights": teacher_weights(cfg.model),
        "rows": documents.digest(),
        "kinds": kinds,
        "double": cfg.quant.double,
        "compute_dtype": cfg.quant.compute_dtype,
        "dtype": cfg.model.dtype,
    }
    journal = Journal(Path(options.out).expanduser(), made_from)
    model = LayerwiseModel(cfg.model, cfg.quant, working_device())
    count = (1 + len(model.linears)) * len(kinds)
    if journal.measured:
        log(f"sensitivity: resumed={journal.folder}, measured={len(journal.measured)}/{count}")
    began = logged = time.monotonic()
    sensitivity = Sensitivity(model, batches_of(documents, cfg.data.max_length))
    for found in sensitivity.measure(kinds, journal.measured):
        journal.append(found)
        now = time.monotonic()
        if now - logged >= _LOG_EVERY_SECONDS:
            logged = now
            left = format_duration((now - began) * (1 - sensitivity.share) / sensitivity.share)
            log(f"sensitivity: measured={len(journal.measured)}/{count}, time_left={left}")
    result = Sensitivities(cfg.model.name, kinds, len(documents), dict(model.linears), journal.measured, made_from)
    result.save(journal.folder)
    write_summary(result, journal.folder, cfg.quant.double, cfg.model.dtype)
    return result


def working_device() -> torch.device:
    """Return this machine's device, and set the number of threads on a CPU."""
    device = default_device()
    use_all_cores(device.type)
    return device


def load_rows(cfg: RunConfig, log: Log) -> tuple[Documents, Documents]:
    """Load the training documents and the held-out documents (possibly none) of a run's config."""
    tokenizer = load_tokenizer(cfg.model)
    extend_tokenizer(tokenizer, cfg.lora.new_tokens)
    chat = load_chat_template(cfg.data, tokenizer)
    # A stream is read to its end: the beginning is not a sample of all its rows.
    whole = cfg.data.model_copy(update={"stream_rows": None})
    data = load_data(Preparation(whole, chat, progress=console_progress(log)))
    held_out = [source.documents for source in data.eval]
    return data.documents, Documents.join(held_out) if held_out else data.documents[:0]


def sample(documents: Documents, rows: int) -> Documents:
    """Select at most `rows` documents, evenly spaced."""
    places = np.linspace(0, len(documents) - 1, min(rows, len(documents)))
    return documents.select(np.unique(places.round().astype(int)))


def batches_of(documents: Documents, max_length: int) -> Sequence[Batch]:
    """Build batches with only the tokens that the documents' targets need."""
    groups = groups_of(documents, max(_LEAST_BATCH_TOKENS, max_length))
    return [build_batch(group, share_prefixes=True) for group in groups]
