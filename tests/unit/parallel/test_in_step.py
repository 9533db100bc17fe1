"""Ranks with different amounts of work use sharded models without hanging, and with the weights of one rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from finetune.parallel.in_step import in_step
from finetune.parallel.sharding import whole
from finetune.system.errors import FinetuneError


class Packed(nn.Module):
    """A layer with frozen codes, as 4-bit weights have, and scales."""

    def __init__(self, width: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 256, (width * width, 1), dtype=torch.uint8, generator=generator)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(torch.randn(width, generator=generator), requires_grad=False)

    def forward(self, x):
        weight = self.codes.view(len(self.scales), -1).float() / 256 - 0.5
        return torch.tanh(x @ weight * self.scales)


class Toy(nn.Module):
    """An embedding, layers, and a head that is read, not called."""

    def __init__(self, seed: int, layers: int = 2):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 6).requires_grad_(False)
        self.layers = nn.ModuleList(Packed(6, seed + number) for number in range(layers))
        self.head = nn.Linear(6, 11, bias=False).requires_grad_(False)

    def shard(self) -> Toy:
        for part in (self.embed, *self.layers, self.head):
            fully_shard(part, reshard_after_forward=True)
        return self

    @torch.no_grad()
    def forward(self, token: int):
        x = self.embed(torch.tensor([token]))
        for layer in self.layers:
            x = layer(x)
        with whole(self.head):
            return x @ self.head.weight.t()


def same_weights(rank: int) -> None:
    one, two = Toy(1), Toy(2, layers=3)
    expected = {(id(model), token): model(token) for model in (one, two) for token in range(5)}
    one.shard()
    two.shard()
    plans = {  # by rank: another number of passes, and another order of the models
        0: [(one, 0), (two, 1), (one, 2), (one, 3), (two, 4)],
        1: [(two, 0), (two, 3), (one, 1)],
    }
    for _ in range(2):
        with in_step(one, two):
            for model, token in plans[rank]:
                torch.testing.assert_close(model(token), expected[id(model), token], rtol=0, atol=0)
                with in_step(one):  # adds nothing
                    model(token)
        dist.barrier()
        with in_step(one, two):
            if rank == 1:
                one(2)
                with whole(one.head):  # a rank that holds the head helps another one to it
                    two(1)
            else:
                torch.testing.assert_close(one(4), expected[id(one), 4], rtol=0, atol=0)
    one(3)  # outside, all ranks make the same passes


def one_rank_fails(rank: int) -> None:
    model = Toy(1).shard()
    with pytest.raises((FinetuneError, IndexError)) as failed, in_step(model):
        for token in (1, 2, 99 if rank == 1 else 3, 4, 5):
            model(token)
    assert failed.type is (IndexError if rank == 1 else FinetuneError)
    assert rank == 1 or ("rank 1 failed" in str(failed.value) and "IndexError" in str(failed.value))
    with pytest.raises((FinetuneError, KeyError)), in_step(model):
        if rank == 0:
            raise KeyError("the other rank has no work left")


def an_unknown_model_is_refused(rank: int) -> None:
    one, two = Toy(1).shard(), Toy(2).shard()
    with pytest.raises(RuntimeError, match="lacks"), in_step(one), in_step(two):
        pass


def _start(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        for check in (same_weights, one_rank_fails, an_unknown_model_is_refused):
            check(rank)
    finally:
        dist.destroy_process_group()


def test_two_ranks(tmp_path):
    """All checks in one pair of processes, which takes seconds to start."""
    torch.multiprocessing.spawn(_start, (str(tmp_path / "store"),), nprocs=2)


def test_a_model_that_is_not_sharded_costs_nothing():
    model = Toy(1)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with in_step(model):
        assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
        model(1)
