"""Pretrain the embedded base that sees and hears on data/scenes.py, and write its folder, card and loss curve.

    python data/pretrain_omni.py --steps 1300 --seed 0 --out data/tiny-qwen2.5-omni

The language model starts from the text base (data/pretrain.py), the towers from nothing. The same seed, versions and
machine give the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from card import loss_svg
from card_omni import OmniTraining, omni_card
from media_rows import (
    MEDIA_TOKENS,
    MEL_BINS,
    PREPROCESSOR,
    Batch,
    MediaRow,
    Processor,
    collate,
    encode_media,
    tower_inputs,
)
from pretrain import CHAT_TEMPLATE as TEXT_TEMPLATE
from pretrain import TOKENIZER_CONFIG, Masters, run_steps, targets
from safetensors.torch import load_file
from scenes import SIGHTS, SOUNDS, Conversation, Scene, about_both, asked, conversation
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

TEXT_BASE = Path(__file__).parent / "tiny-qwen2.5"
ROWS = 960  # of the embedding: all tokens, and spare ones
MICRO_TOKENS, MICRO_BATCHES, POOL, WIDTH = 2048, 2, 256, 16
CARD_ROWS = 200  # prompts per scene for the accuracies of the card


# --- tokenizer


def chat_template() -> str:
    """Return the text base's template, in which a message may consist of parts, as Qwen2.5-Omni's does."""
    parts = "".join(
        f"{{%- {'if' if at == 0 else 'elif'} part.type == '{kind}' %}}{{{{- '{''.join(tokens)}' }}}}"
        for at, (kind, tokens) in enumerate(MEDIA_TOKENS.items())
    )
    macro = (
        "{%- macro written(content) %}{%- if content is string %}{{- content }}{%- else %}{%- for part in content %}"
        f"{parts}{{%- else %}}{{{{- part.text }}}}{{%- endif %}}{{%- endfor %}}{{%- endif %}}{{%- endmacro %}}\n"
    )
    body = TEXT_TEMPLATE.replace("messages[0]['content']", "written(messages[0]['content'])")
    return macro + body.replace("message.content", "written(message.content)")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the text base's tokenizer with the tokens of media."""
    tokenizer = AutoTokenizer.from_pretrained(TEXT_BASE)
    media = dict.fromkeys(token for tokens in MEDIA_TOKENS.values() for token in tokens)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in media])
    tokenizer.chat_template = chat_template()
    return tokenizer


# --- batches


def batches(tokenizer: PreTrainedTokenizerFast, rng: Random) -> Iterator[Batch]:
    """Yield micro-batches of rows of similar length without end, each as soon as it is full."""
    waiting: dict[int, list[MediaRow]] = {}
    processor = Processor()
    while True:
        for row in encode_media(tokenizer, processor, [conversation(rng) for _ in range(POOL)]):
            width = math.ceil(len(row.ids) / WIDTH)
            group = waiting.setdefault(width, [])
            group.append(row)
            if len(group) == max(1, MICRO_TOKENS // (width * WIDTH)):
                yield collate(waiting.pop(width), tokenizer.pad_token_id)


# --- model


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """Build the thinker with the text base's weights in its language model."""
    torch.manual_seed(seed)
    text = json.loads((TEXT_BASE / "config.json").read_text(encoding="utf-8"))
    kept = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
        " max_position_embeddings initializer_range tie_word_embeddings pad_token_id eos_token_id"
    )
    hidden, (vision, audio) = text["hidden_size"], (MEDIA_TOKENS["image"], MEDIA_TOKENS["audio"])
    ids = {token: tokenizer.convert_tokens_to_ids(token) for tokens in MEDIA_TOKENS.values() for token in tokens}
    config = Qwen2_5OmniThinkerConfig(
        text_config={key: text[key] for key in kept.split()}
        | {"vocab_size": ROWS, "rope_parameters": text["rope_parameters"] | {"mrope_section": [8, 12, 12]}},
        vision_config={
            "depth": 3,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [2],
            "initializer_range": 0.05,
        },
        audio_config={
            "num_mel_bins": MEL_BINS,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 512,
            "d_model": 128,
            "output_dim": hidden,
            "initializer_range": 0.05,
        },
        image_token_index=ids["<|IMAGE|>"],
        video_token_index=ids["<|VIDEO|>"],
        audio_token_index=ids["<|AUDIO|>"],
        vision_start_token_id=ids[vision[0]],
        vision_end_token_id=ids[vision[2]],
        audio_start_token_id=ids[audio[0]],
        audio_end_token_id=ids[audio[2]],
        user_token_id=tokenizer("user")["input_ids"][0],
        tie_word_embeddings=True,
        initializer_range=text["initializer_range"],
        dtype="bfloat16",
    )
    model = Qwen2_5OmniThinkerForConditionalGeneration(config).to(torch.bfloat16)
    model.set_attn_implementation("eager")  # twice as fast as CPU SDPA's backward at this length
    start = load_file(TEXT_BASE / "model.safetensors")
    start = {name.replace("model.", "", 1): tensor for name, tensor in start.items()}
    table = model.model.language_model.embed_tokens.weight.detach().clone()
    table[: start["embed_tokens.weight"].shape[0]] = start["embed_tokens.weight"]
    model.model.language_model.load_state_dict(start | {"embed_tokens.weight": table})
    return model


def matrices(model: Qwen2_5OmniThinkerForConditionalGeneration) -> list[torch.nn.Parameter]:
    """Return the weights for Muon: of every linear inside the language model and the towers."""
    linears = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    return [linear.weight for linear in linears]


def hidden_states(model: Qwen2_5OmniThinkerForConditionalGeneration, ids: Tensor, real: Tensor, towers: dict) -> Tensor:
    """Return the final hidden states [B, T, D] with the positions of the model's three axes."""
    mask = towers.get("feature_attention_mask")
    positions, _ = model.get_rope_index(
        ids,
        image_grid_thw=towers.get("image_grid_thw"),
        attention_mask=real.long(),
        audio_seqlens=None if mask is None else mask.sum(-1),
    )
    return model.model(input_ids=ids, position_ids=positions, use_cache=False, **towers).last_hidden_state


def train_step(
    model: Qwen2_5OmniThinkerForConditionalGeneration, masters: Masters, stream: Iterator[Batch], scale: float
) -> float:
    """Make one optimizer step, and return the mean loss per answer token in nats."""
    micro = [(batch, targets(batch[1], batch[2])) for batch in islice(stream, MICRO_BATCHES)]
    count = sum(chosen.sum() for _, chosen in micro)
    answer_loss, answers = 0.0, 0.0
    for (ids, answer, real, towers), chosen in micro:
        hidden = hidden_states(model, ids, real, towers)[:, :-1][chosen]
        loss = F.cross_entropy(model.lm_head(hidden).float(), ids[:, 1:][chosen], reduction="none")
        (loss.sum() / count).backward()
        is_answer = answer[:, 1:][chosen]
        answer_loss += loss.detach()[is_answer].sum().item()
        answers += is_answer.sum().item()
    masters.step(scale)
    return answer_loss / answers


# --- measuring


@torch.no_grad()
def exact_match(
    model: Qwen2_5OmniThinkerForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, rows: list[Conversation]
) -> float:
    """Return the share of rows whose answer tokens are all the most probable ones: exact match of greedy decoding."""
    encoded, right = encode_media(tokenizer, Processor(), rows), 0
    for start in range(0, len(encoded), 50):
        ids, answer, real, towers = collate(encoded[start : start + 50], tokenizer.pad_token_id)
        guess = model.lm_head(hidden_states(model, ids, real, towers))[:, :-1].argmax(-1)
        right += ((guess == ids[:, 1:]) | ~answer[:, 1:]).all(-1).sum().item()
    return right / len(rows)


def kinds() -> dict[str, Callable[[Random], Scene]]:
    return {name: draw for name, (draw, _) in (SIGHTS | SOUNDS).items()} | {"both": about_both}


def accuracies(
    model: Qwen2_5OmniThinkerForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, seed: int, rows: int
) -> dict[str, float]:
    """Return the exact match of each kind of scene over unseen prompts of one turn."""
    scores = {}
    for name, draw in kinds().items():
        rng = Random(f"test {seed} {name}")
        scenes = [draw(rng) for _ in range(rows)]
        scores[name] = exact_match(model, tokenizer, [asked(rng, s, [rng.choice(s.tasks)]) for s in scenes])
    return scores


# --- writing


def save(model: Qwen2_5OmniThinkerForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights, tokenizer, chat template and the settings of the processors as a folder."""
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, eos_token_id=ends, do_sample=False)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n")
    (out / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")


def load_nf4(folder: Path) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """Load the written model with the language model in NF4, double quantization, bf16 compute."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["model.visual", "model.audio_tower", "lm_head"],
    )
    return Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.bfloat16
    )


def answered(
    model: Qwen2_5OmniThinkerForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, seed: int
) -> list[tuple[str, str]]:
    """Return a prompt of each kind of scene with the model's answer, and the caption that it should agree with."""
    rng, processor, shown = Random(f"shown {seed}"), Processor(), []
    for draw in kinds().values():
        scene = draw(rng)
        prompt = asked(rng, scene, [rng.choice(scene.tasks)])
        open_turn = Conversation([prompt.messages[0], {"role": "assistant", "content": ""}], scene.media)
        [row] = encode_media(tokenizer, processor, [open_turn])
        ids = torch.tensor([row.ids[: row.answer.index(True)]])
        real = torch.ones_like(ids)
        output = model.generate(input_ids=ids, attention_mask=real, max_new_tokens=64, **tower_inputs([row]))
        answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        shown.append((f"{prompt.messages[0]['content']} ({scene.caption})", answer))
    return shown


def write_card(
    model: Qwen2_5OmniThinkerForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    run: OmniTraining,
    out: Path,
) -> None:
    bf16, nf4 = (accuracies(m, tokenizer, run.seed, CARD_ROWS) for m in (model, load_nf4(out).eval()))
    examples = answered(model, tokenizer, run.seed)
    (out / "README.md").write_text(omni_card(run, bf16, nf4, examples, CARD_ROWS), encoding="utf-8")
    (out / "loss.svg").write_text(loss_svg(run.losses), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=0, help="steps between copies of the weights next to --out")
    parser.add_argument(
        "--start", type=Path, help="copy of the weights to continue from; the rate falls from the first step"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny-qwen2.5-omni")
    args = parser.parse_args()
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, args.seed)
    if args.start:
        model.load_state_dict(Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(args.start).state_dict())
    masters = Masters(model, matrices(model))
    # Rows that the first phase has not seen.
    stream = batches(tokenizer, Random(f"{args.seed} on" if args.start else args.seed))
    started = time.perf_counter()
    curve = run_steps(
        args, lambda scale: train_step(model, masters, stream, scale), lambda folder: save(model, tokenizer, folder)
    )
    run = OmniTraining(
        config=model.config,
        parameters=model.num_parameters(),
        tokens=len(tokenizer),
        seed=args.seed,
        seen_tokens=args.steps * MICRO_BATCHES * MICRO_TOKENS,
        minutes=(time.perf_counter() - started) / 60,
        losses=curve,
    )
    write_card(model.eval(), tokenizer, run, args.out)


if __name__ == "__main__":
    main()
