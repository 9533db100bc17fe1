"""Choose the micro-batch and the gradient checkpointing of a run so that it fits into memory."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from finetune.planning.activations import ActivationPlan, plan_activations
from finetune.planning.inputs import PlanInputs
from finetune.planning.peak_memory import PeakMemory, predict_peak
from finetune.system.accelerator import device_memory, on_gpu
from finetune.system.format import format_bytes
from finetune.system.machine import available_memory, ranks_here, resident_memory

# Tokens per forward pass from which more are no faster. On a CPU, products are at full speed by then, and every further
# token only raises the peak.
_ENOUGH_TOKENS = {"cpu": 2048}
_ENOUGH_ON_A_GPU = 8192


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How a run fits into memory.

    memory: its prediction, with the micro-batch. text: the choice and its reason, for the log.
    recompute: `train.gradient_checkpointing` with auto resolved. inputs: of the run.
    """

    memory: PeakMemory
    recompute: str | int
    text: str
    inputs: PlanInputs

    @property
    def micro_batch(self) -> int:
        """Sequences per forward pass."""
        return self.memory.micro_batch

    @property
    def predicted_peak_bytes(self) -> int:
        return round(self.memory.peak_bytes)


def largest_micro_batch(inputs: PlanInputs) -> int:
    """Return the sequences per forward pass before memory is considered: as configured, or as many as make it fast."""
    per_rank = max(1, inputs.train.batch_size // inputs.ranks)
    if inputs.train.micro_batch_size is not None:
        return min(inputs.train.micro_batch_size, per_rank)
    enough = _ENOUGH_TOKENS.get(inputs.device_type, _ENOUGH_ON_A_GPU)
    return max(1, min(per_rank, enough // inputs.data.max_length))


def choose_micro_batch(inputs: PlanInputs, free_bytes: float | None) -> BatchPlan:
    """Choose the fewest recomputed layers, then the largest micro-batch, whose activations fit.

    A given `train.micro_batch_size` and a `train.gradient_checkpointing` other than auto stay as they are. If nothing
    fits, the text has a warning. free_bytes: memory for activations; None if unknown.
    """
    setting, given = inputs.train.gradient_checkpointing, inputs.train.micro_batch_size
    wanted = micro = largest_micro_batch(inputs)
    plan = plan_activations(inputs, micro)
    while free_bytes is not None and micro > 1 and given is None:
        if plan.peak_bytes(recomputed_layers(inputs, plan, free_bytes=0.0), _offloads(inputs)) <= free_bytes:
            break
        micro //= 2
        plan = plan_activations(inputs, micro)
    count = recomputed_layers(inputs, plan, free_bytes)
    memory = predict_peak(inputs, micro, count)
    if free_bytes is None:
        recompute = "all" if setting == "auto" else setting
        text = f"memory: gradient_checkpointing={recompute}, micro_batch={micro} (the free memory is unknown)"
        return BatchPlan(memory, recompute, text, inputs)
    text = f"memory: micro_batch={micro}"
    if micro < wanted:
        text += f" (reduced from {wanted} to fit)"
    text += f", predicted_peak={format_bytes(memory.peak_bytes)}"
    text += _describe_activations(inputs, plan, count, free_bytes)
    recompute = setting if setting != "auto" else count or "none"
    return BatchPlan(memory, recompute, text, inputs)


def recomputed_layers(inputs: PlanInputs, plan: ActivationPlan, free_bytes: float | None = math.inf) -> int:
    """Return the number of layers that the setting recomputes; for auto, as many as it takes to fit.

    If the free memory is unknown (None), auto recomputes like all.
    """
    setting, reached = inputs.train.gradient_checkpointing, len(plan.kept)
    if setting == "auto" and free_bytes is not None:
        return plan.fewest(free_bytes)
    if isinstance(setting, int):
        return min(setting, reached)
    return 0 if setting == "none" else max(0, reached - 1)


def estimate_memory(inputs: PlanInputs, free_bytes: float | None) -> PeakMemory:
    """Predict the memory of a run that fits itself into the free memory.

    free_bytes: device memory that is free before the run loads, see `free_memory`; None if unknown.
    """
    return _estimate(place_embedding(inputs, free_bytes), free_bytes)


def place_embedding(inputs: PlanInputs, free_bytes: float | None) -> PlanInputs:
    """Resolve `model.embedding` to host or device. free_bytes: as for `estimate_memory`."""
    if inputs.model.embedding != "auto" or not inputs.shape:
        return inputs
    host = False
    if inputs.can_move_embedding:
        found = _estimate(inputs, free_bytes)
        host = bool(found.recomputed) or (free_bytes is not None and found.needed_bytes > free_bytes)
    return inputs.with_settings(model={"embedding": "host" if host else "device"})


def keep_copies(inputs: PlanInputs, free_bytes: float | None) -> PlanInputs:
    """Set `quant.keep_dequantized` where a CPU samples answers of a model in 4 bits, if the run fits with these copies.

    Otherwise each token dequantizes all weights, which takes most of its time. A GPU's kernels read 4-bit weights.

    free_bytes: as for `estimate_memory`.
    """
    on_cpu = inputs.samples_answers and inputs.quant.type == "nf4" and inputs.device_type == "cpu"
    on_cpu = on_cpu and inputs.shard_ranks == 1  # A sharded base keeps no whole weights.
    if not on_cpu or not inputs.shape or free_bytes is None:
        return inputs
    kept = inputs.with_settings(quant={"keep_dequantized": True})
    return kept if estimate_memory(kept, free_bytes).needed_bytes <= free_bytes else inputs


def _estimate(inputs: PlanInputs, free_bytes: float | None) -> PeakMemory:
    first = predict_peak(inputs, largest_micro_batch(inputs), 0)
    return choose_micro_batch(inputs, None if free_bytes is None else first.usable_bytes(free_bytes)).memory


def free_memory(device_type: str) -> float | None:
    """Return the bytes of device memory that a rank can have, with those that this process holds of main memory.

    None if they cannot be read without starting the device.
    """
    if on_gpu(device_type):
        found = device_memory()
        return None if found is None else float(found.free_bytes)
    free = available_memory()
    return None if free is None else free / ranks_here(os.environ) + resident_memory()


def host_shortage(memory: PeakMemory) -> str | None:
    """Return a warning if the main memory of this machine cannot hold what its ranks keep there; else None."""
    free = available_memory() / ranks_here(os.environ)
    if memory.host_bytes <= free:
        return None
    needed = f"offloaded inputs and embedding need {format_bytes(memory.host_bytes)} per rank"
    return f"WARNING: main memory: {needed}, {format_bytes(free)} is free"


def _offloads(inputs: PlanInputs) -> bool:
    return inputs.train.gradient_checkpointing == "offload" and inputs.device_type != "cpu"


def _describe_activations(inputs: PlanInputs, plan: ActivationPlan, count: int, free_bytes: float) -> str:
    setting, peak = inputs.train.gradient_checkpointing, plan.peak_bytes(count, _offloads(inputs))
    text = f", recomputed_layers={count} of {plan.layers}"
    if _offloads(inputs):
        text += f" (inputs in main memory: {format_bytes(count * plan.input)}, pinned)"
    elif setting == "offload":
        text += " (on a CPU offload is the same as all)"
    text += f", activations={format_bytes(peak)}, free={format_bytes(free_bytes)}"
    if setting == "auto" and count:
        text += f", activations_without_recomputing={format_bytes(plan.peak_bytes(0))}"
    if peak <= free_bytes:
        return text
    advice = "data.max_length" if inputs.train.micro_batch_size in (None, 1) else "train.micro_batch_size"
    text += f"\nWARNING: this may not fit\nhelp: lower {advice}"
    if setting == "none" or isinstance(setting, int):
        text += ", or set train.gradient_checkpointing=auto"
    return text
