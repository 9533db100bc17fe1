"""Memory and work of the answers that a run generates to learn from rewards (evaluation/generation.py).

Names: N answers of a batch, P tokens of a prompt, A tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune.ops import limits
from finetune.planning.inputs import PlanInputs

# Lost in a CPU's heap per byte of the cache, whose tensors are replaced by longer ones at each token: measured on 24
# layers of 0.5B with 32 answers of 424 tokens.
_CACHE_HOLES = 0.4


@dataclass(frozen=True, slots=True)
class AnswerBatch:
    """The largest batch of answers. count: N. tokens: P + A. prompt_rows: tokens of all its prompts."""

    count: int
    tokens: int
    prompt_rows: int
    sampled: bool


def sampled_batch(inputs: PlanInputs) -> AnswerBatch:
    """Return a batch of answers to learn from, which compute their prompt once."""
    group, tokens = inputs.reward.group_size, inputs.answered_tokens
    most = min(limits.SAMPLED_ANSWERS // group, limits.SAMPLED_TOKENS // (group * tokens), inputs.rank_sequences)
    prompts = max(1, most)
    return AnswerBatch(prompts * group, tokens, prompts * (tokens - inputs.reward.max_new_tokens), True)


def evaluated_batch(inputs: PlanInputs) -> AnswerBatch:
    """Return a batch of answers to held-out prompts."""
    count, tokens = min(inputs.generation.batch_size, inputs.generation.num_examples), inputs.answered_tokens
    return AnswerBatch(count, tokens, count * (tokens - inputs.reward.max_new_tokens), False)


def answer_bytes(inputs: PlanInputs, batch: AnswerBatch) -> dict[str, float]:
    """Return the bytes per part as a batch of answers ends: every answer has its full length."""
    on_cpu, layers = inputs.device_kind == "cpu", len(inputs.adapted)
    cache = cache_bytes(inputs, batch.count * batch.tokens)
    # The logits of this token and of the one before: fp32 on a GPU.
    width = inputs.value_bytes if on_cpu else 4
    logits = 2 * batch.count * inputs.shape["vocab_size"] * width
    # fp32 copies of logits in 16 bit: of this block of rows and of the one before.
    copied = min(batch.count, 2 * limits.ROWS_DRAWN) if batch.sampled and width < 4 else 0
    draws = 4 * copied * inputs.shape["vocab_size"]
    return {
        # A layer's keys and values are copied as they grow.
        "key-value cache": cache * (1 + 1 / layers),
        "logits of answers": logits + draws,
        "holes in the heap": _CACHE_HOLES * cache if on_cpu else 0.0,
    }


def cache_bytes(inputs: PlanInputs, tokens: int) -> float:
    """Return the bytes of keys and values of all layers."""
    return 2.0 * len(inputs.adapted) * tokens * inputs.linears["k_proj"][0] * inputs.value_bytes


@dataclass(frozen=True, slots=True)
class SamplingWork:
    """The work of sampling on one rank, per optimizer step.

    passes: forward passes of one token of each answer. rows: answers of a pass. weights: per linear of all layers, and
    of the head.
    """

    passes: float
    rows: int
    weights: dict[str, int]


def sampling_work(inputs: PlanInputs) -> SamplingWork:
    """Compute the work of sampling answers of full length; the pass over their prompts is small beside it."""
    rows, layers = sampled_batch(inputs).count, len(inputs.adapted)
    batches = math.ceil(inputs.rank_sequences * inputs.reward.group_size / rows)
    weights = {name: layers * math.prod(linear) for name, linear in inputs.linears.items()}
    passes = batches * inputs.reward.max_new_tokens / inputs.updates
    return SamplingWork(passes, rows, weights | {"head": inputs.table_values})
