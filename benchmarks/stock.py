"""Run the baseline: QLoRA with TRL, PEFT and bitsandbytes as in their documentation, without our code.

    python -m benchmarks.stock model=FOLDER rows=MESSAGES.jsonl variant=padded [steps=4] [length=512] [batch=4]
                               [fused=true]

`fused=true` calls `finetune.fuse_layers` on the trainer's model: one line of our code.

Seconds are those of `training_step` (forward and backward): the optimizer and the data loader do not count.

`gkd` is TRL's experimental GKDTrainer, off-policy, with forward KL at temperature 1 from the same weights. It reads
`messages`, pads them (it has no packing), and trains everything after the prompt: the last answer, its <|im_end|> and
the newline after it. This is one more target per row than ours.

`grpo` is TRL's GRPOTrainer with transformers' `generate`, on the prompts of `messages`: `batch` answers of up to
`answer` tokens in a step, `group` to each prompt. `sampling_seconds` are those of the answers and their rewards.

`dpo` is TRL's DPOTrainer on rows of `prompt`, `chosen` and `rejected`; its reference is the base, scored in each step,
or in `dpo+precomputed` before the first.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from importlib.util import find_spec
from typing import Any

from benchmarks.peaks import Peaks
from benchmarks.processes import parse

DEFAULTS = {
    "model": "",
    "rows": "",
    "variant": "padded",
    "steps": "4",
    "length": "512",
    "batch": "4",
    "rank": "8",
    "targets": "q_proj,v_proj",
    "lora_dropout": "0.0",
    "seed": "0",
    "fused": "false",
    "group": "8",
    "answer": "64",
}
# Keys of SFTConfig for each variant (GKDConfig for gkd, DPOConfig for dpo, GRPOConfig for grpo).
VARIANTS: dict[str, dict[str, Any]] = {
    "padded": {"packing": False, "gradient_checkpointing": False},
    "packing": {"packing": True, "gradient_checkpointing": False},
    "packing+checkpointing": {"packing": True, "gradient_checkpointing": True},
    "padded+fp32": {"packing": False, "gradient_checkpointing": False, "bf16": False},
    "packing+fp32": {"packing": True, "gradient_checkpointing": False, "bf16": False},
    "packing+checkpointing+fp32": {"packing": True, "gradient_checkpointing": True, "bf16": False},
    "liger": {"packing": True, "gradient_checkpointing": True, "use_liger_kernel": True},
    "unsloth": {"packing": True, "gradient_checkpointing": False},  # has its own checkpointing
    "gkd": {"gradient_checkpointing": False, "lmbda": 0.0, "beta": 0.0, "temperature": 1.0},
    "gkd+checkpointing": {"gradient_checkpointing": True, "lmbda": 0.0, "beta": 0.0, "temperature": 1.0},
    "dpo": {"gradient_checkpointing": False},
    "dpo+checkpointing": {"gradient_checkpointing": True},
    "dpo+precomputed": {"gradient_checkpointing": False, "precompute_ref_log_probs": True},
    "grpo": {"gradient_checkpointing": False},
    "grpo+checkpointing": {"gradient_checkpointing": True},
}
_ALSO_FP32 = ("gkd", "dpo", "grpo")
VARIANTS |= {f"{name}+fp32": {**VARIANTS[name], "bf16": False} for name in VARIANTS if name.startswith(_ALSO_FP32)}
# By trainer and dtype of matrix products: a stock step in bf16 takes half an hour on a CPU without bf16 instructions.
STOCK = {
    "sft": {
        "bfloat16": ("padded", "packing", "packing+checkpointing"),
        "float32": ("padded+fp32", "packing+fp32", "packing+checkpointing+fp32"),
    },
    "gkd": {"bfloat16": ("gkd", "gkd+checkpointing"), "float32": ("gkd+fp32", "gkd+checkpointing+fp32")},
    "dpo": {"bfloat16": ("dpo", "dpo+checkpointing"), "float32": ("dpo+fp32", "dpo+checkpointing+fp32")},
    "grpo": {"bfloat16": ("grpo", "grpo+checkpointing"), "float32": ("grpo+fp32", "grpo+checkpointing+fp32")},
}
# Variants of other projects, with the package that each needs.
PEERS = {"liger": "liger_kernel", "unsloth": "unsloth", "llama-factory": "llamafactory"}


def installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    return find_spec(package) is not None


def load_model(path: str, device: str, dtype: Any) -> Any:
    """Load NF4 with double quantization and compute dtype `dtype` through transformers."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    # Packed rows need attention per document; TRL's documentation names this implementation.
    attention = {"attn_implementation": "flash_attention_2"} if device == "cuda" and installed("flash_attn") else {}
    return AutoModelForCausalLM.from_pretrained(
        path,
        quantization_config=quantization,
        dtype=dtype,
        device_map={"": 0} if device == "cuda" else None,
        **attention,
    )


def build_trainer(options: dict[str, str], device: str, output: str) -> Any:
    """Build the trainer of a variant; the loss is on the last turn's answer."""
    settings = {
        "output_dir": output,
        "max_steps": int(options["steps"]),
        "per_device_train_batch_size": int(options["batch"]),
        "max_length": int(options["length"]),
        "learning_rate": 2e-4,
        "bf16": True,
        "use_cpu": device == "cpu",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": int(options["seed"]),
        **VARIANTS[options["variant"]],
    }
    builders = {"gkd": distilling_trainer, "dpo": preference_trainer, "grpo": reward_trainer}
    build = builders.get(options["variant"].partition("+")[0], tuning_trainer)
    return build(options, device, settings)


def target_modules(options: dict[str, str]) -> Any:
    """Return the adapter's modules in PEFT's form."""
    return options["targets"] if options["targets"] == "all-linear" else options["targets"].split(",")


def lora_config(options: dict[str, str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=int(options["rank"]),
        lora_alpha=16,
        target_modules=target_modules(options),
        task_type="CAUSAL_LM",
        lora_dropout=float(options["lora_dropout"]),
    )


def tuning_trainer(options: dict[str, str], device: str, settings: dict[str, Any]) -> Any:
    """Build an SFTTrainer."""
    import torch

    extra: dict[str, Any] = {}
    if options["variant"] == "unsloth":
        from unsloth import FastLanguageModel  # before trl: it patches later imports

        model, _ = FastLanguageModel.from_pretrained(
            options["model"], max_seq_length=int(options["length"]), load_in_4bit=True, dtype=None
        )
        model = FastLanguageModel.get_peft_model(
            model,
            r=int(options["rank"]),
            lora_alpha=16,
            target_modules=target_modules(options),
            use_gradient_checkpointing="unsloth",
        )
    else:
        model = load_model(options["model"], device, torch.bfloat16 if settings["bf16"] else torch.float32)
        extra["peft_config"] = lora_config(options)
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    def split_last(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}

    rows = load_dataset("json", data_files=options["rows"], split="train").map(split_last, remove_columns=["messages"])
    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    return SFTTrainer(model=model, args=SFTConfig(**settings), train_dataset=rows, processing_class=tokenizer, **extra)


def distilling_trainer(options: dict[str, str], device: str, settings: dict[str, Any]) -> Any:
    """Build a GKDTrainer whose teacher is the same model in the student's compute dtype."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    dtype = torch.bfloat16 if settings["bf16"] else torch.float32
    model = load_model(options["model"], device, dtype)
    teacher = AutoModelForCausalLM.from_pretrained(
        options["model"], dtype=dtype, device_map={"": 0} if device == "cuda" else None
    )
    return GKDTrainer(
        model=model,
        teacher_model=teacher,
        args=GKDConfig(**settings),
        peft_config=lora_config(options),
        train_dataset=load_dataset("json", data_files=options["rows"], split="train"),
        processing_class=AutoTokenizer.from_pretrained(options["model"]),
    )


def unpacked_model(options: dict[str, str], device: str, settings: dict[str, Any]) -> Any:
    """Load the model so that passes without gradients, as those of a reference or of sampling, leave it trainable."""
    import torch
    from bitsandbytes.nn import Linear4bit

    model = load_model(options["model"], device, torch.bfloat16 if settings["bf16"] else torch.float32)
    for module in model.modules():
        # Else a CPU packs the weights for good at the first such pass.
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def preference_trainer(options: dict[str, str], device: str, settings: dict[str, Any]) -> Any:
    """Build a DPOTrainer whose reference is the base."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(
        model=unpacked_model(options, device, settings),
        args=DPOConfig(**settings),
        peft_config=lora_config(options),
        train_dataset=load_dataset("json", data_files=options["rows"], split="train"),
        processing_class=AutoTokenizer.from_pretrained(options["model"]),
    )


def reward_by_number(completions: list[Any], **_: Any) -> list[float]:
    """Reward every second answer, since answers of a random model with equal rewards would not be learned from."""
    return [float(number % 2) for number in range(len(completions))]


def reward_trainer(options: dict[str, str], device: str, settings: dict[str, Any]) -> Any:
    """Build a GRPOTrainer without a reference."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    def prompt(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": row["messages"][:-1]}

    rows = load_dataset("json", data_files=options["rows"], split="train").map(prompt, remove_columns=["messages"])
    settings = {key: value for key, value in settings.items() if key != "max_length"}
    sampling = {"num_generations": int(options["group"]), "max_completion_length": int(options["answer"])}
    return GRPOTrainer(
        model=unpacked_model(options, device, settings),
        reward_funcs=reward_by_number,
        args=GRPOConfig(loss_type="grpo", beta=0.0, temperature=1.0, **sampling, **settings),
        peft_config=lora_config(options),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(options["model"]),
    )


def watch_sampling(trainer: Any) -> list[dict[str, float]]:
    """Wrap GRPOTrainer's sampling, and append seconds, tokens and answer tokens of each call to the list."""
    calls: list[dict[str, float]] = []
    inner = trainer._generate_and_score_completions

    def timed(inputs: Any) -> Any:
        start = time.perf_counter()
        found = inner(inputs)
        answers = int(found["completion_mask"].sum())  # waits for a GPU
        seconds = time.perf_counter() - start
        tokens = int(found["prompt_mask"].sum()) + answers
        calls.append({"sampling_seconds": seconds, "tokens": tokens, "target_tokens": answers})
        return found

    trainer._generate_and_score_completions = timed
    return calls


def counts_of(inputs: Any) -> dict[str, float]:
    """Return the real tokens and the target tokens of a batch."""
    mask, answers = inputs.get("attention_mask"), inputs.get("completion_mask")
    tokens = inputs["input_ids"].numel() if mask is None else int(mask.sum())
    targets = int((inputs["labels"] != -100).sum() if answers is None else answers.sum())
    return {"tokens": tokens, "target_tokens": targets}


def watch_steps(trainer: Any, device: str) -> list[dict[str, float]]:
    """Wrap `training_step`, and append seconds, real tokens and target tokens of each step to the list."""
    import torch

    steps: list[dict[str, float]] = []
    inner = trainer.training_step
    sampled = watch_sampling(trainer) if hasattr(trainer, "_generate_and_score_completions") else None

    def timed(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        counts = counts_of(inputs) if sampled is None else {}
        start = time.perf_counter()
        loss = inner(model, inputs, *args, **kwargs)
        if device == "cuda":
            torch.cuda.synchronize()
        steps.append({"seconds": time.perf_counter() - start, **(counts if sampled is None else sampled[-1])})
        return loss

    trainer.training_step = timed
    return steps


def main(words: list[str]) -> None:
    began = time.perf_counter()
    options = parse(words, DEFAULTS)
    if options["variant"] == "unsloth":
        import unsloth  # noqa: F401 - first, since it patches later imports
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    peaks = Peaks()
    with tempfile.TemporaryDirectory() as output:
        trainer = build_trainer(options, device, output)
        if options["fused"] == "true":
            from finetune import fuse_layers

            print(fuse_layers(trainer.model), file=sys.stderr)
        steps = watch_steps(trainer, device)
        start_seconds = time.perf_counter() - began
        peaks.training_begins()
        trainer.train()
    attention = trainer.model.config._attn_implementation
    print(json.dumps({"steps": steps, "start_seconds": start_seconds, "attention": attention, **peaks.figures()}))


if __name__ == "__main__":
    main(sys.argv[1:])
