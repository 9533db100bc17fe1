"""Write the model card of the embedded base that sees and hears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from card import accuracy_table, dialogue, smooth
from transformers import Qwen2_5OmniThinkerConfig

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: any-to-any
tags: [qwen2_5_omni, tiny, synthetic]
---
# tiny-qwen2.5-omni

A real, very small thinker in the architecture of Qwen2.5-Omni, so that adapting a model to pictures and sounds can be
tried and tested in minutes, on a CPU and without a hub. It has nothing of Qwen's weights, text or vocabulary. Its
language model starts from `data/tiny-qwen2.5`; its towers start from nothing. It knows the scenes below and nothing
else, and it answers in text: it has no talker.

| | |
|---|---|
| architecture | `Qwen2_5OmniThinkerForConditionalGeneration`, {parameters:,} parameters, bf16 |
| language model | {layers} layers, hidden size {hidden}, MLP {mlp}, tied embeddings |
| attention | {heads} heads, {kv_heads} key-value heads, rotary positions of three axes |
| vision tower | {vision_layers} layers, hidden size {vision_hidden}: an embedding for 28 by 28 pixels |
| audio tower | {audio_layers} layers, hidden size {audio_hidden}, {mel} mel bins: an embedding for 40 ms |
| vocabulary | {tokens} tokens: those of `data/tiny-qwen2.5`, and seven for media; {vocab} rows |
| chat | Qwen2.5's ChatML; a part of a message is text, image, audio or video |
| data | `data/scenes.py`, {seen:.1f} million tokens with those of media, no scene drawn twice on purpose |
| made by | `python data/pretrain_omni.py --steps {steps} --seed {seed}`, {minutes:.0f} minutes on one CPU thread |
| licence | Apache-2.0 |

## What it can do

Exact match of the greedy answer over {count} unseen scenes of each kind, in bf16 and with the language model quantized
to NF4 with double quantization:

{table}

- `group`: one to five equal shapes on a board of 3 by 3 cells. `single`: one shape and its place. `different`:
  questions about one of several shapes. `strip`: shapes from left to right. `digits`: a number.
- `tune`: two to four notes of a flute, a horn or a bell. `drum`: a rhythm of long and short beats.
- `both`: a picture and a sound in one message.

Some prompts and what the bf16 weights answer (a slash stands for a new line):

{shown}

## Loss

![Loss over the steps](loss.svg)

| step | nats per answer token |
|---|---|
{losses}

## What it can't do

Photographs, speech, music, several pictures at once, and the cards of `data/sample` (`vision.jsonl`, `audio.jsonl`,
`both.jsonl`), which is what the quickstarts teach it. It reads video through the vision tower, but no video was in its
data.
"""


@dataclass(frozen=True)
class OmniTraining:
    """Figures of a pretraining run for the card; losses are nats per answer token, one per step."""

    config: Qwen2_5OmniThinkerConfig
    parameters: int
    tokens: int
    seed: int
    seen_tokens: int
    minutes: float
    losses: Sequence[float]


def omni_card(
    run: OmniTraining, bf16: dict[str, float], nf4: dict[str, float], examples: Sequence[tuple[str, str]], count: int
) -> str:
    """Return the README.md of the weights; bf16 and nf4 are accuracies by kind of scene over `count` scenes each."""
    text, vision, audio = run.config.text_config, run.config.vision_config, run.config.audio_config
    return CARD.format(
        parameters=run.parameters,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        mlp=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        vision_layers=vision.depth,
        vision_hidden=vision.hidden_size,
        audio_layers=audio.encoder_layers,
        audio_hidden=audio.d_model,
        mel=audio.num_mel_bins,
        tokens=run.tokens,
        vocab=text.vocab_size,
        seen=run.seen_tokens / 1e6,
        steps=len(run.losses),
        seed=run.seed,
        minutes=run.minutes,
        count=count,
        table=accuracy_table(bf16, nf4),
        shown=dialogue(examples),
        losses="\n".join(f"| {step} | {loss:.4f} |" for step, loss in smooth(run.losses, 12)),
    )
