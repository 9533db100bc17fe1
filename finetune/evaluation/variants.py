"""The variants of a model that are compared: their names in tables, and how to load each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from torch import nn

from finetune.config.command_options import EvalOptions
from finetune.config.schema import Dtype, ModelConfig, QuantConfig, RunConfig
from finetune.distill.resident import load_resident
from finetune.evaluation.gap_table import Variant
from finetune.evaluation.generation import dequantize_once
from finetune.evaluation.metrics import Metric, find_metric
from finetune.evaluation.options import contradictions, find_source
from finetune.models.adapters.files import load_adapter
from finetune.models.adapters.trained import find_trained
from finetune.models.fused import fuse_layers
from finetune.models.hub import TEXT_FILES, WEIGHT_FILES, fetch, read_config
from finetune.models.load import default_device, load_base
from finetune.system.console import Log
from finetune.system.errors import ConfigError

VARIANTS: tuple[Variant, ...] = ("base", "quantized", "trained", "merged")
_SHORT: dict[str, str] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Variants:
    """The models to compare.

    adapter: its folder; None for a model alone. cfg: config of the adapter's run; None if it has none.
    model: the base, or the model alone, in its own dtype. quant: of the quantized base.
    variants: in the order of the table.
    """

    adapter: Path | None
    cfg: RunConfig | None
    model: ModelConfig
    quant: QuantConfig
    variants: tuple[Variant, ...]

    def name(self, variant: Variant) -> str:
        """Return the name of a variant in tables: bf16 base, NF4 base, NF4 + adapter, merged."""
        plain = _SHORT[self.model.dtype]
        stored = "mixed" if self.quant.int8 else self.quant.type.upper()
        what = "model" if self.adapter is None else "base"
        return {
            "base": f"{plain} {what}",
            "quantized": f"{stored} {what}",
            "trained": f"{plain if self.quant.type == 'none' else stored} + adapter",
            "merged": "merged",
        }[variant]

    def load(self, variant: Variant, merged: Path, log: Log) -> nn.Module:
        """Load a variant, frozen, in evaluation mode, on this machine's device. merged: folder of the merged model."""
        device = default_device()
        if variant == "base":
            return load_resident(self.model, None, device).model
        if variant == "merged":
            return load_resident(ModelConfig(name=str(merged), dtype=own_dtype(str(merged))), None, device).model
        model: nn.Module = load_base(self.model, self.quant, device, log)
        if variant == "trained":
            assert self.adapter is not None, "only an adapter is trained"
            model = load_adapter(model, self.adapter)  # type: ignore[arg-type]
        fuse_layers(model)
        dequantize_once(model, self.quant)
        return model.eval()


def find_variants(options: EvalOptions, log: Log) -> Variants:
    """Find the models named in the options, reading only text files and an adapter.

    Raises: ConfigError if a variant does not exist.
    """
    if options.adapter is not None:
        trained = find_trained([options.adapter], None, log)
        found = Variants(trained.adapters[0].folder, trained.cfg, trained.model, trained.quant, ())
    else:
        name = str(options.model)
        find_source(options)
        fetch(name, None, TEXT_FILES + WEIGHT_FILES, "model")
        found = Variants(None, None, ModelConfig(name=name, dtype=own_dtype(name)), QuantConfig(type="none"), ())
    quant = found.quant
    if options.quant is not None:
        quant = quant.model_copy(update={"type": options.quant, "int8": []})
    exists = {"base": True, "quantized": quant.type != "none", "trained": found.adapter, "merged": found.adapter}
    available = [variant for variant in VARIANTS if exists[variant]]
    wanted = options.variants or available
    if unknown := [variant for variant in wanted if variant not in available]:
        raise ConfigError(f"variants: found {', '.join(unknown)}, but only {', '.join(available)} exist here")
    return replace(found, quant=quant, variants=tuple(variant for variant in available if variant in wanted))


def own_dtype(name: str) -> Dtype:
    """Return the dtype in a model's config.json; bfloat16 if it has none, or one without compute kernels."""
    config = read_config(fetch(name, None, TEXT_FILES, "model").folder, name)
    named = config.get("dtype") or config.get("torch_dtype")
    return cast(Dtype, named) if named in _SHORT else "bfloat16"


def check_options(options: EvalOptions) -> Metric:
    """Return the metric. Raises: ConfigError with the contradictions between options, one per line."""
    problems, metric = list(contradictions(options)), None
    try:
        metric = find_metric(options.metric, options.pattern)
    except ConfigError as error:
        problems.append(str(error))
    if problems or metric is None:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return metric
