"""What ranks exchange in an optimizer step, and how long they wait for it.

Collectives run in a ring: of R ranks, each sends (R-1)/R of the gathered bytes, and twice that share of reduced ones.
Source: Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from finetune.planning.inputs import PlanInputs
from finetune.planning.peak_memory import PeakMemory
from finetune.planning.sampling import sampling_work
from finetune.planning.static_memory import DTYPE_BYTES, gathered_layer_bytes, linear_shapes, padded_bytes
from finetune.system.format import format_bytes

# Data sheets: bytes per second of PCIe 4.0 with 16 lanes, in one direction.
PCIE_BYTES = 32e9
# Share of a data sheet's speed that collectives reach, and the network of a node: assumptions, named in the output.
_ASSUMED_SHARE, _ASSUMED_NETWORK = 0.7, 100e9 / 8
# Bytes per second between two processes of an idle machine by gloo: an assumption.
_ASSUMED_GLOO = 1e9
# Two ranks of gloo send and receive by one connection, and use this share of a link that carries its full rate in both
# directions at once. Rings of more ranks have a connection for each direction (python -m benchmarks.gathers).
_GLOO_PAIR_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class Link:
    """Speeds in bytes per second and direction.

    inside: from a rank to the next one in its node. between: from a node to the next one.
    host: from main memory to the device. source: of these speeds, as text.
    overlaps: whether a layer computes while the next one is gathered. With gloo on a CPU, nothing overlaps, and two
        ranks do not send and receive at once.
    """

    inside: float
    between: float
    host: float
    overlaps: bool
    source: str


def link_of(inputs: PlanInputs, link_gbps: float | None, inside: float | None) -> Link:
    """Return the links of a run.

    Args:
        link_gbps: 10^9 bits per second between nodes, or between the ranks of the only node; None: assumed.
        inside: bytes per second between the GPUs of a node by their data sheet; None: unknown.
    """
    on_gpu, several, given = inputs.on_gpu, inputs.nodes > 1, link_gbps and link_gbps * 1e9 / 8
    between = given if given and several else _ASSUMED_NETWORK
    speed = (inside or PCIE_BYTES) * _ASSUMED_SHARE if on_gpu else _ASSUMED_GLOO
    what = f"assumed: {speed / 1e9:.3g} GB/s between {'GPUs' if on_gpu else 'processes'} of a node"
    if several:
        what += f", {'given' if given else 'assumed'}: {between * 8 / 1e9:g} Gbit/s between nodes"
    elif given:
        speed, what = given, f"given: {link_gbps:g} Gbit/s between {'GPUs' if on_gpu else 'processes'}"
    return Link(speed, between, PCIE_BYTES * _ASSUMED_SHARE, on_gpu, what)


@dataclass(frozen=True, slots=True)
class StepTraffic:
    """What the collectives of a step result in, in bytes, before the shares of a ring.

    passes: forward passes with a backward pass. forward, backward: bytes of each layer in the order of its gathers.
    tables: embedding and head, once per forward pass. other: forward passes without gradients, each of all weights.
    teacher: gathered bytes of a pass of a sharded teacher. trained: gradients, exchanged once.
    """

    passes: int
    forward: Sequence[int]
    backward: Sequence[int]
    tables: int
    other: int
    teacher: int
    trained: int

    @property
    def parts(self) -> dict[str, int]:
        """Return the bytes of a step by purpose."""
        layers = self.passes * (sum(self.forward) + sum(self.backward))
        other = self.other * (sum(self.forward) + self.tables)
        parts = {
            "layers": layers,
            "embedding and head": self.passes * self.tables,
            "passes without gradients": other,
            "teacher": self.passes * self.teacher,
            "gradients": self.trained,
        }
        return {name: size for name, size in parts.items() if size}


def step_traffic(inputs: PlanInputs, micro_batch: int) -> StepTraffic:
    """Count what the ranks of a run gather and reduce in a step.

    A layer is gathered in the forward pass and again in the backward pass, which recomputes it too. The backward pass
    ends at the lowest layer with a trained weight. The loss gathers the head once: it makes its gradient at once.
    """
    passes = math.ceil(inputs.step_sequences / micro_batch)
    trained = 4 * inputs.static.trained if inputs.ranks > 1 else 0
    if inputs.shard_ranks == 1:
        return StepTraffic(passes, (), (), 0, 0, 0, trained)
    layers = gathered_layer_bytes(inputs.shape, inputs.model, inputs.quant, inputs.shard_ranks)
    # Of a tied table too: the embedding and the head gather it by turns.
    row_bytes = inputs.shape["hidden_size"] * inputs.value_bytes
    tables = 2 * padded_bytes(inputs.shape["vocab_size"], row_bytes, inputs.shard_ranks)
    other = passes if inputs.runs_reference else 0
    if inputs.samples_answers:
        other += math.ceil(sampling_work(inputs).passes)
    backward = layers[: inputs.first_trained_layer - 1 if inputs.first_trained_layer else None : -1]
    return StepTraffic(passes, layers, backward, tables, other, _teacher_bytes(inputs), trained)


def _teacher_bytes(inputs: PlanInputs) -> int:
    """Return the gathered bytes of a pass of a resident teacher; 0 if none runs in training steps."""
    shape, teacher = inputs.teacher_shape, inputs.distill.teacher
    if shape is None or inputs.distill.objective == "none" or teacher.placement != "resident":
        return 0
    weights = sum(map(math.prod, linear_shapes(shape).values())) * shape["num_hidden_layers"]
    return (weights + 2 * shape["vocab_size"] * shape["hidden_size"]) * DTYPE_BYTES[teacher.dtype]


def sent_bytes(inputs: PlanInputs, micro_batch: int) -> dict[str, float]:
    """Return the bytes that a rank sends in a step, by purpose; {} for a single rank."""
    shares = {"gradients": 2 * _share(inputs.ranks)}
    parts = step_traffic(inputs, micro_batch).parts
    return {name: size * shares.get(name, _share(inputs.shard_ranks)) for name, size in parts.items()}


def describe_sent(sent: Mapping[str, float]) -> str:
    """Return the bytes of `sent_bytes` as text: their sum, and each purpose."""
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in sent.items())
    return f"{format_bytes(sum(sent.values()))} ({parts})"


def waiting_seconds(inputs: PlanInputs, memory: PeakMemory, layer_seconds: float, link: Link) -> dict[str, float]:
    """Return the seconds of a step in which a rank waits for others, by purpose; {} for a single rank.

    A GPU gathers the next layer while one computes, so it waits for the first one and for what takes longer than a
    layer. Embedding, head and gradients are waited for.

    Args:
        memory: the run's prediction, with the micro-batch. A recomputed layer's backward pass takes twice as long.
        layer_seconds: of a layer's forward pass, and of a backward pass that recomputes nothing.
        link: from `link_of`.
    """
    traffic = step_traffic(inputs, memory.micro_batch)
    waits: dict[str, float] = {}
    if traffic.trained:
        slowest = min(link.inside, link.between) if inputs.nodes > 1 else link.inside
        used = _used(inputs.ranks, link)
        waits["exchanging gradients"] = 2 * _share(inputs.ranks) * traffic.trained / (slowest * used)
    if inputs.shard_ranks == 1:
        return waits
    # Gathers of hybrid sharding stay in a node.
    outside = inputs.shard_ranks > inputs.ranks // inputs.nodes
    speed = min(link.inside, link.between) if outside else link.inside
    per_byte = _share(inputs.shard_ranks) / (speed * _used(inputs.shard_ranks, link))
    if inputs.base_on_host:
        per_byte += 1 / inputs.shard_ranks / link.host
    reached = len(traffic.backward)
    # Backward runs from the highest layer down; the lowest ones are recomputed.
    backward = [layer_seconds * (2 if i >= reached - memory.recomputed else 1) for i in range(reached)]
    forward = [layer_seconds] * len(traffic.forward)
    per_pass = traffic.tables * per_byte
    for sizes, seconds in ((traffic.forward, forward), (traffic.backward, backward)):
        per_pass += sum(_waits([size * per_byte for size in sizes], seconds, link.overlaps))
    rest = traffic.parts.get("passes without gradients", 0) + traffic.parts.get("teacher", 0)
    waits["gathering weights"] = traffic.passes * per_pass + rest * per_byte
    return waits


def _waits(gathers: Sequence[float], computes: Sequence[float], overlaps: bool) -> Iterator[float]:
    """Yield how long each layer waits for its weights, which are gathered while the layer before it computes."""
    for i, gather in enumerate(gathers):
        yield max(0.0, gather - computes[i - 1]) if overlaps and i else gather


def _share(ranks: int) -> float:
    return (ranks - 1) / ranks


def _used(ranks: int, link: Link) -> float:
    """Return the share of a link's speed that a ring reaches."""
    return 1.0 if link.overlaps or ranks > 2 else _GLOO_PAIR_SHARE
