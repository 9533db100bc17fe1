"""A process that seems to have one GPU, and a quantized Qwen2.5 with an adapter on it, over fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from finetune.config.schema import LoraConfig, QuantConfig
from finetune.models import offload
from finetune.models.adapters.attach import attach_lora
from finetune.models.embedding import move_embedding_to_host
from finetune.models.fused import fuse_layers
from finetune.models.gradient_checkpointing import apply_gradient_checkpointing
from finetune.models.quant import eight_bit, four_bit
from finetune.models.quant.quantize import quantized_layers, storage_in
from finetune.ops import attention, dequantize, dispatch
from tests.cuda_trace.tracker import Tracker

GPU = torch.device("cuda", 0)
# Compiled functions in whose name one of these is read each row twice: for its maximum and sum, and for the result.
_READ_TWICE = ("softmax", "kl")
_TRACKERS: list[Tracker] = []


class _FakeMode(FakeTensorMode):
    # Fake tensors start no device, whatever torch.cuda.is_available answers here.
    avoid_device_init = True


class _Event:
    """A CUDA event that is always reached."""

    def __init__(self, *_: Any, **__: Any): ...
    def record(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...


class _Stream:
    """A CUDA stream that orders nothing."""

    def __init__(self, *_: Any, **__: Any): ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self, event: Any = None) -> _Event:
        return _Event()

    def synchronize(self) -> None: ...


@contextmanager
def _on_stream(stream: Any) -> Iterator[None]:
    yield


def _compile(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
    """Stand in for torch.compile: one kernel (tests/inductor_kernels.py), and only the results take memory."""
    # The package keeps what torch.compile returned: the tracker is that of the call.
    passes = 2 if any(word in function.__name__ for word in _READ_TWICE) else 1
    return lambda *args: _TRACKERS[-1].run_compiled(function, args, launches=passes, passes=passes)


def _nf4_kernel(*_: Any) -> Callable[..., None]:
    """Stand in for the Triton kernel, which takes no fake tensor: one launch that allocates nothing."""

    def dequantize_nf4(packed: torch.Tensor, absmax: torch.Tensor, out: torch.Tensor) -> None:
        packed.sum(), absmax.sum()
        out.zero_()

    return lambda packed, state, out: _TRACKERS[-1].run_compiled(dequantize_nf4, (packed, state.absmax, out), 1)


class Params4bit(FakeTensor):
    """A fake tensor with the name and the attributes of bitsandbytes' parameter."""

    def __deepcopy__(self, memo: Any) -> Params4bit:
        return self  # PEFT copies a layer to measure DoRA's norms, and does not change it


class Int8Params(FakeTensor):
    """Likewise, with the rows' scales."""


def _parameter(kind: type[FakeTensor]) -> Callable[..., nn.Parameter]:
    """Stand in for a parameter of bitsandbytes, which a fake tensor cannot become."""

    def make(data: torch.Tensor, requires_grad: bool = False, **options: Any) -> nn.Parameter:
        made = nn.Parameter(data, requires_grad=False)
        made.__class__ = kind
        for key, value in options.items():
            setattr(made, key, value)
        return made

    return make


def _pin_memory(_: torch.device, size_bytes: int) -> tuple[torch.Tensor, Callable[[], None]]:
    """Stand in for memory that CUDA pins: the tracker follows a fake tensor in its place."""
    return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True), lambda: None


_attention = F.scaled_dot_product_attention


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Call the memory-efficient kernel where a GPU does; a CPU build has no choice but plain products."""
    if args or kwargs.get("attn_mask") is not None or kwargs.get("enable_gqa") or query.device != GPU:
        return _attention(query, key, value, *args, **kwargs)
    log_sums, options = torch.is_grad_enabled(), {"is_causal": kwargs["is_causal"], "scale": kwargs["scale"]}
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, log_sums, **options)[0]


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
        "get_device_properties": lambda *_: SimpleNamespace(major=capability[0], multi_processor_count=132),
        "is_bf16_supported": lambda *_, **__: True,
        "Event": _Event,
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
            (torch.Tensor, "pin_memory", lambda self: self),
            (torch, "compile", _compile),
            (F, "scaled_dot_product_attention", _sdpa),
            (dispatch.STATE, "compiled", compiled),
            (dequantize, "nf4_kernel", _nf4_kernel),
            (bnb.nn, "Params4bit", _parameter(Params4bit)),
            (offload, "pin_memory", _pin_memory),
            (bnb.nn, "Int8Params", _parameter(Int8Params)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(_FakeMode(allow_non_fake_inputs=True))
        stack.enter_context(tracker)
        yield
    attention.varlen_kernel.cache_clear()


def build_base(
    shape: Mapping[str, Any],
    quant: QuantConfig,
    kind: str = attention.SEGMENTED,
    embedding: str = "device",
    dtype: torch.dtype = torch.bfloat16,
) -> PreTrainedModel:
    """Build a frozen base as `load_base` does, from shapes in place of files. kind: of attention in transformers."""
    attention.register()
    with unset_fake_temporarily(), torch.device("meta"):
        config = Qwen2Config(**shape)
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kind)
    if quant.type == "nf4":
        with unset_fake_temporarily(), mock.patch.object(bnb.nn, "Params4bit", bnb.nn.modules.Params4bit):
            quantizer = four_bit.replace_linears(base, quant, storage_in(base, quant), torch.device("cpu"))
    _fill(base)
    base.tie_weights()
    if quant.type == "nf4":
        base.hf_quantizer = quantizer
        quantizer.postprocess_model(base)
    base.eval().requires_grad_(False)
    if quant.keep_dequantized:
        four_bit.keep_resident(base)
    if embedding == "host":
        move_embedding_to_host(base)
    base.name_or_path = "traced"
    return base


def _fill(base: PreTrainedModel) -> None:
    """Give each tensor of a skeleton its storage on the GPU."""
    for _, module in list(quantized_layers(base, "nf4")):
        weight = torch.empty(module.out_features, module.in_features, dtype=base.dtype, device=GPU)
        packed, state = four_bit.quantize(weight, module.weight)
        options = {**module.weight.__dict__, "quant_state": state, "bnb_quantized": True}
        module.weight = bnb.nn.Params4bit(packed, requires_grad=False, **options)
        module.quant_state = state
    for _, module in list(quantized_layers(base, "int8")):
        weight = torch.empty(module.out_features, module.in_features, dtype=base.dtype, device=GPU)
        eight_bit.put_rows(module, *eight_bit.quantize_rows(weight))
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


def build_model(
    base: PreTrainedModel, lora: LoraConfig, recompute: str | int = "none", kernels: str = "fused"
) -> nn.Module:
    """Attach an adapter to a base, as a run does."""
    with GPU:  # PEFT makes factors on the CPU and moves them, which a fake tensor cannot
        model = attach_lora(base, lora)
    if kernels == "fused":
        fuse_layers(model)
    model.train()
    apply_gradient_checkpointing(model, recompute)
    return model
