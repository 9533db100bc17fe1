"""A frozen base split over ranks by torch's FSDP2: decoder layers, embedding and head are gathered while they compute.

Frozen tensors of the base alone are split. The adapter and all that a run trains stay whole on every rank, so
optimizers, clipping, checkpoints and saved adapters are those of data parallelism, and a checkpoint continues on any
number of ranks.
Of 4-bit weights, the codes and the scales of their blocks are split; the scales of those scales (0.25 bytes for 1,024
weights) stay in the QuantState of bitsandbytes on every rank.
Source: Zhao et al. 2023, arXiv:2304.11277; torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed import get_world_size
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from finetune.models.adapters.names import is_factor
from finetune.models.decoder import family_in
from finetune.models.fused import decoder_layers
from finetune.models.quant.quantize import quantized_layers
from finetune.parallel.in_step import gathers
from finetune.system.accelerator import on_gpu
from finetune.system.machine import malloc_trim

# Modules that an outer `whole` of this process holds.
_held: WeakSet[nn.Module] = WeakSet()


class HeadEmbedding(nn.Module):
    """The input embedding of a model that is tied to its sharded output head, and looks its rows up there."""

    def __init__(self, head: nn.Linear):
        super().__init__()
        self._head = (head,)  # not a child: the model has it by its own name

    @property
    def weight(self) -> Tensor:
        """The table [V, D]; whole inside `whole(head)`."""
        return self._head[0].weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows [..., D] of ids [...]."""
        with whole(self._head[0]):
            return F.embedding(ids, self.weight)


def shard_mesh(device: torch.device, ranks_together: int) -> DeviceMesh:
    """Return the mesh of a run in which groups of `ranks_together` neighboring ranks hold one copy of the base."""
    ranks = get_world_size()
    if ranks_together == ranks:
        return init_device_mesh(device.type, (ranks,))
    shape = (ranks // ranks_together, ranks_together)
    return init_device_mesh(device.type, shape, mesh_dim_names=("copies", "parts"))


def shard_base(base: PreTrainedModel, mesh: DeviceMesh, device: torch.device, offload: bool = False) -> None:
    """Keep this rank's part of the frozen tensors of the decoder layers, the embedding and the head.

    The tensors may be mapped files on the CPU: a rank reads its part alone. Everything else moves to the device whole.
    A trained embedding or head stays whole. One pass at the end joins all parts, so all ranks must call this.

    Args:
        base: a transformers model, with its adapter.
        mesh: from `shard_mesh`.
        device: where the run computes.
        offload: keep the parts in main memory, from which each gather copies them to the device.
    """
    policy: OffloadPolicy = CPUOffloadPolicy(pin_memory=on_gpu(device)) if offload else OffloadPolicy()
    place = torch.device("cpu") if offload else device
    options: dict[str, Any] = {"mesh": mesh, "offload_policy": policy}
    _tie_to_head(base)
    layers = [layer for _, layer in decoder_layers(base)]
    for layer in layers:
        _move_scales(layer, device)
        _shard(layer, place, options)
        layer.register_forward_pre_hook(_bind_scales)
    tables: list[Any] = [table for table in map(_plain_table, _tables(base)) if table is not None]
    for table in tables:
        # `whole` frees a head. An embedding frees itself: it runs once in a pass.
        _shard(table, place, {**options, "reshard_after_forward": isinstance(table, nn.Embedding)})
    whole_tensors = {tensor for tensor in base.parameters() if not isinstance(tensor, DTensor)}
    fully_shard(base, ignored_params=whole_tensors, **options)  # the root, which splits nothing itself
    _move_whole(base, device)
    for before, layer in pairwise([layers[0], *layers]):
        # By default torch gathers what ran before a layer in any pass, so also in evaluations, where ranks differ. A
        # layer itself is gathered already.
        layer.set_modules_to_backward_prefetch([before if on_gpu(device) else layer])
    if on_gpu(device):  # a CPU gathers while it waits
        for layer, after in pairwise(layers):
            vars(layer)["prefetched"] = [after]  # `in_step` pauses it
            layer.set_modules_to_forward_prefetch([after])
    # Backward ends with the lowest trained layer. By default it would also gather the layer or embedding before it.
    lowest = next((layer for layer in layers if any(each.requires_grad for each in layer.parameters())), layers[0])
    lowest.set_modules_to_backward_prefetch([lowest])
    malloc_trim()
    training = base.training
    with torch.no_grad():  # torch makes the module that runs first the root of its parts
        base.eval()(torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)
    base.train(training)
    for table in tables:
        table.reshard()  # a rank that kept it would leave out the next gather


def is_sharded(module: nn.Module) -> bool:
    """Return whether a part of a module is split over ranks."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def is_plain_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer of torch, split or not, without hooks of anything else."""
    if isinstance(module, FSDPModule):
        return type(module).__mro__[2] is nn.Linear
    wrapped = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is nn.Linear and not wrapped


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Hold the weights of a sharded module, as the head, on this rank.

    Inside another `whole` of the same module it does nothing. Outside `in_step`, all ranks enter it the same number of
    times.
    """
    parts = [part for part in module.modules() if isinstance(part, FSDPModule) and part not in _held]
    for part in parts:
        gathers(part)
        part.unshard()
        _held.add(part)
    try:
        yield
    finally:
        for part in parts:
            _held.remove(part)
            part.reshard()


def _tables(base: PreTrainedModel) -> Sequence[nn.Module]:
    family = family_in(base)
    return [base.get_submodule(family.embedding), base.get_submodule(family.head)]


def _plain_table(table: nn.Module) -> nn.Module | None:
    """Return the frozen table in an embedding or a head, inside its LoRA layer; None for a trained one."""
    if isinstance(table, BaseTunerLayer):
        table = table.get_base_layer()
    return table if type(table) in (nn.Embedding, nn.Linear) and not table.weight.requires_grad else None


def _tie_to_head(base: PreTrainedModel) -> None:
    """Let a tied embedding read the head: a tensor cannot be in two parts."""
    embedding, head = _tables(base)
    if type(embedding) is nn.Embedding and type(head) is nn.Linear and embedding.weight is head.weight:
        base.set_input_embeddings(HeadEmbedding(head))


def _move_scales(layer: nn.Module, device: torch.device) -> None:
    """Make the scales of the blocks of each 4-bit weight a parameter of its module, which is split like the codes."""
    for _, linear in quantized_layers(layer, "nf4"):
        state = linear.weight.quant_state
        linear.quant_state = state
        vars(linear)["weight_class"] = type(linear.weight)
        vars(linear)["weight_options"] = vars(linear.weight).copy()
        linear.register_parameter("absmax", nn.Parameter(state.absmax, requires_grad=False))
        state.absmax = state.absmax.new_empty(0)
        kept = [(state, "code")]
        if state.nested:
            kept += [(state, "offset"), (state.state2, "code"), (state.state2, "absmax")]
        for owner, name in kept:  # copied: a view of a mapped file keeps all its pages
            setattr(owner, name, getattr(owner, name).to(device, copy=True))


def _bind_scales(layer: nn.Module, _: Any) -> None:
    """Give the gathered weights of a layer their QuantState with the gathered scales.

    FSDP gathers into the same object each time, so a recomputed layer, which runs no hook, finds it there. PEFT looks
    at its class.
    """
    for _, linear in quantized_layers(layer, "nf4"):
        linear.quant_state.absmax = linear.absmax
        weight = linear.weight
        if not hasattr(weight, "quant_state"):
            weight.__class__ = vars(linear)["weight_class"]
            vars(weight).update(vars(linear)["weight_options"])
        weight.quant_state = linear.quant_state


def _shard(module: nn.Module, place: torch.device, options: dict[str, Any]) -> None:
    """Split the frozen tensors of a module; this rank copies its part alone."""
    kept = {tensor for name, tensor in module.named_parameters() if tensor.requires_grad or is_factor(name)}
    frozen = {name: tensor for name, tensor in module.named_parameters() if tensor not in kept}
    for name, tensor in frozen.items():
        owner, _, key = name.rpartition(".")
        empty = nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)
        setattr(module.get_submodule(owner), key, empty)
    fully_shard(module, ignored_params=kept, **options)
    module._apply(lambda tensor: torch.empty_like(tensor, device=place) if tensor.is_meta else tensor)
    parts = dict(module.named_parameters())
    for name, tensor in frozen.items():
        part: Any = parts[name]
        local, mesh = part.to_local(), part.device_mesh
        split = mesh.size(mesh.ndim - 1)
        number = mesh.get_local_rank(mesh.ndim - 1)
        first = number * -(-len(tensor) // split)  # as torch.chunk splits
        local.copy_(tensor.data[first : first + len(local)])


def _move_whole(base: nn.Module, device: torch.device) -> None:
    """Move the tensors that are not split to the device: the adapter, norms outside of layers, towers, tables."""
    for parameter in base.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device)
    for module in base.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device), persistent=name not in module._non_persistent_buffers_set)
