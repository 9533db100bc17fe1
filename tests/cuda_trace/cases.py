"""Every path of training, evaluation and generation on a GPU, as a traced case by name.

Small cases have the vocabulary of Qwen2.5 and more targets than a chunk of logits. `7B` cases have its widths.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from finetune.config.schema import LoraConfig, ModelConfig, QuantConfig, TrainConfig
from finetune.data.batch import Batch
from finetune.data.documents import Document
from finetune.data.encoded import Prompt
from finetune.distill.layer_reader import Reads
from finetune.distill.resident import ResidentTeacher
from finetune.distill.stream import StreamedModel
from finetune.evaluation.generation import decode, sample_answers
from finetune.evaluation.scoring import agreement, evaluate
from finetune.losses.cross_entropy import CrossEntropy, head_of
from finetune.losses.distillation import (
    Distillation,
    DistillLossWeights,
    TeacherHidden,
    TeacherSamples,
    TeacherTargets,
    TeacherTopK,
)
from finetune.losses.hidden_states import base_of, copy_together
from finetune.models.families import QWEN25_SHAPES
from finetune.models.fused import fuse_layers
from tests.cuda_trace.fake_gpu import GPU, build_base
from tests.cuda_trace.trace import BuildLoss, Step, documents, trace, trace_step
from tests.cuda_trace.tracker import Tracker

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
SMALL_TOKENS = 1024
TIED = SMALL | {"tie_word_embeddings": True}
ALL = LoraConfig(target_modules="all-linear")
_BASE = Path(__file__).resolve().parents[2] / "data" / "tiny-qwen2.5"

_step = partial(trace_step, SMALL, tokens=SMALL_TOKENS, count=3)


def _lora(**options: Any) -> Callable[[], Step]:
    return partial(_step, lora=LoraConfig(**options))


def _seven(layers: int, **options: Any) -> Callable[[], Step]:
    shape = dict(QWEN25_SHAPES["7B"]) | {"rms_norm_eps": 1e-6, "num_hidden_layers": layers}
    return partial(trace_step, shape, **options)


def _distillation(
    targets_of: Callable[[nn.Module, Batch, int], Iterator[TeacherTargets]],
    change: Callable[[Document], Document] = lambda row: row,
    **weights: Any,
) -> Callable[[], Step]:
    """Train with a teacher. targets_of: model, batch, number of its targets -> the targets of each step."""

    def build_loss(model: nn.Module, batch: Batch) -> nn.Module:
        terms = DistillLossWeights(**{"rows": 1.0, "teacher": 0.5} | weights)
        loss = Distillation(model, terms, 151_665)  # ids of Qwen2.5's tokenizer
        loss.expect(targets_of(model, batch, len(batch.targets)))
        return loss

    return partial(_step, build_loss=build_loss, change=change)


def _resident(model: nn.Module, batch: Batch, count: int) -> Iterator[TeacherTargets]:
    base = build_base(SMALL, QuantConfig(type="none", double=False))
    fuse_layers(base)
    return ResidentTeacher(base, GPU).targets_for(itertools.repeat(batch))  # type: ignore[arg-type]


def _hidden(model: nn.Module, batch: Batch, count: int) -> Iterator[TeacherTargets]:
    states = torch.empty(count, SMALL["hidden_size"], dtype=torch.bfloat16, device=GPU)
    return itertools.repeat(TeacherHidden(states, head_of(model)))


def _samples(model: nn.Module, batch: Batch, count: int) -> Iterator[TeacherTargets]:
    ids, probs = torch.zeros(count, 48, dtype=torch.int64, device=GPU), torch.zeros(count, 48, device=GPU)
    return itertools.repeat(TeacherSamples(ids, probs, torch.zeros(count, device=GPU), 32))


def _top_k(model: nn.Module, batch: Batch, count: int) -> Iterator[TeacherTargets]:
    ids, log_probs = torch.zeros(count, 20, dtype=torch.int64, device=GPU), torch.zeros(count, 20, device=GPU)
    return itertools.repeat(TeacherTopK(ids, log_probs))


def _streamed() -> Step:
    """Stream the embedded base as the teacher of one batch."""

    def work(model: nn.Module, batch: Batch, tracker: Tracker) -> None:
        teacher = StreamedModel(ModelConfig(name=str(_BASE)), GPU)
        tracker.phase = "forward"
        with mock.patch.object(Reads, "_fill", lambda *_: None):  # threads cannot write into fake tensors
            list(teacher.targets_for([batch]))

    return trace(SMALL, work, tokens=128)


def _evaluation(teacher: bool = False, **options: Any) -> Step:
    def work(model: nn.Module, batch: Batch, tracker: Tracker) -> None:
        tracker.phase = "forward"
        rows = documents(SMALL_TOKENS, 3)
        if teacher:
            base = build_base(SMALL, QuantConfig(type="none", double=False))
            fuse_layers(base)
            agreement(model, ResidentTeacher(base, GPU), rows, 151_665, limit_tokens=4096)
        else:
            with torch.no_grad():
                evaluate(model, rows, limit_tokens=4096)

    return trace(SMALL, work, **options)


_PROMPTS = [Prompt(np.array([1, 2, 3])), Prompt(np.array([4, 5, 6, 7]))]


def _greedy(**options: Any) -> Step:
    def work(model: nn.Module, batch: Batch, tracker: Tracker) -> None:
        model.eval()
        tracker.phase = "forward"
        with torch.no_grad():
            decode(model, _PROMPTS, [2, 3], stop_ids=(), vocabulary=SMALL["vocab_size"])

    return trace(SMALL, work, **options)


def _sampled() -> Step:
    def work(model: nn.Module, batch: Batch, tracker: Tracker) -> None:
        tracker.phase = "forward"
        draws = [np.full((2, 2), 0.5), np.full((2, 3), 0.5)]
        sample_answers(model, _PROMPTS, draws, stop_ids=(), vocabulary=SMALL["vocab_size"], temperature=1.0)

    return trace(SMALL, work)


@contextmanager
def _varlen_of_torch_2_11() -> Iterator[None]:
    """Replace torch's attention over documents by one with the signature of torch 2.11: without `enable_gqa`."""
    import torch.nn.attention.varlen as varlen

    newer = varlen.varlen_attn

    def varlen_attn(*args: Any, return_aux: Any = None, scale: Any = None, window_size: Any = (-1, -1)) -> Any:
        return newer(*args, return_aux=return_aux, scale=scale, window_size=window_size, enable_gqa=True)

    with mock.patch.object(varlen, "varlen_attn", varlen_attn):
        yield


def _older_torch() -> Step:
    with _varlen_of_torch_2_11():
        return _step()


def _autocast(dtype: torch.dtype, **options: Any) -> Step:
    """Train the decoder without segments under autocast, as other trainers do."""

    class Loss(nn.Module):
        def __init__(self, model: nn.Module):
            super().__init__()
            self.model = model

        def forward(self, batch: Batch) -> torch.Tensor:
            ids = copy_together([batch.input_ids[0]], GPU)[0][None]
            with torch.autocast("cuda", dtype=dtype):
                return base_of(self.model).model(input_ids=ids, use_cache=False).last_hidden_state.float().sum()

    return _step(build_loss=lambda model, batch: Loss(model), **options)


def _noise(model: nn.Module, batch: Batch) -> nn.Module:
    return CrossEntropy(model, 5.0)


_noisy: BuildLoss = _noise

# Steps whose ideal time is computed, with two and three layers: half of the tokens are targets, documents have 410.
_TIMED = {
    "7B timed 8192": {"tokens": 8192, "count": 20},
    "7B timed 8192 recompute all": {"tokens": 8192, "count": 20, "recompute": "all"},
    "7B timed 2048": {"tokens": 2048, "count": 5},
    "7B timed 2048 recompute all": {"tokens": 2048, "count": 5, "recompute": "all"},
}

CASES: dict[str, Callable[[], Step]] = {
    "q and v": _step,
    "all-linear": partial(_step, lora=ALL),
    "not compiled": partial(_step, compiled=False),
    "not compiled, all-linear": partial(_step, lora=ALL, compiled=False),
    "tied": partial(trace_step, TIED, tokens=SMALL_TOKENS, count=3),
    "some targets": partial(_step, share=0.5),
    "no target": partial(_step, share=0.0),
    "recompute all": partial(_step, recompute="all"),
    "recompute 1": partial(_step, recompute=1),
    "offload": partial(_step, recompute="offload"),
    "offload, not compiled": partial(_step, recompute="offload", lora=ALL, compiled=False),
    "embedding on host": partial(_step, embedding="host"),
    "embedding on host, peft kernels": partial(_step, embedding="host", kernels="peft", attention="sdpa"),
    "embedding on host, NEFTune": partial(_step, embedding="host", build_loss=_noisy),
    "embedding on host, evaluation": partial(_evaluation, embedding="host"),
    "embedding on host, greedy answers": partial(_greedy, embedding="host"),
    "peft kernels": partial(_step, kernels="peft"),
    "peft kernels, offload": partial(_step, kernels="peft", recompute="offload"),
    "attention sdpa": partial(_step, attention="sdpa"),
    "dropout": _lora(dropout=0.1, target_modules="all-linear"),
    "dropout, offload": partial(_step, lora=LoraConfig(dropout=0.1), recompute="offload"),
    "NEFTune": partial(_step, build_loss=_noisy),
    "rsLoRA and patterns": _lora(rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 4.0}),
    "layers_to_transform": _lora(layers_to_transform=[1]),
    "frozen A": _lora(freeze_a=True, target_modules="all-linear"),
    "frozen A, offload": partial(_step, lora=LoraConfig(freeze_a=True), recompute="offload"),
    "DoRA": _lora(dora=True, target_modules="all-linear"),
    "head trained": _lora(modules_to_save=["lm_head"]),
    "embedding trained": _lora(modules_to_save=["embed_tokens"]),
    "tied head trained": partial(
        trace_step, TIED, tokens=SMALL_TOKENS, lora=LoraConfig(modules_to_save=["embed_tokens", "lm_head"])
    ),
    "LoRA+": partial(_step, train=TrainConfig(lora_plus_ratio=16)),
    "keep_dequantized": partial(_step, quant=QuantConfig(keep_dequantized=True)),
    "16 bit": partial(_step, quant=QuantConfig(type="none", double=False)),
    "single quantization": partial(_step, quant=QuantConfig(double=False)),
    "some in int8": partial(_step, quant=QuantConfig(int8=["down_proj"])),
    "teacher resident": _distillation(_resident),
    "teacher jsd": _distillation(_hidden, divergence="jsd", mix=0.5),
    "teacher reverse_kl": _distillation(_hidden, divergence="reverse_kl", temperature=2.0),
    "teacher skew_kl": _distillation(_hidden, divergence="skew_kl", mix=0.1),
    "teacher alone": _distillation(_hidden, rows=0.0),
    "hidden term": _distillation(_hidden, hidden=0.1),
    "on policy": _distillation(_hidden, change=lambda row: replace(row, student_generated=True)),
    "weighted rows": partial(_step, change=lambda row: replace(row, weights=np.ones(len(row), np.float32))),
    "teacher sampled": _distillation(_samples),
    "teacher top-k": _distillation(_top_k),
    "teacher streamed": _streamed,
    "evaluation": _evaluation,
    "evaluation, peft kernels": partial(_evaluation, kernels="peft"),
    "evaluation with a teacher": partial(_evaluation, teacher=True),
    "greedy answers": _greedy,
    "sampled answers": _sampled,
    "before Ampere": partial(_step, capability=(7, 5)),
    "torch 2.11": _older_torch,
    "deterministic": partial(_step, fixed_order=True),
    "deterministic, offload": partial(_step, recompute="offload", fixed_order=True),
    "deterministic, before Ampere": partial(_step, capability=(7, 5), fixed_order=True),
    "autocast bf16": partial(_autocast, torch.bfloat16),
    "autocast fp16": partial(_autocast, torch.float16),
    "autocast bf16, peft kernels": partial(_autocast, torch.bfloat16, kernels="peft"),
    **{f"7B, layers={layers}": _seven(layers) for layers in (1, 3)},
    **{f"7B all-linear, layers={layers}": _seven(layers, lora=ALL) for layers in (1, 3)},
    **{f"7B recompute all, layers={layers}": _seven(layers, recompute="all") for layers in (1, 3)},
    **{f"7B offload, tokens={tokens}": _seven(3, tokens=tokens, recompute="offload") for tokens in (8192, 16_384)},
    **{
        f"7B all-linear offload, tokens={tokens}": _seven(3, tokens=tokens, recompute="offload", lora=ALL)
        for tokens in (8192, 16_384)
    },
    **{f"7B, tokens={tokens}": _seven(3, tokens=tokens) for tokens in (8192, 16_384)},
    **{
        f"{name}, layers={layers}": _seven(layers, share=0.5, **options)
        for name, options in _TIMED.items()
        for layers in (2, 3)
    },
}
