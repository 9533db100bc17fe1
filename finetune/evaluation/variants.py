"""The models that are compared: which there are, what tables call them, and how each is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import nn

from finetune.config.command_options import EvalOptions
from finetune.config.schema import Dtype, ModelConfig, QuantConfig, RunConfig
from finetune.distill.resident import load_resident
from finetune.evaluation.decoding import dequantize_once
from finetune.evaluation.gap_table import Variant
from finetune.models.adapters.files import CONFIG_FILE, load_adapter
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
    """What is compared.

    adapter: its folder, None for a model alone. cfg: of the adapter's run, None without one. model: the base, or that
    model, in its own type. quant: of the quantized base. variants: in the order of the table. names: what tables call
    them.
    """

    adapter: Path | None
    cfg: RunConfig | None
    model: ModelConfig
    quant: QuantConfig
    variants: tuple[Variant, ...]

    def name(self, variant: Variant) -> str:
        """What tables call a variant: bf16 base, NF4 base, NF4 + adapter, merged."""
        plain = _SHORT[self.model.dtype]
        stored = "mixed" if self.quant.int8 else self.quant.type.upper()
        what = "model" if self.adapter is None else "base"
        return {
            "base": f"{plain} {what}",
            "quantized": f"{stored} {what}",
            "trained": f"{plain if self.quant.type == 'none' else stored} + adapter",
            "merged": "merged",
        }[variant]

    def load(self, variant: Variant, merged: Path | None, log: Log) -> nn.Module:
        """The model, frozen, in evaluation mode, on this machine's device. merged: the folder of the merged one.

        Raises: as `load_base` and `load_adapter`.
        """
        device = default_device()
        if variant == "base":
            return load_resident(self.model, None, device).model
        if variant == "merged":
            assert merged is not None, "whoever asks for it has merged it"
            return load_resident(ModelConfig(name=str(merged), dtype=own_dtype(str(merged))), None, device).model
        model: nn.Module = load_base(self.model, self.quant, device, log)
        if variant == "trained":
            assert self.adapter is not None, "without an adapter nothing is trained"
            model = load_adapter(model, self.adapter)  # type: ignore[arg-type]
        fuse_layers(model)
        dequantize_once(model, self.quant)
        return model.eval()


def find_variants(options: EvalOptions, log: Log) -> Variants:
    """The models that the options name. Nothing but text files and an adapter is read.

    Raises: ConfigError for variants that there are not; what fetching and reading raise.
    """
    if options.adapter is not None:
        trained = find_trained([options.adapter], None, log)
        found = Variants(trained.adapters[0].folder, trained.cfg, trained.model, trained.quant, ())
    else:
        assert options.model is not None
        _check_no_adapter(options.model)
        found = Variants(None, None, _own_model(options.model), QuantConfig(type="none"), ())
    quant = found.quant
    if options.quant is not None:
        quant = quant.model_copy(update={"type": options.quant, "int8": []})
    there = [variant for variant in VARIANTS if _exists(variant, found.adapter is not None, quant)]
    wanted = options.variants or there
    if lost := [variant for variant in wanted if variant not in there]:
        raise ConfigError(f"variants: {', '.join(lost)}: not among what there is here, {', '.join(there)}")
    chosen = tuple(variant for variant in there if variant in wanted)
    return Variants(found.adapter, found.cfg, found.model, quant, chosen)


def own_dtype(name: str, revision: str | None = None) -> Dtype:
    """The type that a model's config.json names; bfloat16 where it names none, or one that cannot be computed in."""
    config = read_config(fetch(name, revision, TEXT_FILES, "model").folder, name)
    named = config.get("dtype") or config.get("torch_dtype")
    return cast(Dtype, named) if named in _SHORT else "bfloat16"


def contradictions(options: EvalOptions) -> list[str]:
    """What the options cannot mean together."""
    problems = []
    if (options.adapter is None) == (options.model is None):
        both = "both are given" if options.adapter is not None else "neither is given"
        problems.append(f"adapter, model: {both}; name an adapter (its base comes with it), or a model alone")
    if options.model is not None and options.data is None and not options.tasks:
        problems.append("data: is missing: a model alone has no run to take rows from; 'data=[{path: rows.jsonl}]'")
    if options.merged is not None and options.adapter is None:
        problems.append("merged: is compared with an adapter; for a merged model alone, model=DIR")
    if options.merged is not None and options.variants is not None and "merged" not in options.variants:
        problems.append("merged: is not among variants; add it there, or drop merged=")
    return problems


def _exists(variant: Variant, adapter: bool, quant: QuantConfig) -> bool:
    return {"base": True, "quantized": quant.type != "none", "trained": adapter, "merged": adapter}[variant]


def _check_no_adapter(name: str) -> None:
    folder = Path(name).expanduser()
    if (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file():
        raise ConfigError(f"model={name}: is an adapter; write adapter={name}")


def _own_model(name: str) -> ModelConfig:
    fetch(name, None, TEXT_FILES + WEIGHT_FILES, "model")
    return ModelConfig(name=name, dtype=own_dtype(name))
