"""Our setting for each setting of another framework.

A name that means the same here is found in config/peers.py or in the schema. This table holds the names whose values
must be converted, and those that a run does not need.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.config.keys import schema_fields, sections
from finetune.config.peers import PEERS as OUR_NAMES
from finetune.config.section import NUMBER
from finetune.migration.files import Peer

ADAMW = "AdamW is used"
TEMPLATE = "the template of the tokenizer is used (data.chat_template)"
STEPS = "give a number of steps here"
FULL = "every run trains a LoRA adapter; set lora.rank"


@dataclass(frozen=True)
class Rule:
    """The meaning of one name.

    Attributes:
        key: our key; empty if there is none.
        values: their value to ours; None leaves the setting out. Other values are reported.
        convert: turns their value into ours; used in place of `values`.
        note: why a value that is not listed is left out.
    """

    key: str = ""
    values: Mapping[Any, Any] | None = None
    convert: Callable[[Any], Any] | None = None
    note: str = "no counterpart"


def _words(value: Any) -> Any:
    """Return names of modules as a list, or all-linear."""
    names = value if isinstance(value, list) else [word for word in re.split(r"[,\s]+", str(value)) if word]
    if any(str(name).lower() in ("all", "all-linear", "all_linear", "auto") for name in names):
        return "all-linear"
    return [str(name) for name in names]


def _regex(value: Any) -> Any:
    """Return target_modules: a text with regex characters stays one text."""
    return value if isinstance(value, str) and re.search(r"[*+?()\[\]|^$\\]", value) else _words(value)


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


def _positive(value: Any) -> Any:
    value = _number(value)
    return value if isinstance(value, int | float) and 0 < value < float("inf") else None


def _steps(value: Any) -> Any:
    value = _positive(value)
    return int(value) if value and value >= 1 and value == int(value) else None


def _share(value: Any) -> Any:
    value = _positive(value)
    return value if value and value < 1 else None


def _unquantized(name: Any) -> str:
    """Return the 16-bit model of a repository of 4-bit weights: every run quantizes by itself."""
    return re.sub(r"(-unsloth)?-bnb-4bit$", "", str(name))


_YES = {True: True, False: False}
_SWITCH_ON: dict[Any, Any] = {False: None}
_DTYPES = {name: name for name in ("bfloat16", "float16", "float32", "bf16", "fp16", "fp32")} | {"auto": None}
_OPTIMIZERS: dict[Any, Any] = dict.fromkeys(("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf"))
_OPTIMIZERS |= {"adamw_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}
_OPTIMIZERS |= {"paged_adamw": "paged_adamw", "paged_adamw_32bit": "paged_adamw"}
_OPTIMIZERS |= {"lion_32bit": "lion", "lion_8bit": "lion_8bit"}
_TEMPLATES = dict.fromkeys(
    "qwen qwen2 qwen2_5 qwen_25 qwen3 qwen3_nothink chatml tokenizer_default tokenizer_default_fallback_chatml".split()
)
_CHECKPOINTING = {True: "all", False: "none", "unsloth": "offload", "offload": "offload", "selective": "auto"}
_SCHEDULES = {name: name for name in ("cosine", "linear", "constant", "inverse_sqrt")}
_SCHEDULES |= {"constant_with_warmup": "constant", "warmup_stable_decay": "wsd", "cosine_with_min_lr": "cosine"}
_INITS = {True: None, "true": None, "gaussian": "gaussian", "pissa": "pissa", "olora": "olora"}
_STRATEGIES = {"steps": None, "no": None, False: None}
_PREFERENCES = {name: name for name in ("dpo", "ipo", "orpo", "simpo", "kto")}
_ADAPTERS = {"lora": None, "qlora": "nf4"}

# The names that share a rule -> the rule.
_RULES = {
    "torch_dtype dtype": Rule("model.dtype", _DTYPES),
    "bf16": Rule("model.dtype", _SWITCH_ON | {True: "bfloat16", "auto": None, "full": "bfloat16"}),
    "fp16": Rule("model.dtype", _SWITCH_ON | {True: "float16", "auto": None}),
    "quantization_bit quant_bits": Rule("quant.type", {4: "nf4", 8: "int8"}),
    "quantization_method quant_method": Rule(
        values={"bnb": None, "bitsandbytes": None}, note="weights are quantized as NF4 or int8"
    ),
    "bnb_4bit_quant_type": Rule("quant.type", {"nf4": "nf4"}, note="4-bit weights are NF4"),
    "bnb_4bit_compute_dtype": Rule("quant.compute_dtype", _DTYPES),
    "adapter": Rule("quant.type", _ADAPTERS, note=FULL),
    "finetuning_type train_type tuner_type sft_type": Rule(values={"lora": None}, note=FULL),
    "use_peft": Rule(values={True: None}, note=FULL),
    "full_finetuning": Rule(values=_SWITCH_ON, note=FULL),
    "load_best_model_at_end": Rule(values=_SWITCH_ON, note="the adapter is the last one; the best checkpoint is kept"),
    # LLaMA-Factory's stage dpo covers several losses: pref_loss names the one.
    "stage rlhf_type rl": Rule("preference.objective", {"sft": None, "pt": None, **_PREFERENCES}),
    "pref_loss": Rule("preference.objective", {"sigmoid": "dpo", **_PREFERENCES}),
    "pref_beta rl_beta": Rule("preference.beta", convert=_positive),
    "pref_ftx rpo_alpha cpo_alpha": Rule("preference.sft_weight", convert=_positive),
    "simpo_gamma": Rule("preference.gamma", convert=_positive),
    "dpo_label_smoothing": Rule("preference.label_smoothing", convert=_share),
    "kto_chosen_weight kto_desirable_weight desirable_weight": Rule("preference.desirable_weight", convert=_positive),
    "kto_rejected_weight kto_undesirable_weight undesirable_weight": Rule(
        "preference.undesirable_weight", convert=_positive
    ),
    "lora_target lora_target_modules target_modules": Rule("lora.target_modules", convert=_regex),
    "lora_modules_to_save modules_to_save additional_target": Rule("lora.modules_to_save", convert=_words),
    "init_lora_weights init_weights": Rule("lora.init", _INITS),
    "pissa_iter": Rule("lora.init", {16: "pissa_niter_16", -1: "pissa"}, note="pissa_niter_16 is there"),
    "pissa_convert": Rule(values=_YES, note="`finetune merge` converts"),
    "bias lora_bias": Rule(values={"none": None}, note="biases are not trained"),
    "sample_packing neat_packing packing padding_free": Rule("data.packing", _YES),
    "train_on_inputs train_on_prompt": Rule("data.train_on", {True: "all", False: "assistant"}),
    "template chat_template": Rule(values=_TEMPLATES, note=TEMPLATE),
    "val_set_size val_size split_dataset_ratio": Rule(
        "data.held_out", convert=_share, note="data.held_out is a share below 1"
    ),
    "max_steps": Rule("train.max_steps", convert=_steps),
    "learning_rate": Rule("train.learning_rate", convert=_number),
    "lr_scheduler lr_scheduler_type": Rule("train.schedule", _SCHEDULES),
    "warmup_steps": Rule("train.warmup_steps", convert=_steps),
    "warmup_ratio": Rule("train.warmup_ratio", convert=_number),
    "optim optimizer": Rule("train.optimizer", _OPTIMIZERS, note=ADAMW),
    "loraplus_lr_ratio": Rule("train.lora_plus_ratio", convert=_positive),
    "gradient_checkpointing use_gradient_checkpointing": Rule("train.gradient_checkpointing", _CHECKPOINTING),
    "disable_gradient_checkpointing": Rule("train.gradient_checkpointing", {True: "none", False: None}),
    "eval_steps": Rule("train.eval_every", convert=_steps, note=STEPS),
    "save_steps": Rule("train.save_every", convert=_steps, note=STEPS),
    "eval_strategy evaluation_strategy": Rule(values=_STRATEGIES, note="train.eval_every counts steps"),
    "save_strategy": Rule(values=_STRATEGIES, note="train.save_every counts steps"),
    "evals_per_epoch": Rule(values={0: None}, note="train.eval_every counts steps"),
    "saves_per_epoch": Rule(values={0: None, 1: None}, note="train.save_every counts steps"),
    "early_stop_interval early_stopping_patience": Rule("train.early_stopping", convert=_steps),
    "neftune_noise_alpha": Rule("train.neftune_alpha", convert=_positive),
    "output_dir": Rule("output_dir", convert=lambda value: str(value).removeprefix("./")),
}
RULES = {name: rule for names, rule in _RULES.items() for name in names.split()}

# Names that mean something else in one framework.
OF_ONE_FRAMEWORK: dict[str, dict[str, Rule]] = {
    "ms-swift": {
        "model": Rule("model.name", convert=str),
        "model_name": Rule(values={}, note="names the assistant of swift/self-cognition"),
    },
    "unsloth": {"model_name": Rule("model.name", convert=_unquantized)},
}

# No effect on the trained adapter, or done by every run.
UNNEEDED = frozenset(
    "attn_impl attn_implementation bf16_full_eval bnb_4bit_quant_storage dataloader_num_workers "
    "dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor dataset_num_proc "
    "dataset_prepared_path ddp_find_unused_parameters ddp_timeout debug do_eval do_train enable_liger_kernel "
    "eval_batch_size eval_sample_packing eval_table_size flash_attention flash_attn "
    "gradient_checkpointing_kwargs greater_is_better group_by_length include_num_input_tokens_seen "
    "include_tokens_per_second is_qwen_derived_model lazy_tokenize local_rank logging_dir logging_first_step "
    "logging_steps logging_strategy lora_fan_in_fan_out lora_mlp_kernel lora_o_kernel lora_qkv_kernel "
    "metric_for_best_model model_author model_type overwrite_cache overwrite_output_dir pad_to_sequence_len "
    "per_device_eval_batch_size plot_loss preprocessing_num_workers remove_unused_columns s2_attention "
    "save_only_model save_safetensors sdp_attention special_tokens strict task_type tf32 tokenizer_type "
    "torch_compile trust_remote_code use_fast_tokenizer use_liger_kernel use_reentrant use_unsloth "
    "wandb_log_model wandb_watch xformers_attention".split()
)
# What names the objective; a run does not have those of reinforcement learning.
OBJECTIVES = ("stage", "rlhf_type", "rl")
KNOWN_OBJECTIVES = frozenset({"sft", "pt", *_PREFERENCES})

# Our settings that a config of the framework has if it does not name them.
DEFAULTS: dict[Peer, dict[str, Any]] = {
    "axolotl": {"lora.dropout": 0.0, "data.packing": False, "data.max_length": 512, "train.schedule": "cosine"},
    "llama-factory": {
        "lora.rank": 8,
        "lora.target_modules": "all-linear",
        "data.packing": False,
        "data.max_length": 2048,
        "train.epochs": 3.0,
        "train.learning_rate": 5e-5,
        "train.schedule": "linear",
        "train.warmup_ratio": 0.0,
        "train.seed": 42,
    },
    "ms-swift": {
        "lora.rank": 8,
        "lora.alpha": 32.0,
        "lora.dropout": 0.05,
        "lora.target_modules": "all-linear",
        "data.packing": False,
        "train.epochs": 3.0,
        "train.learning_rate": 1e-4,
        "train.schedule": "cosine",
        "train.warmup_ratio": 0.0,
        "train.weight_decay": 0.1,
        "train.beta2": 0.95,
        "train.seed": 42,
    },
    "trl": {
        "lora.rank": 16,
        "lora.alpha": 32.0,
        "lora.dropout": 0.05,
        "data.packing": False,
        "data.max_length": 1024,
        "train.epochs": 3.0,
        "train.learning_rate": 2e-5,
        "train.schedule": "linear",
        "train.warmup_ratio": 0.0,
        "train.seed": 42,
    },
    "unsloth": {
        "lora.rank": 16,
        "lora.alpha": 16.0,
        "lora.target_modules": "all-linear",
        "data.packing": False,
        "train.epochs": 3.0,
        "train.learning_rate": 5e-5,
        "train.schedule": "linear",
        "train.warmup_ratio": 0.0,
        "train.seed": 3407,
    },
}
# Sequences of a forward pass if the config does not name them.
MICRO_BATCH: dict[Peer, int] = {"axolotl": 1, "llama-factory": 8, "ms-swift": 1, "trl": 8, "unsloth": 8}


def same_meaning(name: str) -> tuple[str, Any] | None:
    """Return our key of a name that needs no conversion, and the value that it stands for (None: its own)."""
    if name in OUR_NAMES:
        key, _, value = OUR_NAMES[name].partition("=")
        return (key, value or None) if key in schema_fields() and "[" not in value else None
    keys = (f"{section}{name}" for section in ("train.", "lora.", "data.", ""))
    others = {"data.train", *sections()}
    return next(((key, None) for key in keys if key in schema_fields() and key not in others), None)
