"""Trace one training step of a Qwen2.5 size and print memory, kernels and synchronizations.

python -m tests.cuda_trace [size=7B] [tokens=2048] [count=1] [targets=q_proj,v_proj|all-linear] [rank=8]
                           [recompute=none|all|offload|N] [embedding=device|host] [share=1.0] [compiled=true]
                           [capability=9.0] [layers=]
                           [device=h200|4090]: the ideal time of the step, by kind of kernel
"""

from __future__ import annotations

import sys
import time

from tests.cuda_trace.stub import load_stub

load_stub()

from benchmarks.flops import step_flops  # noqa: E402 - the stub comes before torch
from finetune.config.schema import LoraConfig  # noqa: E402
from finetune.models.families import QWEN25_SHAPES  # noqa: E402
from tests.cuda_trace.roofline import DEVICES, Device, seconds_by  # noqa: E402
from tests.cuda_trace.trace import Step, trace_step  # noqa: E402


def main(words: list[str]) -> None:
    options = {
        "size": "7B",
        "tokens": "2048",
        "count": "1",
        "targets": "q_proj,v_proj",
        "rank": "8",
        "recompute": "none",
        "embedding": "device",
        "share": "1.0",
        "compiled": "true",
        "capability": "9.0",
        "layers": "",
        "device": "",
    } | dict(word.split("=", 1) for word in words)
    shape = dict(QWEN25_SHAPES[options["size"]]) | {"rms_norm_eps": 1e-6}
    if options["layers"]:
        shape["num_hidden_layers"] = int(options["layers"])
    targets = "all-linear" if options["targets"] == "all-linear" else options["targets"].split(",")
    recompute = int(options["recompute"]) if options["recompute"].isdecimal() else options["recompute"]
    major, minor = options["capability"].split(".")
    began = time.perf_counter()
    step = trace_step(
        shape,
        tokens=int(options["tokens"]),
        count=int(options["count"]),
        share=float(options["share"]),
        lora=LoraConfig(rank=int(options["rank"]), target_modules=targets),
        recompute=recompute,
        embedding=options["embedding"],
        compiled=options["compiled"] == "true",
        capability=(int(major), int(minor)),
    )
    print({key: options[key] for key in ("size", "tokens", "targets", "rank", "recompute", "embedding", "compiled")})
    gb = {"static": step.static / 1e9, "peak": step.peak / 1e9, "host": step.host_peak / 1e9}
    print(f"traced in {time.perf_counter() - began:.0f} s; GB: {', '.join(f'{k} {v:.3f}' for k, v in gb.items())}")
    print(f"kernels {step.launches}; synchronizations {step.syncs}")
    for label, size in step.largest:
        print(f"  {size / 1e6:9.1f} MB  {label}")
    if options["device"]:
        _print_ideal(step, DEVICES[options["device"]], shape, int(options["tokens"]), float(options["share"]))


def _print_ideal(step: Step, device: Device, shape: dict, tokens: int, share: float) -> None:
    kinds = seconds_by("kind", step.kernels, device)
    total = sum(kinds.values())
    flops = step_flops(shape, tokens, share * tokens)
    print(
        f"ideal {1e3 * total:.1f} ms, {tokens / total:,.0f} tokens/s, "
        f"modeled share {flops / total / device.ceiling_flops:.1%} of {device.ceiling_flops / 1e12:.0f} TFLOP/s"
    )
    for kind, seconds in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"  {1e3 * seconds:9.2f} ms  {kind}")
    slowest = sorted(step.kernels.items(), key=lambda item: -item[0].seconds(device) * item[1])
    for kernel, count in slowest[:25]:
        flops, read, written = kernel.cost
        print(
            f"  {1e3 * count * kernel.seconds(device):9.2f} ms  {count} x {kernel.phase} {kernel.name} {kernel.place} "
            f"({flops / 1e9:.1f} GFLOP, {read / 1e6:.1f} + {written / 1e6:.1f} MB)"
        )


main(sys.argv[1:])
