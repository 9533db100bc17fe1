"""Attach an adapter to a frozen base; copy its state out and back exactly."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import peft
import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.config.schema import LoraConfig
from finetune.models.adapters.files import fetch_adapter, load_weights
from finetune.models.adapters.inits import ADAPTER, INITS, freeze_a, initial_factors, initialize, measure_magnitudes
from finetune.models.adapters.targets import Targets, plan_targets
from finetune.models.decoder import family_in
from finetune.models.hub import WEIGHT_FILES, fetch, named_in_model, weight_files
from finetune.models.safetensors_index import read_tensor
from finetune.models.tokens import add_tokens, plan_token_ids
from finetune.system.errors import ConfigError, IntegrityError

_INITIAL = "initial."  # prefix of factors before the first step (PiSSA, OLoRA)


def attach_lora(model: PreTrainedModel, cfg: LoraConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> PeftModel:
    """Attach a trainable adapter, `default`, to a frozen base, in place. Trained weights are fp32 for every base.

    Args:
        model: the base, from `load_base`.
        cfg: `lora` of the config.
        tokenizer: required by `lora.new_tokens`, which are added to it.

    Raises:
        ConfigError: lists every problem, before model or tokenizer change.
        IntegrityError: `lora.init_adapter` is corrupt or contains NaN.
    """
    if isinstance(model, PeftModel):
        raise ConfigError("the model has an adapter already\nhelp: lora.init_adapter starts a new one from its files")
    targets = plan_targets(model, cfg)
    token_ids = plan_token_ids(model, tokenizer, cfg.new_tokens)
    start = None
    if cfg.init_adapter is not None:
        start = fetch_adapter(cfg.init_adapter)
        start.check_same_kind(
            base=str(model.name_or_path),
            ranks=targets.ranks,
            alpha=cfg.alpha,
            alpha_pattern=cfg.alpha_pattern,
            rslora=cfg.rslora,
            dora=cfg.dora,
            new_tokens=token_ids,
        )
    if tokenizer is not None and token_ids:
        add_tokens(model, tokenizer, cfg.new_tokens)
    config = _peft_config(model, cfg, targets, token_ids)
    with warnings.catch_warnings():
        # PEFT uses a name that transformers deprecates.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        peft_model = peft.get_peft_model(model, config, revision=getattr(model, "base_revision", None))
    _use_fp32_masters(peft_model)
    if cfg.init in INITS:
        initialize(peft_model, cfg.init, lambda name: _original_weight(model, name))
    if cfg.dora:
        measure_magnitudes(peft_model)
    if start is not None:
        load_weights(peft_model, start)
    if cfg.freeze_a:
        freeze_a(peft_model)
    return peft_model


def _peft_config(
    model: PreTrainedModel, cfg: LoraConfig, targets: Targets, token_ids: dict[str, list[int]]
) -> peft.LoraConfig:
    embedding_saved = any(name.endswith(("embed_tokens", "lm_head")) for name in targets.modules_to_save)
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=cfg.rank,
        lora_alpha=_whole(cfg.alpha),
        lora_dropout=cfg.dropout,
        target_modules=targets.spec,
        layers_to_transform=targets.layers,
        use_rslora=cfg.rslora,
        use_dora=cfg.dora,
        # Own inits follow later. A reloaded adapter must not be initialized again.
        init_lora_weights="gaussian" if cfg.init == "gaussian" else True,
        modules_to_save=targets.modules_to_save or None,
        rank_pattern=dict(cfg.rank_pattern),
        alpha_pattern={key: _whole(alpha) for key, alpha in cfg.alpha_pattern.items()},
        trainable_token_indices=token_ids or None,
        ensure_weight_tying=bool(model.config.tie_word_embeddings and embedding_saved),
    )


def _whole(alpha: float) -> Any:
    """Return 16.0 as 16: adapter_config.json must contain an integer for other readers."""
    return int(alpha) if alpha == int(alpha) else alpha


def _original_weight(model: PreTrainedModel, name: str) -> Tensor:
    """Read a module's weight from the base's files, before quantization."""
    base_name, tensor = str(model.name_or_path), f"{name}.weight"
    folder = fetch(base_name, getattr(model, "base_revision", None), WEIGHT_FILES, "model.name").folder
    return read_tensor(*named_in_model(weight_files(folder, base_name), family_in(model))[tensor])


class _Rounded(nn.Module):
    """A parametrization: forward uses the weight rounded to the base's dtype, the optimizer updates fp32."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, master: Tensor) -> Tensor:
        return master.to(self.dtype)


def _use_fp32_masters(model: PeftModel) -> None:
    """Store fully trained modules in fp32: in bf16 they would not change at small learning rates.

    PEFT does this for LoRA factors and new tokens only. Tied weights stay tied.
    """
    masters: dict[Tensor, nn.Parameter] = {}
    for wrapper in [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]:
        for module in list(wrapper.modules_to_save[ADAPTER].modules()):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.dtype != torch.float32:
                    master = masters.setdefault(parameter, nn.Parameter(parameter.detach().float()))
                    setattr(module, name, master)
                    parametrize.register_parametrization(module, name, _Rounded(parameter.dtype), unsafe=True)


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """Copy everything that a resumed run needs of the adapter to the CPU, by stable name.

    These are all trained tensors and, after a PiSSA or OLoRA init, the initial factors (`initial.…`).
    """
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in _state(model).items()}


def load_adapter_state(model: PeftModel, state: Mapping[str, Tensor]) -> None:
    """Load the result of `adapter_state` into a model with the same adapter.

    Raises:
        IntegrityError: tensors are missing, superfluous, or of another shape or dtype, or initial factors differ, which
            means another base or seed. Nothing is loaded then.
    """
    own = _state(model)
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is not part of this adapter" for name in state if name not in own]
    for name in own.keys() & state.keys():
        here, there = own[name], state[name]
        if (here.shape, here.dtype) != (there.shape, there.dtype):
            problems.append(f"{name} is {list(there.shape)} {there.dtype}, not {list(here.shape)} {here.dtype}")
        elif name.startswith(_INITIAL) and not torch.equal(here, there.to(here.device)):
            problems.append(f"{name} differs: the adapter started from another base or seed")
    if problems:
        shown = "; ".join(sorted(problems)[:10]) + (f"; … {len(problems)} in all" if len(problems) > 10 else "")
        raise IntegrityError(f"the saved adapter does not match this one: {shown}")
    with torch.no_grad():
        for name, tensor in own.items():
            if not name.startswith(_INITIAL):
                tensor.copy_(state[name])


def _state(model: PeftModel) -> dict[str, Tensor]:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {**trained, **{f"{_INITIAL}{name}": tensor for name, tensor in initial_factors(model).items()}}
