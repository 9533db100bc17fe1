"""Fine-tune Qwen2.5 models in 4-bit: from a YAML file to a trained QLoRA adapter.

The steps of a run, for notebooks:

    from finetune import attach_lora, load_base, load_config, load_tokenizer, train
    from finetune import ExportOptions, MergeOptions, export_model, merge
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING

from finetune.system.other_finetune import ADVICE, other_distribution

if TYPE_CHECKING:
    from finetune.config.command_options import ExportOptions as ExportOptions
    from finetune.config.command_options import MergeOptions as MergeOptions
    from finetune.config.compose import load_config as load_config
    from finetune.export.export import export_model as export_model
    from finetune.export.merge.merge import merge as merge
    from finetune.models.adapters.attach import attach_lora as attach_lora
    from finetune.models.fused import fuse_layers as fuse_layers
    from finetune.models.load import load_base as load_base
    from finetune.models.tokenizer import load_tokenizer as load_tokenizer
    from finetune.training.recipe import train as train

__version__ = "0.1.0"
# Loaded on first use: importing finetune imports no torch.
_HOMES = {
    "ExportOptions": "finetune.config.command_options",
    "MergeOptions": "finetune.config.command_options",
    "attach_lora": "finetune.models.adapters.attach",
    "export_model": "finetune.export.export",
    "fuse_layers": "finetune.models.fused",
    "load_base": "finetune.models.load",
    "load_config": "finetune.config.compose",
    "load_tokenizer": "finetune.models.tokenizer",
    "merge": "finetune.export.merge.merge",
    "train": "finetune.training.recipe",
}
__all__ = ["__version__", *_HOMES]

if found := other_distribution():
    warnings.warn(f"{found}\nhelp: {ADVICE}", stacklevel=2)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from finetune.system.libraries import configure_libraries

    configure_libraries()
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
