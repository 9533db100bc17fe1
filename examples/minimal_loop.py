"""QLoRA fine-tuning in one file, without abstractions: load, encode, pack, loss, step, save.

    python examples/minimal_loop.py train.max_steps=20 output_dir=outputs/minimal

It trains the quickstart with one process. `finetune train` adds evaluation, checkpoints, resuming, several GPUs and
distillation; the adapter that both write is the same bits (tests/equivalence/test_minimal_loop.py).
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from accelerate.utils import set_seed

from finetune import attach_lora, load_base, load_config, load_tokenizer
from finetune.data.batch import build_batch
from finetune.data.loader import load_chat_template, load_data
from finetune.data.packing import SequenceOrder, split_among_ranks
from finetune.data.tokens.prepare import Preparation
from finetune.losses.cross_entropy import CrossEntropy
from finetune.models.adapters.files import save_adapter
from finetune.models.fused import fuse_layers


def main(overrides: list[str]) -> None:
    # 1. The config: one YAML, then key=value words. Every key has a default; a typo is an error.
    cfg = load_config("quickstart.yaml", overrides)
    train = cfg.train
    set_seed(train.seed)  # The adapter's random start follows from it.

    # 2. The data: rows -> chat template -> token ids, and labels that are IGNORE_INDEX where nothing is learned.
    tokenizer = load_tokenizer(cfg.model)
    data = load_data(Preparation(cfg.data, load_chat_template(cfg.data, tokenizer)))
    documents = data.documents

    # 3. The model: a frozen base in 4 bits (NF4), LoRA adapters on some of its linear layers, fused kernels.
    base = load_base(cfg.model, cfg.quant)
    model = attach_lora(base, cfg.lora)
    fuse_layers(model)
    model.train()

    # 4. The loss: the sum of nats over the target tokens of a batch. Logits exist for a few tokens at a time.
    loss_of = CrossEntropy(model, train.neftune_alpha)

    # 5. The optimizer: AdamW over the adapter alone.
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    betas = (train.beta1, train.beta2)
    optimizer = torch.optim.AdamW(trainable, train.learning_rate, betas, train.eps, train.weight_decay)

    # 6. The order: documents packed into sequences of at most max_length tokens, `batch_size` sequences per step.
    #    It is a pure function of (seed, epoch, step), so there is nothing to save and nothing to restore.
    room = cfg.data.max_length if cfg.data.packing else None
    order = SequenceOrder(documents.lengths, data.weights, room, train.batch_size, train.seed)
    total_steps = train.max_steps or order.steps_for(train.epochs or 1)
    # Documents that start alike share the computation of their common prefix, unless noise differs between them.
    share_prefixes = train.share_prefixes and not cfg.lora.dropout and not train.neftune_alpha

    for step in range(1, total_steps + 1):
        set_seed((train.seed * 1_000_003 + step * 1_009) % 2**32)  # Dropout of this step, whatever ran before it.
        sequences = [[documents[i] for i in sequence] for sequence in order.batch(step - 1)]
        target_tokens = sum(document.target_tokens for sequence in sequences for document in sequence)

        # 7. Forward and backward, some sequences at a time. The known global count divides every part,
        #    so the gradient is the same for every micro-batch size.
        loss_sum = 0.0
        (mine,) = split_among_ranks([sum(map(len, sequence)) for sequence in sequences], 1)
        size = train.micro_batch_size or train.batch_size
        for start in range(0, len(mine), size):
            packed = [document for i in mine[start : start + size] for document in sequences[i]]
            batch = build_batch(packed, share_prefixes=share_prefixes)
            loss = loss_of(batch)
            (loss * (1 / target_tokens)).backward()
            loss_sum += loss.item()

        # 8. The update: clip, set the learning rate (linear warm-up, then cosine), step.
        torch.nn.utils.clip_grad_norm_(trainable, train.max_grad_norm or math.inf)
        learning_rate = learning_rate_at(step, total_steps, train.learning_rate, train.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(f"step {step}/{total_steps}: loss={loss_sum / target_tokens:.4f}, learning_rate={learning_rate:.2e}")

    # 9. The adapter, as PEFT reads it, with the tokenizer beside it.
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(model, folder, tokenizer)
    print(f"adapter: {folder}")


def learning_rate_at(step: int, total_steps: int, peak: float, warmup_ratio: float) -> float:
    """Return the learning rate of a step (from 1): it rises to the peak, then falls as a half cosine."""
    warmup = math.ceil(warmup_ratio * total_steps)
    if step <= warmup:
        return peak * step / warmup
    return peak * (0.5 * (1.0 + math.cos(math.pi * ((step - warmup - 1) / max(1, total_steps - warmup)))))


if __name__ == "__main__":
    main(sys.argv[1:])
