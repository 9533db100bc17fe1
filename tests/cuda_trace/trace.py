"""Run the package's own training step over fake tensors on cuda:0: shapes, devices and dtypes without values.

A 7B with 340,000 tokens takes seconds. Fake kernels have no inside: `Tracker` adds the workspace of flash attention by
formula. Not traced: streams, time, what the allocator reserves beside what it hands out (cuBLAS workspaces too).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen2Config

from finetune.config.schema import LoraConfig, QuantConfig, TrainConfig
from finetune.data.batch import build_batch
from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.losses.cross_entropy import CrossEntropy
from finetune.models.adapters.attach import attach_lora
from finetune.models.fused import fuse_layers
from finetune.models.gradient_checkpointing import apply_gradient_checkpointing
from finetune.models.quant import four_bit
from finetune.models.quant.quantize import quantized_layers, storage_in
from finetune.ops import attention, dequantize, dispatch
from finetune.training.optimizer import build_optimizer
from tests.cuda_trace.tracker import Tracker

GPU = torch.device("cuda", 0)
# Kernels that Inductor emits for a compiled function: a softmax reads its rows twice.
_TWO_KERNELS = ("softmax", "kl")
_TRACKERS: list[Tracker] = []


class _FakeMode(FakeTensorMode):
    # Fake tensors start no device, whatever torch.cuda.is_available answers here.
    avoid_device_init = True


class _Stream:
    """A CUDA stream that orders nothing."""

    def __init__(self, *_: Any, **__: Any): ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return mock.MagicMock()

    def synchronize(self) -> None: ...


@contextmanager
def _on_stream(stream: Any) -> Iterator[None]:
    yield


def _compile(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
    """Stand in for torch.compile: one or two kernels, and only the results take memory."""
    launches = 2 if any(word in function.__name__ for word in _TWO_KERNELS) else 1

    def call(*args: Any) -> Any:
        tracker = _TRACKERS[-1]  # the package keeps what torch.compile returned
        with tracker.compiled(function.__name__, launches):
            out = function(*args)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                tracker.note(x, f"compiled {function.__name__} {tuple(x.shape)} {str(x.dtype)[6:]}")
        return out

    return call


def _parameter(data: torch.Tensor, requires_grad: bool = False, **options: Any) -> nn.Parameter:
    """Stand in for Params4bit, which a fake tensor cannot become: a parameter with its attributes."""
    made = nn.Parameter(data, requires_grad=False)
    for key, value in options.items():
        setattr(made, key, value)
    return made


_module_to = nn.Module.to


def _to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    # What is made under `with device` is where it belongs, and a fake parameter cannot be swapped.
    fakes = [isinstance(x, FakeTensor) for x in (*module.parameters(), *module.buffers())]
    return module if fakes and all(fakes) else _module_to(module, *args, **kwargs)


@contextmanager
def fake_gpu(
    tracker: Tracker, capability: tuple[int, int] = (9, 0), compiled: bool = True, memory_bytes: int = 80 * 10**9
) -> Iterator[None]:
    """Let torch.cuda answer like a process with one GPU, and follow its tensors with the tracker."""
    _TRACKERS.append(tracker)
    attention.varlen_kernel.cache_clear()
    dequantize._buffers.clear()
    # bitsandbytes fills these tables at their first use, which must not be with fake tensors.
    bnb_functional.name2qmap.setdefault("dynamic", bnb_functional.create_dynamic_map())
    bnb_functional.name2qmap.setdefault("udynamic", bnb_functional.create_dynamic_map(signed=False))
    # The fake of bitsandbytes 0.50 compares a Size with a list, which are never equal.
    torch.library.register_fake(
        "bitsandbytes::dequantize_4bit.out",
        lambda A, absmax, blocksize, quant_type, shape, dtype, out: None,
        allow_override=True,
    )
    answers: Mapping[str, Any] = {
        "is_available": lambda: True,
        "get_device_capability": lambda *_: capability,
        "Stream": _Stream,
        "current_stream": lambda *_: _Stream(),
        "stream": _on_stream,
        "synchronize": lambda *_: None,
        "max_memory_allocated": lambda *_: tracker.peak,
        "memory_allocated": lambda *_: tracker.now,
        "memory_reserved": lambda *_: 0,
        "mem_get_info": lambda *_: (memory_bytes, memory_bytes),
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        for owner, name, value in (
            (nn.Module, "to", _to),
            (torch.nn.utils.clip_grad, "_has_foreach_support", lambda *_: True),
            (torch.Tensor, "record_stream", lambda self, stream: None),
            (torch.Tensor, "pin_memory", lambda self: self),
            (torch, "compile", _compile),
            (dispatch.STATE, "compiled", compiled),
            (bnb.nn, "Params4bit", _parameter),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(_FakeMode(allow_non_fake_inputs=True))
        stack.enter_context(tracker)
        yield
    attention.varlen_kernel.cache_clear()


def build_model(
    shape: Mapping[str, Any], quant: QuantConfig, lora: LoraConfig, recompute: str | int = "none", fused: bool = True
) -> nn.Module:
    """Build the adapted base as `load_base` and `attach_lora` do, from shapes in place of files."""
    attention.register()
    with unset_fake_temporarily(), torch.device("meta"):
        config = Qwen2Config(**shape)
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention.SEGMENTED)
    with unset_fake_temporarily(), mock.patch.object(bnb.nn, "Params4bit", bnb.nn.modules.Params4bit):
        quantizer = four_bit.replace_linears(base, quant, storage_in(base, quant), torch.device("cpu"))
    for _, module in list(quantized_layers(base, "nf4")):
        weight = torch.empty(module.out_features, module.in_features, dtype=base.dtype, device=GPU)
        packed, state = four_bit.quantize(weight, module.weight)
        options = {**module.weight.__dict__, "quant_state": state, "bnb_quantized": True}
        module.weight = bnb.nn.Params4bit(packed, requires_grad=False, **options)
        module.quant_state = state
    for name, parameter in list(base.named_parameters()):
        if parameter.is_meta and not isinstance(parameter, FakeTensor):
            owner, _, key = name.rpartition(".")
            value = torch.empty(parameter.shape, dtype=base.dtype, device=GPU)
            setattr(base.get_submodule(owner), key, nn.Parameter(value, requires_grad=False))
    for name, module in list(base.named_modules()):
        if any(buffer.is_meta and not isinstance(buffer, FakeTensor) for buffer in module.buffers(recurse=False)):
            with unset_fake_temporarily():
                made = type(module)(base.config)
            base.set_submodule(name, made)
            for key, buffer in list(made.named_buffers(recurse=False)):
                made.register_buffer(key, buffer.to(GPU), persistent=False)
    base.tie_weights()
    base.hf_quantizer = quantizer
    quantizer.postprocess_model(base)
    base.eval().requires_grad_(False)
    if quant.keep_dequantized:
        four_bit.keep_resident(base)
    base.name_or_path = "traced"
    with GPU:  # PEFT makes factors on the CPU and moves them, which a fake tensor cannot
        model = attach_lora(base, lora)
    if fused:
        fuse_layers(model)
    model.train()
    apply_gradient_checkpointing(model, recompute)
    return model


def documents(tokens: int, count: int = 1, share: float = 1.0) -> tuple[list[Document], int]:
    """Return documents of nearly equal length, and how many of their tokens are targets: the last share of each."""
    made, targets = [], 0
    for i in range(count):
        length = tokens // count + (i < tokens % count)
        labels = np.full(length, IGNORE_INDEX, dtype=np.int32)
        trained = max(1, int(length * share))
        labels[length - trained :] = 5
        targets += trained
        made.append(Document((np.arange(length, dtype=np.int32) * 7 + 13 * i) % 1000 + 100, labels, f"row {i}"))
    return made, targets


@dataclass
class Step:
    """What one training step does on a GPU; bytes of all tensors.

    static: after loading. peak: highest of the step. host_peak: likewise in main memory. largest: at the peak, by line.
    launches: kernels by phase. syncs: places where the CPU waits for the GPU. widest: values of the largest new tensor.
    """

    static: int
    peak: int
    host_peak: int
    largest: list[tuple[str, int]]
    launches: dict[str, int]
    syncs: dict[str, int]
    widest: int
    seconds: float = 0.0


def trace_step(
    shape: Mapping[str, Any],
    *,
    tokens: int = 2048,
    count: int = 1,
    share: float = 1.0,
    lora: LoraConfig | None = None,
    quant: QuantConfig | None = None,
    recompute: str | int = "none",
    compiled: bool = True,
    capability: tuple[int, int] = (9, 0),
) -> Step:
    """Trace the second step of a run: the first one allocates gradients and moments."""
    rows, targets = documents(tokens, count, share)
    tracker = Tracker(targets)
    lora = lora or LoraConfig()
    with fake_gpu(tracker, capability, compiled):
        model = build_model(shape, quant or QuantConfig(), lora, recompute)
        loss, optimizer = CrossEntropy(model), build_optimizer(TrainConfig(), model.named_parameters())
        for group in optimizer.param_groups:
            group["foreach"] = not group.get("fused")  # torch's own choice on CUDA, which it does not make here
        gc.collect()
        static = tracker.now
        for number in range(2):
            gc.collect()
            if number == 1:
                tracker.start_measuring()
            train_step(tracker, loss, optimizer, rows)
    return Step(
        static=static,
        peak=tracker.peak,
        host_peak=tracker.host_peak,
        largest=tracker.largest(),
        launches=dict(tracker.launches),
        syncs=dict(tracker.syncs),
        widest=tracker.widest,
    )


def train_step(tracker: Tracker, loss: nn.Module, optimizer: torch.optim.Optimizer, rows: list[Document]) -> None:
    """One step of one batch, as training/loop.py makes it."""
    tracker.phase = "batch"
    batch = build_batch(rows)
    tracker.phase = "forward"
    value = loss(batch)
    tracker.phase = "backward"
    (value / len(rows)).backward()
    value.item()
    del value
    tracker.phase = "optimizer"
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0).item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
