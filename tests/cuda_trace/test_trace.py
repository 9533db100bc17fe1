"""Laws of the CUDA path, traced in a process of its own without a GPU: see cases.py for the paths."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from finetune.ops.limits import LOGITS_VALUES
from tests.cuda_trace.cases import CASES, SMALL, SMALL_TOKENS
from tests.cuda_trace.conftest import Results
from tests.cuda_trace.plans import PLANS
from tests.cuda_trace.stub import has_compiler

pytestmark = pytest.mark.skipif(not has_compiler(), reason="needs g++, which builds the stub of a CUDA device")

# The cases of a quick run of the suite; tests/slow.py holds the others.
_QUICK = [
    "q and v",
    "deterministic",
    "not compiled, all-linear",
    "offload",
    "head trained",
    "teacher jsd",
    "sampled answers",
]
# What a training step waits for: its loss, and the norm of its gradient.
_OF_A_STEP = {"loss: _local_scalar_dense": 1, "optimizer: _local_scalar_dense": 1}
_OF_OTHERS = {
    # bitsandbytes finds the outliers of each int8 layer on the CPU.
    "some in int8": {"forward: int8_vectorwise_quant": 2, **_OF_A_STEP},
    # Reading a small model into GPU memory: its norm, its head, one layer after the other.
    "teacher streamed": {
        "batch: copy": 3,
        "forward: copy": 3,
        "forward: _unique2": 1,
        "forward: _local_scalar_dense": 128,
    },
    # A generated token's id goes to the CPU, which gathers its embedding.
    "embedding on host, greedy answers": {"forward: copy": 11, "forward: _local_scalar_dense": 5},
    "embedding on host, evaluation": {"forward: _local_scalar_dense": 2},
    "evaluation": {"forward: _local_scalar_dense": 2},
    "evaluation, peft kernels": {"forward: _local_scalar_dense": 2},
    "evaluation with a teacher": {"forward: copy": 2, "forward: _local_scalar_dense": 2},
    # Each token goes to the CPU, which finds out whether its answer ends.
    "greedy answers": {"forward: copy": 8, "forward: _local_scalar_dense": 5},
    # A fake tensor's list reads each value: ten tokens, and at the end their log-probabilities.
    "sampled answers": {"forward: copy": 11, "forward: _local_scalar_dense": 20},
}
# The most kernels of a decoder layer, forward and backward: lower them with the code.
_LAUNCHES = {"7B": (27, 37), "7B all-linear": (38, 60), "7B recompute all": (28, 61)}
# The most bytes per further token of a document, of three layers: lower them with the code. Runs that offload have
# their peak in the backward pass of attention.
_BYTES_A_TOKEN = {"7B": 369_550, "7B offload": 91_008, "7B all-linear offload": 91_008}

# Backward passes of attention, which add in no fixed order on CUDA unless torch's deterministic algorithms are on.
_ATTENTION = {"_varlen_attn_backward", "_scaled_dot_product_efficient_attention_backward"}
# Other operations that do, whatever `train.deterministic` says. index_put_ and embedding_dense_backward sort first.
# Source: the documentation of torch.use_deterministic_algorithms, and ScanUtils.cuh of ATen for cumsum.
_UNORDERED = set(
    "index_add index_add_ index_reduce index_reduce_ scatter_add scatter_add_ scatter_reduce scatter_reduce_ put put_ "
    "histc bincount median kthvalue nll_loss2d_forward _embedding_bag_backward _ctc_loss_backward "
    "_scaled_dot_product_flash_attention_backward _scaled_dot_product_cudnn_attention_backward".split()
) | {"cumsum of one row"}


@pytest.mark.parametrize("name", _QUICK)
def test_a_path_keeps_the_laws(results: Results, name: str) -> None:
    _check_laws(results, name)


@pytest.mark.parametrize("name", [name for name in CASES if name not in _QUICK])
def test_other_paths_keep_the_laws(results: Results, name: str) -> None:
    _check_laws(results, name)


def _check_laws(results: Results, name: str) -> None:
    """Assert that a path runs on a GPU, waits for it only where known, and has no tensor of tokens x vocabulary."""
    figures, waits = results.of(name), Counter[str]()
    for place, count in figures["syncs"].items():
        phase, operation, *_ = place.split(" ")
        waits[f"{phase} {'copy' if operation == 'pageable' else operation}"] += count
    assert dict(waits) == _OF_OTHERS.get(name, _OF_A_STEP)
    chunk = LOGITS_VALUES["gpu"] + SMALL["vocab_size"]
    assert chunk < SMALL_TOKENS * SMALL["vocab_size"] / 2
    assert name.startswith("7B") or figures["widest"] <= chunk
    _check_order(figures, name.startswith("deterministic"))


def _check_order(figures: dict[str, Any], deterministic: bool) -> None:
    """Assert that attention alone adds in no fixed order, and not even attention where the run is deterministic."""
    names, fixed = set(figures["names"]), set(figures["fixed"])
    assert not _UNORDERED & (names | fixed)
    assert fixed <= _ATTENTION | {"detach", "device", "zeros"}
    assert bool(fixed & _ATTENTION) == deterministic
    assert not (deterministic and names & _ATTENTION)


@pytest.mark.parametrize("name", _LAUNCHES)
def test_launches_a_layer(results: Results, name: str) -> None:
    one, three = (results.of(f"{name}, layers={layers}")["launches"] for layers in (1, 3))
    found = tuple((three[phase] - one[phase]) / 2 for phase in ("forward", "backward"))
    assert all(now <= most for now, most in zip(found, _LAUNCHES[name], strict=True)), found


@pytest.mark.parametrize("name", _BYTES_A_TOKEN)
def test_bytes_a_token(results: Results, name: str) -> None:
    short, long = (results.of(f"{name}, tokens={tokens}")["peak"] for tokens in (8192, 16_384))
    assert (long - short) / 8192 <= _BYTES_A_TOKEN[name]


@pytest.mark.parametrize("name", PLANS)
def test_the_plan_is_what_is_allocated(results: Results, name: str) -> None:
    plan, figures = PLANS[name].predicted(), results.of(name)
    predicted, traced = plan.peak_bytes, figures["peak"]
    print(f"{name}: predicted {predicted / 1e9:.3f} GB, traced {traced / 1e9:.3f} GB, {predicted / traced - 1:+.1%}")
    assert predicted == pytest.approx(traced, rel=0.03)
    assert plan.host_bytes == pytest.approx(figures["host_peak"], rel=0.03)
