"""Write the model card of the embedded base, and its loss curve as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from transformers import Qwen2Config

WIDTH, HEIGHT, MARGIN = 640, 260, 46  # size of the curve in pixels
CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [qwen2, tiny, synthetic]
---
# tiny-qwen2.5

A real, very small instruction model in the architecture of Qwen2.5, so that quantising, adapting and distilling can be
tried and tested in seconds, on a CPU and without a hub. It has nothing of Qwen's weights, text or vocabulary: it was
pretrained from nothing on synthetic instructions. It knows the tasks below and nothing else.

| | |
|---|---|
| architecture | `Qwen2ForCausalLM`, {layers} layers, hidden size {hidden}, MLP {mlp}, tied embeddings |
| attention | {heads} heads, {kv_heads} key-value heads, bias on q, k and v |
| parameters | {parameters:,}, bf16 |
| vocabulary | {tokens} byte-level BPE tokens, Qwen2's pre-tokenisation (digits one by one), {vocab} rows |
| chat | Qwen2.5's ChatML; `<|im_end|>` ends a turn, `<|endoftext|>` pads |
| text | `data/generate.py`, {seen:.1f} million tokens, no conversation drawn twice on purpose |
| made by | `python data/pretrain.py --steps {steps} --seed {seed}`, {minutes:.0f} minutes on two shared CPU cores |
| licence | Apache-2.0 |

## What it can do

Exact match of the greedy answer over {count} unseen prompts a task, in bf16 and quantised to NF4 with double
quantisation:

{table}

Some prompts and what the bf16 weights answer (a slash stands for a new line):

{shown}

## Loss

![Loss over the steps](loss.svg)

| step | nats per answer token |
|---|---|
{losses}

## What it can't do

English, facts, arithmetic beyond small sums, long conversations, and the house records of `data/sample`, which is what
the quickstart teaches it.
"""


@dataclass(frozen=True)
class Training:
    """Figures of a pretraining run for the card; losses are nats per answer token, one per step."""

    config: Qwen2Config
    parameters: int
    tokens: int
    seed: int
    seen_tokens: int
    minutes: float
    losses: Sequence[float]


def smooth(losses: Sequence[float], points: int) -> list[tuple[int, float]]:
    """Return (step, mean loss since the previous point) at evenly spaced steps; a short run has fewer points."""
    edges = sorted({round(i * len(losses) / points) for i in range(points + 1)})
    return [(b, sum(losses[a:b]) / (b - a)) for a, b in pairwise(edges)]


def loss_svg(losses: Sequence[float]) -> str:
    """Draw the loss over the steps as SVG."""
    points = smooth(losses, 100)
    top = max(loss for _, loss in points)
    right, bottom = WIDTH - MARGIN, HEIGHT - MARGIN

    def place(step: float, loss: float) -> tuple[float, float]:
        return MARGIN + step / len(losses) * (right - MARGIN), bottom - loss / top * (bottom - MARGIN)

    line = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points)
    ticks = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = place(share * len(losses), share * top)
        ticks.append(f'<text x="{x:.0f}" y="{bottom + 16}" text-anchor="middle">{round(share * len(losses))}</text>')
        ticks.append(f'<text x="{MARGIN - 6}" y="{y + 4:.0f}" text-anchor="end">{share * top:.1f}</text>')
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/><g font-size="11">',
            f'<path d="M{MARGIN} {MARGIN}V{bottom}H{right}" fill="none" stroke="gray"/>',
            *ticks,
            f'<text x="{WIDTH / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">step</text>',
            f'<text x="{MARGIN / 3:.0f}" y="20">nats per answer token</text></g>',
            f'<polyline points="{line}" fill="none" stroke="#1f6feb" stroke-width="2"/>',
            "</svg>\n",
        ]
    )


def accuracy_table(bf16: dict[str, float], nf4: dict[str, float]) -> str:
    rows = [(task, bf16[task], nf4[task]) for task in bf16]
    rows.append(("mean", *(sum(scores.values()) / len(scores) for scores in (bf16, nf4))))
    return "\n".join(["| task | bf16 | NF4 |", "|---|---|---|", *(f"| {t} | {a:.1%} | {b:.1%} |" for t, a, b in rows)])


def dialogue(examples: Sequence[tuple[str, str]]) -> str:
    lines = [f"    user: {prompt}|    assistant: {answer}" for prompt, answer in examples]
    return "\n\n".join(line.replace("\n", " / ").replace("|", "\n") for line in lines)


def model_card(
    run: Training, bf16: dict[str, float], nf4: dict[str, float], examples: Sequence[tuple[str, str]], count: int
) -> str:
    """Return the README.md of the weights; bf16 and nf4 are accuracies by task over `count` prompts each."""
    return CARD.format(
        layers=run.config.num_hidden_layers,
        hidden=run.config.hidden_size,
        heads=run.config.num_attention_heads,
        kv_heads=run.config.num_key_value_heads,
        mlp=run.config.intermediate_size,
        vocab=run.config.vocab_size,
        parameters=run.parameters,
        tokens=run.tokens,
        seed=run.seed,
        seen=run.seen_tokens / 1e6,
        steps=len(run.losses),
        minutes=run.minutes,
        count=count,
        table=accuracy_table(bf16, nf4),
        shown=dialogue(examples),
        losses="\n".join(f"| {step} | {loss:.4f} |" for step, loss in smooth(run.losses, 12)),
    )
