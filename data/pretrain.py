"""Pretrain the embedded base model on the text of data/generate.py, and write its folder, card and loss curve.

    python data/pretrain.py --steps 2000 --seed 0 --out data/tiny-qwen2.5

It takes about 35 minutes on two CPU cores with AMX. The same seed, versions and machine give the same weights. Muon
trains the matrices, AdamW all other parameters; both keep fp32 masters of a bf16 model.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from card import Training, loss_svg, model_card
from generate import TASKS, conversation, first_turn
from safetensors.torch import load_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import Parameter
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

# Qwen2's, character for character.
PRE_TOKENS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SYSTEM = "You are a helpful assistant."
TOKENIZER_CONFIG = {
    "tokenizer_class": "Qwen2Tokenizer",
    "model_max_length": 4096,
    "add_bos_token": False,
    "add_prefix_space": False,
    "bos_token": None,
    "eos_token": SPECIAL[2],
    "pad_token": SPECIAL[0],
    "unk_token": None,
    "errors": "replace",
    "split_special_tokens": False,
    "clean_up_tokenization_spaces": False,
}
CHAT_TEMPLATE = f"""\
{{%- if messages[0]['role'] == 'system' %}}
    {{{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}}}
{{%- else %}}
    {{{{- '<|im_start|>system\\n{SYSTEM}<|im_end|>\\n' }}}}
{{%- endif %}}
{{%- for message in messages %}}
    {{%- if message.role == 'user' or message.role == 'assistant' or (message.role == 'system' and not loop.first) %}}
        {{{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}}}
    {{%- endif %}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}
    {{{{- '<|im_start|>assistant\\n' }}}}
{{%- endif %}}
"""
MERGED_TOKENS, ROW_MULTIPLE = 880, 64
CARD_ROWS = 200  # prompts per task for the accuracies of the card
CONTEXT_SHARE = 0.1  # share of the other tokens that are targets too, so that every token is a trained output
MICRO_TOKENS, MICRO_BATCHES, POOL, WIDTH = 2048, 2, 512, 16
MATRIX_RATE, OTHER_RATE, WARMUP_STEPS, DECAY_SHARE = 3e-3, 2e-3, 50, 0.4


# --- tokenizer


def corpus(seed: int, rows: int = 20000) -> Iterator[str]:
    """Yield the text for learning merges, without words that are spelled letter by letter."""
    rng = Random(seed)
    drawn = [name for name in TASKS if name not in ("word/spell", "word/capitals")]
    for _ in range(rows):
        draw, task = TASKS[rng.choice(drawn)]
        yield from ("system\n", "user\n", "assistant\n", SYSTEM)
        yield from (message["content"] for message in first_turn(rng, draw(rng), task))


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with Qwen2's normalizer, pre-tokenizer and decoder."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRE_TOKENS), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=MERGED_TOKENS, initial_alphabet=alphabet, min_frequency=50, show_progress=False
    )
    bpe.train_from_iterator(corpus(seed), trainer)
    bpe.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


# --- rows


@dataclass(frozen=True)
class Row:
    """One conversation: its token ids, and for each whether it is part of an answer."""

    ids: list[int]
    answer: list[bool]


def render(turns: list[dict[str, str]]) -> str:
    """Return the text of a conversation as the chat template renders it."""
    turns = turns if turns[0]["role"] == "system" else [{"role": "system", "content": SYSTEM}, *turns]
    return "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)


def encode(tokenizer: PreTrainedTokenizerFast, conversations: list[list[dict[str, str]]]) -> list[Row]:
    """Encode conversations; an answer is the content of an assistant's turn and its `<|im_end|>`."""
    header = tokenizer("<|im_start|>assistant\n")["input_ids"]
    end, rows = tokenizer.eos_token_id, []
    for encoded in tokenizer.backend_tokenizer.encode_batch_fast([render(turns) for turns in conversations]):
        ids, answer, inside = encoded.ids, [], False
        for at, token in enumerate(ids):
            answer.append(inside)
            inside = token != end if inside else ids[at + 1 - len(header) : at + 1] == header
        rows.append(Row(ids, answer))
    return rows


def pad(rows: list[Row], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids [B, T], answer mask [B, T] and token mask [B, T], padded on the right to a multiple of WIDTH."""
    width = math.ceil(max(len(row.ids) for row in rows) / WIDTH) * WIDTH
    ids = torch.tensor([row.ids + [pad_id] * (width - len(row.ids)) for row in rows])
    answer = torch.tensor([row.answer + [False] * (width - len(row.ids)) for row in rows])
    real = torch.arange(width) < torch.tensor([len(row.ids) for row in rows])[:, None]
    return ids, answer, real


def batches(tokenizer: PreTrainedTokenizerFast, rng: Random) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield micro-batches of rows of similar length without end, each as soon as it is full.

    There are few different shapes, because oneDNN compiles kernels for each.
    """
    waiting: dict[int, list[Row]] = {}
    while True:
        for row in encode(tokenizer, [conversation(rng) for _ in range(POOL)]):
            width = math.ceil(len(row.ids) / WIDTH)
            group = waiting.setdefault(width, [])
            group.append(row)
            if len(group) == MICRO_TOKENS // (width * WIDTH):
                yield pad(waiting.pop(width), tokenizer.pad_token_id)


# --- training


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=math.ceil((len(tokenizer) + 8) / ROW_MULTIPLE) * ROW_MULTIPLE,  # at least 8 spare rows
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.06,  # about 1/sqrt(hidden size): attention starts less flat, copying is learned earlier
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        dtype="bfloat16",
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.set_attn_implementation("eager")  # twice as fast as CPU SDPA's backward at this length
    return model


class Masters:
    """fp32 masters of a bf16 model, with Muon for the matrices of the blocks and AdamW for all other parameters."""

    def __init__(self, model: PreTrainedModel, blocks: Sequence[Parameter]) -> None:
        self.pairs = [(p, p.detach().float().clone()) for p in model.parameters()]
        chosen = {id(p) for p in blocks}
        matrices = [master for p, master in self.pairs if id(p) in chosen]
        others = [master for p, master in self.pairs if id(p) not in chosen]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.01),
        ]
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["peak"] = optimizer.param_groups[0]["lr"]

    def step(self, scale: float) -> None:
        """Step with the bf16 gradients at `scale` times the peak rates, and write the rounded weights."""
        for p, master in self.pairs:
            master.grad, p.grad = None if p.grad is None else p.grad.float(), None
        torch.nn.utils.clip_grad_norm_([master for _, master in self.pairs], 1.0)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["peak"] * scale
            optimizer.step()
        with torch.no_grad():
            for p, master in self.pairs:
                p.copy_(master)


def rate(step: int, steps: int, decay_share: float) -> float:
    """Return the rate: linear warm-up, constant, then linear to zero over the last share of the run."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (decay_share * steps))


def targets(answer: Tensor, real: Tensor) -> Tensor:
    """Return the targets [B, T-1]: every answer, and a random share of the other tokens."""
    return (answer | (real & (torch.rand(answer.shape) < CONTEXT_SHARE)))[:, 1:]


def train_step(model: Qwen2ForCausalLM, masters: Masters, stream: Iterator, scale: float) -> float:
    """Make one optimizer step, and return the mean loss per answer token in nats."""
    micro = [(ids, answer, targets(answer, real)) for ids, answer, real in islice(stream, MICRO_BATCHES)]
    count = sum(chosen.sum() for _, _, chosen in micro)
    answer_loss, answers = 0.0, 0.0
    for ids, answer, chosen in micro:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][chosen]
        loss = F.cross_entropy(model.lm_head(hidden).float(), ids[:, 1:][chosen], reduction="none")
        (loss.sum() / count).backward()
        is_answer = answer[:, 1:][chosen]
        answer_loss += loss.detach()[is_answer].sum().item()
        answers += is_answer.sum().item()
    masters.step(scale)
    return answer_loss / answers


# --- measuring


@torch.no_grad()
def exact_match(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> float:
    """Return the share of rows whose answer tokens are all the most probable ones: exact match of greedy decoding."""
    right = 0
    for start in range(0, len(rows), 64):
        ids, answer, _ = pad(rows[start : start + 64], tokenizer.pad_token_id)
        guess = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
        right += ((guess == ids[:, 1:]) | ~answer[:, 1:]).all(-1).sum().item()
    return right / len(rows)


def accuracies(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, rows: int) -> dict[str, float]:
    """Return the exact match of each task over unseen prompts."""
    rng = Random(f"test {seed}")
    drawn = {
        name: encode(tokenizer, [first_turn(rng, draw(rng), task) for _ in range(rows)])
        for name, (draw, task) in TASKS.items()
    }
    return {name: exact_match(model, tokenizer, task_rows) for name, task_rows in drawn.items()}


# --- writing


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights, tokenizer and chat template as a folder for AutoModelForCausalLM and AutoTokenizer."""
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, eos_token_id=ends, do_sample=False)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n")


def load_nf4(folder: Path) -> Qwen2ForCausalLM:
    """Load the written model as the quickstart does: NF4, double quantization, bf16 compute."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.bfloat16)


def answered(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> list[tuple[str, str]]:
    """Return a prompt of every fourth task with the model's answer."""
    rng, shown = Random(f"shown {seed}"), []
    for draw, task in list(TASKS.values())[::4]:
        prompt = first_turn(rng, draw(rng), task)[:1]
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
        shown.append((prompt[0]["content"], tokenizer.decode(output, skip_special_tokens=True)))
    return shown


def write_card(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, run: Training, out: Path) -> None:
    bf16, nf4 = (accuracies(m, tokenizer, run.seed, CARD_ROWS) for m in (model, load_nf4(out)))
    examples = answered(model, tokenizer, run.seed)
    (out / "README.md").write_text(model_card(run, bf16, nf4, examples, CARD_ROWS), encoding="utf-8")
    (out / "loss.svg").write_text(loss_svg(run.losses), encoding="utf-8")


def run_steps(args: argparse.Namespace, step: Callable[[float], float], save: Callable[[Path], None]) -> list[float]:
    """Train, each step at its share of the learning rate, and save the weights; return the losses."""
    curve, started = [], time.perf_counter()
    for done in range(args.steps):
        curve.append(step(rate(done, args.steps, 1.0 if args.start else DECAY_SHARE)))
        if args.save_every and (done + 1) % args.save_every == 0:
            save(args.out.with_name(f"{args.out.name}-{done + 1}"))
        if (done + 1) % 20 == 0:
            seconds = time.perf_counter() - started
            print(f"step {done + 1} loss {sum(curve[-20:]) / 20:.4f} {seconds:.0f} s", flush=True)
    save(args.out)
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=0, help="steps between copies of the weights next to --out")
    parser.add_argument(
        "--start", type=Path, help="copy of the weights to continue from; the rate falls from the first step"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny-qwen2.5")
    args = parser.parse_args()
    tokenizer = build_tokenizer(args.seed)
    model = build_model(tokenizer, args.seed)
    if args.start:
        load_model(model, str(args.start / "model.safetensors"))
    # Rows that the first phase has not seen.
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    masters, stream = (
        Masters(model, matrices),
        batches(tokenizer, Random(f"{args.seed} on" if args.start else args.seed)),
    )
    started = time.perf_counter()
    curve = run_steps(
        args, lambda scale: train_step(model, masters, stream, scale), lambda folder: save(model, tokenizer, folder)
    )
    run = Training(
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
