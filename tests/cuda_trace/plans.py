"""Runs whose predicted peak memory is compared with the traced one: every token a target, few layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from finetune import load_config
from finetune.config.schema import LoraConfig, QuantConfig
from finetune.data.batch import Batch
from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.losses.policy import token_log_probs
from finetune.models.families import QWEN25_SHAPES
from finetune.planning.inputs import GpuTraits, PlanInputs, plan_inputs
from finetune.planning.peak_memory import PeakMemory, predict_peak
from tests.cuda_trace.trace import Step, trace_step

_Q_AND_V = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Plan:
    """One run of a Qwen2.5 size with some layers, one document per step."""

    size: str
    layers: int
    tokens: int
    rank: int = 8
    targets: tuple[str, ...] | str = _Q_AND_V
    recompute: str | int = "none"
    embedding: str = "device"
    compiled: bool = True
    kernels: str = "fused"
    quant: str = "nf4"
    keep_dequantized: bool = False
    dora: bool = False
    freeze_a: bool = False
    saved: tuple[str, ...] = ()
    dropout: float = 0.0
    deterministic: bool = False
    dtype: str = "bfloat16"
    capability: tuple[int, int] = (9, 0)
    answers: int = 0  # to one prompt of so many tokens, which they compute once; two are a pair
    prompt: int = 0

    @property
    def name(self) -> str:
        targets = self.targets if isinstance(self.targets, str) else "+".join(self.targets)
        words = [f"plan {self.size}x{self.layers}", f"{self.tokens}", f"r={self.rank}", targets, str(self.recompute)]
        options = {
            "host": self.embedding == "host",
            "plain": not self.compiled,
            "peft": self.kernels == "peft",
            self.quant: self.quant != "nf4",
            "keep_dequantized": self.keep_dequantized,
            "DoRA": self.dora,
            "frozen A": self.freeze_a,
            f"trained {'+'.join(self.saved)}": bool(self.saved),
            "dropout": self.dropout,
            "deterministic": self.deterministic,
            self.dtype: self.dtype != "bfloat16",
            "before Ampere": self.capability < (8, 0),
            f"{self.answers} answers to {self.prompt}": bool(self.answers),
        }
        return " ".join([*words, *(word for word, on in options.items() if on)])

    @property
    def shape(self) -> dict[str, Any]:
        return QWEN25_SHAPES[self.size] | {"rms_norm_eps": 1e-6, "num_hidden_layers": self.layers}

    @property
    def _targets(self) -> list[str] | str:
        return self.targets if isinstance(self.targets, str) else list(self.targets)

    def inputs(self) -> PlanInputs:
        targets = self.targets if isinstance(self.targets, str) else f"[{','.join(self.targets)}]"
        overrides = {
            "data.train": "rows.jsonl",
            "data.max_length": self.prompt + self.answers * self.answer if self.answers > 2 else self.tokens,
            "train.batch_size": 1,
            "lora.rank": self.rank,
            "lora.target_modules": targets,
            "lora.dora": self.dora,
            "lora.freeze_a": self.freeze_a,
            "lora.modules_to_save": f"[{','.join(self.saved)}]",
            "lora.dropout": self.dropout,
            "train.gradient_checkpointing": self.recompute,
            "train.compile": self.compiled,
            "model.embedding": self.embedding,
            "model.dtype": self.dtype,
            "quant.compute_dtype": self.dtype,
            "train.kernels": self.kernels,
            "train.deterministic": self.deterministic,
            "quant.type": self.quant,
            "quant.double": self.quant == "nf4",
            "quant.keep_dequantized": self.keep_dequantized,
        }
        if self.answers == 2:
            overrides |= {"preference.objective": "simpo", "data.truncation": "error"}
        elif self.answers:
            overrides |= {
                "reward.loss": "grpo",
                "reward.functions": "{exact: 1}",
                "reward.group_size": self.answers,
                "reward.max_new_tokens": self.answer,
                # Sampling is another moment.
                "reward.engine": "server",
                "reward.url": "http://localhost:8000",
            }
        cfg = load_config(
            "lora.yaml",
            [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in overrides.items()],
        )
        inputs = plan_inputs(cfg, self.shape, device_type="cuda", gpu=GpuTraits(self.capability >= (8, 0)))
        if self.answers == 2:
            return inputs.with_rows(self.tokens, self.answer / (self.prompt + self.answer))
        return inputs.with_rows(self.prompt or None, 1.0)

    @property
    def answer(self) -> int:
        """Tokens of an answer."""
        return self.tokens // self.answers - self.prompt

    def answer_of(self, row: Document) -> Document:
        """Make an answer to the prompt of a document as long as both."""
        ids, labels = row.ids.copy(), row.labels.copy()
        ids[: self.prompt] = 1
        labels[: self.prompt - 1] = IGNORE_INDEX
        return replace(row, ids=ids, labels=labels)

    def predicted(self) -> PeakMemory:
        recomputed = {"none": 0, "all": self.layers - 1, "offload": self.layers - 1}.get(self.recompute, self.recompute)
        return predict_peak(self.inputs(), 1, recomputed)

    def trace(self) -> Step:
        return trace_step(
            self.shape,
            tokens=self.tokens,
            **({"count": self.answers, "change": self.answer_of, "build_loss": _answers} if self.answers else {}),
            lora=LoraConfig(
                rank=self.rank,
                target_modules=self._targets,
                dora=self.dora,
                freeze_a=self.freeze_a,
                dropout=self.dropout,
                modules_to_save=list(self.saved),
            ),
            quant=QuantConfig(
                type=self.quant,
                double=self.quant == "nf4",
                keep_dequantized=self.keep_dequantized,
                compute_dtype=self.dtype,
            ),
            recompute=self.recompute,
            embedding=self.embedding,
            # With PEFT's kernels, those of the loss run as plain torch too.
            compiled=self.compiled and self.kernels == "fused",
            kernels=self.kernels,
            fixed_order=self.deterministic,
            capability=self.capability,
            dtype=getattr(torch, self.dtype),
        )


def _answers(model: nn.Module, batch: Batch) -> nn.Module:
    """Build what all losses on answers compute: the log-probability of each token."""

    class Loss(nn.Module):
        def __init__(self, model: nn.Module):
            super().__init__()
            self.model = model

        def forward(self, batch: Batch) -> torch.Tensor:
            return -token_log_probs(self.model, batch).sum()

    return Loss(model)


_RUNS = [
    Plan("7B", 2, 2048),
    Plan("7B", 2, 2048, recompute="all"),
    Plan("7B", 2, 2048, compiled=False),
    Plan("7B", 4, 8192, recompute="none"),
    Plan("7B", 4, 8192, recompute="all"),
    Plan("7B", 4, 8192, recompute="offload"),
    Plan("7B", 4, 8192, recompute=2),
    Plan("7B", 3, 2048, recompute="offload", embedding="host"),
    Plan("7B", 3, 8192, recompute="all", embedding="host"),
    Plan("7B", 2, 4096, recompute="all", compiled=False),
    Plan("7B", 2, 2048, 64, "all-linear"),
    Plan("7B", 3, 8192, 64, "all-linear", "all"),
    Plan("7B", 3, 8192, 64, "all-linear", "offload"),
    Plan("7B", 3, 40_960, 32, "all-linear", "offload"),
    Plan("3B", 3, 4096),
    Plan("3B", 3, 4096, 16, "all-linear", "all"),
    Plan("3B", 3, 16_384, 16, "all-linear", "offload"),
    Plan("1.5B", 3, 2048, quant="none"),
    Plan("1.5B", 3, 8192, 16, "all-linear"),
    Plan("1.5B", 3, 8192, keep_dequantized=True, recompute="all"),
    Plan("1.5B", 2, 2048, 16, "all-linear", dora=True),
    Plan("0.5B", 4, 2048, 16, "all-linear"),
    Plan("0.5B", 4, 8192, recompute="all"),
    Plan("0.5B", 2, 2048, kernels="peft"),
    Plan("0.5B", 2, 4096, 16, "all-linear", "all", kernels="peft"),
    Plan("0.5B", 4, 2048, 16, "all-linear", dropout=0.1),
    Plan("14B", 2, 4096, 16, "all-linear", "all"),
    Plan("7B", 3, 40_960, 32, "all-linear", "offload", deterministic=True),
    Plan("0.5B", 4, 2048, 16, "all-linear", deterministic=True),
    Plan("0.5B", 4, 8192, capability=(7, 5)),
    Plan("1.5B", 3, 8192, 16, "all-linear", "all", capability=(7, 5)),
    Plan("7B", 3, 8192, recompute="offload", capability=(7, 5)),
    Plan("1.5B", 3, 8192, 16, "all-linear", dtype="float16", capability=(7, 5)),
    Plan("7B", 3, 8192, recompute="all", dtype="float16", capability=(7, 5)),
    Plan("7B", 3, 4096, 16, "all-linear", keep_dequantized=True),
    Plan("7B", 3, 4096, 16, "all-linear", quant="none", recompute="offload"),
    Plan("7B", 2, 2048, saved=("lm_head",)),
    Plan("7B", 2, 2048, saved=("embed_tokens",)),
    Plan("7B", 2, 2048, saved=("embed_tokens", "lm_head")),
    Plan("7B", 3, 2048, 16, "all-linear", "all", dora=True),
    Plan("7B", 2, 2048, freeze_a=True),
    Plan("7B", 3, 8192, 64, "all-linear", "all", freeze_a=True),
    Plan("0.5B", 4, 2048, 16, "all-linear", freeze_a=True),
    Plan("0.5B", 3, 2048, dtype="float32"),
    Plan("7B", 2, 3072, 16, "all-linear", answers=2, prompt=1024),
    Plan("7B", 2, 10_240, 16, "all-linear", answers=8, prompt=1024),
    Plan("7B", 3, 34_816, 16, "all-linear", "offload", answers=8, prompt=4096),
    Plan("0.5B", 3, 17_408, answers=8, prompt=2048),
]
PLANS = {run.name: run for run in _RUNS}
# Whole models take minutes: `python -m tests.cuda_trace.run OUT.json NAME`, figures in benchmarks/NOTES.md.
_WHOLE = [
    Plan("0.5B", 24, 2048),
    Plan("0.5B", 24, 8192, 16, "all-linear", "all"),
    Plan("1.5B", 28, 2048, 16, "all-linear"),
    Plan("3B", 36, 2048, 16, "all-linear"),
    Plan("3B", 36, 8192, 16, "all-linear", "offload"),
]
WHOLE = {run.name: run for run in _WHOLE}
