"""Generate answers, greedy or sampled, in batches that a finished row leaves.

Shapes: N unfinished rows of a batch, L tokens so far with padding, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from finetune.config.schema import QuantConfig
from finetune.data.encoded import Prompt
from finetune.data.formats.messages import Conversation
from finetune.data.media.media import Media
from finetune.data.template.chat import ChatTemplate
from finetune.evaluation.scoring import evaluating
from finetune.losses.chunked import logits_of
from finetune.losses.cross_entropy import head_of, vocabulary_rows
from finetune.losses.hidden_states import base_of, device_of
from finetune.models.decoder import decoder_of, text_config
from finetune.models.quant.four_bit import keep_resident, resident_bytes
from finetune.ops.determinism import cumulative_sums
from finetune.ops.limits import ROWS_DRAWN, SAMPLED_ANSWERS, SAMPLED_TOKENS
from finetune.parallel.in_step import in_step
from finetune.parallel.sharding import is_sharded, whole
from finetune.system.machine import available_memory
from finetune.system.out_of_memory import in_halves
from finetune.towers.towers import processor_of, towers_of

# What helps where not even one row, or one prompt with its answers, fits into memory.
FEWER_AT_ONCE = "lower generation.batch_size or generation.max_new_tokens"
_SMALLER_GROUPS = "lower reward.group_size, reward.max_new_tokens or distill.on_policy_tokens"
# Tokens of a block; a block is found first, then a token in it.
_DRAW_BLOCK = 512
# A draw times a total must stay below the total when it is rounded.
_BELOW_ONE = 1 - 2.0**-52
# (logits [N, V], number of each row's answer [N], number of tokens generated for it [N]) -> ids [N] int64.
Choose = Callable[[Tensor, list[int], list[int]], Tensor]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answered row.

    prompt: the turn before the answer, with a tag for each of its media. expected: the row's answer, empty for a row
    without one. given: the model's answer. reward: None in a run without rewards. media: of all turns of the prompt.
    """

    prompt: str
    expected: str
    given: str
    reward: float | None = None
    media: tuple[Media, ...] = ()

    @property
    def exact(self) -> bool:
        return self.given.strip() == self.expected.strip()

    def as_row(self) -> list[Any]:
        """Return the fields as JSON values, the media last."""
        return [self.prompt, self.expected, self.given, self.reward, *(each.as_dict() for each in self.media)]

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> Answer:
        """Build an answer from the result of `as_row`."""
        return cls(*row[:4], media=tuple(map(Media.from_dict, row[4:])))


def exact_match(answers: Sequence[Answer]) -> float:
    """Return the share of answers equal to the expected ones, ignoring outer white space."""
    return sum(answer.exact for answer in answers) / len(answers)


def worst_answers(answers: Sequence[Answer], most: int) -> list[Answer]:
    """Return the answers least like the expected ones, worst first; equally bad ones in their order."""
    return sorted(answers, key=lambda answer: _likeness(answer.given.strip(), answer.expected.strip()))[:most]


def _likeness(first: str, second: str) -> float:
    """Return the Dice coefficient of the pairs of characters, in [0, 1]: it needs no words and takes linear time."""
    pairs = [Counter(zip(f" {text}", f"{text} ", strict=True)) for text in (first, second)]
    return 2 * (pairs[0] & pairs[1]).total() / (pairs[0].total() + pairs[1].total())


@torch.no_grad()
def answer_rows(
    model: PreTrainedModel | nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    chat: ChatTemplate,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """Generate the last assistant turn of each conversation, greedily.

    Rows of similar length form a batch. The model's mode and the random state do not change.

    Args:
        progress: called after each batch with the numbers of answered and of all rows.

    Returns:
        Answers in the order of `conversations`.

    Raises:
        DataError: the template refuses a conversation.
    """
    rows = []
    for conversation in conversations:
        last = max(i for i, message in enumerate(conversation.messages) if message.role == "assistant")
        rows.append(Conversation(conversation.messages[: last + 1], conversation.tools))
    processor = processor_of(base_of(model))
    encoded = [chat.prompt(row.messages[:-1], row.tools, processor) for row in rows]
    prompts = [Prompt(prompt.ids, prompt.placed) for prompt in encoded]
    stop_ids, vocabulary = frozenset(chat.stop_ids()), vocabulary_rows(model)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}

    def write(some: Sequence[int]) -> list[list[int]]:
        limits = [max_new_tokens] * len(some)
        return decode(model, [prompts[i] for i in some], limits, stop_ids=stop_ids, vocabulary=vocabulary)

    with evaluating(model), in_step(model):
        for start in range(0, len(by_length), batch_size):
            rows_of_batch = by_length[start : start + batch_size]
            for batch, written in in_halves(rows_of_batch, write, FEWER_AT_ONCE, splits=not is_sharded(model)):
                for i, text in zip(batch, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
                    before = rows[i].messages[:-1]
                    question = before[-1].shown if before else ""
                    answers[i] = Answer(question, chat.answer_text(rows[i]), text, media=encoded[i].media)
                progress(len(answers), len(prompts))
    return [answers[i] for i in range(len(prompts))]


@dataclass(frozen=True, slots=True)
class SampledIds:
    """A sampled answer. ids: [n] int32. log_probs: [n] float32, of each id when it was drawn."""

    ids: np.ndarray
    log_probs: np.ndarray


@torch.no_grad()
def sample_answers(
    model: nn.Module,
    prompts: Sequence[Prompt],
    draws: Sequence[np.ndarray],
    *,
    stop_ids: Collection[int],
    vocabulary: int,
    temperature: float,
) -> list[list[SampledIds]]:
    """Sample answers to each prompt from the full softmax. No random generator is used.

    A prompt is computed once for all its answers.

    Args:
        prompts: at least one token each.
        draws: per prompt [G, n] float64 in [0, 1), with as many answers G to each prompt. The t-th number of a row
            decides the t-th token of an answer, by inverting the cumulative probabilities. So an answer does not
            depend on the other answers of its batch.
        stop_ids: an answer ends with one of these ids, or when its draws are used up.
        vocabulary: V, number of ids to choose from.

    Returns:
        The answers to each prompt, in the order of `prompts` and of the draws.
    """
    answers: dict[int, list[SampledIds]] = {}
    copies = len(draws[0]) if len(draws) else 1
    options: dict[str, Any] = {"stop_ids": frozenset(stop_ids), "vocabulary": vocabulary, "copies": copies}

    def sample(rows: Sequence[int]) -> list[SampledIds]:
        drawn = [answer for i in rows for answer in draws[i]]
        scored: list[tuple[list[int], Tensor]] = []  # numbers of answers, and their tokens' log-probabilities

        def choose(logits_NV: Tensor, numbers: list[int], written: list[int]) -> Tensor:
            next_draws = [drawn[i][t] for i, t in zip(numbers, written, strict=True)]
            draws_N = torch.tensor(next_draws, dtype=torch.float64, device=logits_NV.device)
            ids_N, log_probs_N = draw_tokens(logits_NV, draws_N, temperature)
            scored.append((numbers, log_probs_N))
            return ids_N

        written = decode(model, [prompts[i] for i in rows], [len(d) for d in drawn], choose, **options)
        # Read once: each read of a GPU waits for it.
        every = iter(torch.cat([log_probs_N for _, log_probs_N in scored]).tolist())
        log_probs: list[list[float]] = [[] for _ in drawn]
        for number in (number for numbers, _ in scored for number in numbers):
            log_probs[number].append(next(every))
        return [
            SampledIds(np.array(ids, dtype=np.int32), np.array(scores, dtype=np.float32))
            for ids, scores in zip(written, log_probs, strict=True)
        ]

    with evaluating(model), in_step(model):
        for batch in _batches([len(p) for p in prompts], [d.shape[1] for d in draws], copies):
            for rows, found in in_halves(batch, sample, _SMALLER_GROUPS, splits=not is_sharded(model)):
                for place, i in enumerate(rows):
                    answers[i] = found[place * copies : (place + 1) * copies]
    return [answers[i] for i in range(len(prompts))]


def _batches(prompt_tokens: list[int], answer_tokens: list[int], copies: int) -> Iterator[list[int]]:
    """Group prompts of similar length into batches within the limits. copies: answers to each prompt."""
    batch: list[int] = []
    longest_answer = 0
    for i in sorted(range(len(prompt_tokens)), key=lambda i: prompt_tokens[i]):
        longest_answer = max(longest_answer, answer_tokens[i])
        full = (len(batch) + 1) * copies * (prompt_tokens[i] + longest_answer) > SAMPLED_TOKENS
        if batch and (full or (len(batch) + 1) * copies > SAMPLED_ANSWERS):
            yield batch
            batch, longest_answer = [], answer_tokens[i]
        batch.append(i)
    if batch:
        yield batch


def draw_tokens(logits_NV: Tensor, draws_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the tokens at which the cumulative softmax(logits / temperature) passes the draws, and their log-probs.

    Args:
        logits_NV: fp32 or 16 bit; fp32 logits are overwritten.
        draws_N: float64 in [0, 1).

    Returns:
        Ids [N] int64 and log-probabilities [N] float64.
    """
    found = []
    for logits, draws in zip(logits_NV.split(ROWS_DRAWN), draws_N.split(ROWS_DRAWN), strict=True):
        scaled = logits.float() if temperature == 1 else logits.float().div_(temperature)
        found.append(draw_by_weights(scaled.sub_(scaled.amax(1, keepdim=True)).exp_(), draws))
    ids, log_probs = zip(*found, strict=True)
    return torch.cat(ids), torch.cat(log_probs)


def draw_by_weights(weights_NV: Tensor, draws_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens at which the cumulative weights pass a share of their sum, and the logarithms of their shares.

    First the block of tokens that the draw falls into is found, then the token in it: cumulative sums of a whole row
    take longer than the product that makes its logits.

    Args:
        weights_NV: fp32, not negative. A weight of 0 is never drawn.
        draws_N: float64 in [0, 1).

    Returns:
        Ids [N] int64 and log-probabilities [N] float64.
    """
    vocabulary = weights_NV.shape[1]
    blocks = vocabulary // _DRAW_BLOCK
    whole = blocks * _DRAW_BLOCK
    sums = [
        weights_NV[:, :whole].unflatten(1, (blocks, _DRAW_BLOCK)).sum(2),
        weights_NV[:, whole:].sum(1, keepdim=True),
    ]
    found, share, total = _passed(torch.cat(sums, 1).double(), draws_N[:, None])
    places = found * _DRAW_BLOCK + torch.arange(_DRAW_BLOCK, device=weights_NV.device)
    inside = weights_NV.gather(1, places.clamp(max=vocabulary - 1)).masked_fill_(places >= vocabulary, 0)
    tokens, _, _ = _passed(inside.double(), share)
    # NaN weights give an id beyond the last one. They show up in the loss of training on the answer.
    ids = (found * _DRAW_BLOCK + tokens).clamp_(max=vocabulary - 1)
    return ids.squeeze(1), (weights_NV.gather(1, ids).double() / total).log().squeeze(1)


def _passed(weights: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the index [n, 1] where cumulative weights [n, k] pass a share [n, 1] of their total, float64.

    Also the share of that weight which lies below the draw, and the total.
    """
    cumulated = cumulative_sums(weights)
    total = cumulated[:, -1:]
    places = draws.clamp(max=_BELOW_ONE) * total
    index = torch.searchsorted(cumulated, places, right=True).clamp_(max=weights.shape[1] - 1)
    weight = weights.gather(1, index)
    return index, (places - cumulated.gather(1, index) + weight).clamp_(min=0) / weight, total


def greedy(logits_NV: Tensor, prompts: list[int], written: list[int]) -> Tensor:
    """Choose the most probable token of each row."""
    return logits_NV.argmax(-1)


def decode(
    model: nn.Module,
    prompts: Sequence[Prompt],
    limits: Sequence[int],
    choose: Choose = greedy,
    *,
    stop_ids: Collection[int],
    vocabulary: int,
    copies: int = 1,
) -> list[list[int]]:
    """Generate the answers of a batch of prompts, padded on the left, with a key-value cache.

    Call it in evaluation mode, under `torch.no_grad` and in `in_step`.

    Args:
        prompts: at least one token each.
        limits: the most tokens to generate, per answer; an answer also ends with one of `stop_ids`.
        vocabulary: V, number of ids to choose from.
        copies: answers to each prompt, which is computed once for all of them.
    """
    base, device = base_of(model), device_of(model)
    head, backbone = head_of(model), decoder_of(base)
    cache = DynamicCache(config=text_config(base))
    answers: list[list[int]] = [[] for _ in limits]
    unfinished = list(range(len(answers)))  # the rows of all tensors
    longest = max(map(len, prompts))
    ids_NL = torch.tensor([[0] * (longest - len(p)) + p.ids.tolist() for p in prompts], device=device)
    mask_NL = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask_NL.cumsum(1) - 1).clamp_(min=0)  # [N, L], or [3, N, L] of prompts with media
    inputs: dict[str, Any] = {"input_ids": ids_NL}
    if any(prompt.placed for prompt in prompts):
        positions = _positions(positions, prompts)
        inputs = {"inputs_embeds": _with_media(base, ids_NL, prompts)}
    while unfinished:
        inputs |= {"attention_mask": mask_NL, "position_ids": positions, "use_cache": True}
        hidden_ND = backbone(**inputs, past_key_values=cache).last_hidden_state[:, -1]
        with whole(head):
            logits_NV = logits_of(hidden_ND, head, vocabulary)
        if len(logits_NV) < len(unfinished):  # after the prompts
            cache.batch_repeat_interleave(copies)
            logits_NV, mask_NL = (x.repeat_interleave(copies, 0) for x in (logits_NV, mask_NL))
            positions = positions.repeat_interleave(copies, -2)
        ids_N = choose(logits_NV, unfinished, [len(answers[i]) for i in unfinished])
        for i, token in zip(unfinished, ids_N.tolist(), strict=True):
            answers[i].append(token)
        stays = [answers[i][-1] not in stop_ids and len(answers[i]) < limits[i] for i in unfinished]
        positions = positions[..., -1:] + 1
        if not all(stays):
            kept = torch.tensor([k for k, stay in enumerate(stays) if stay], dtype=torch.long, device=device)
            unfinished = [i for i, stay in zip(unfinished, stays, strict=True) if stay]
            cache.batch_select_indices(kept)
            ids_N, mask_NL, positions = ids_N[kept], mask_NL[kept], positions.index_select(-2, kept)
        inputs = {"input_ids": ids_N[:, None]}
        mask_NL = torch.cat([mask_NL, mask_NL.new_ones(len(ids_N), 1)], 1)
    return answers


def _positions(text_NL: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Return the positions [3, N, L] of prompts, some with media; text_NL: of prompts without."""
    positions = text_NL.expand(3, -1, -1).clone()
    for row, prompt in enumerate(prompts):
        if prompt.placed is not None:
            of_prompt = torch.from_numpy(prompt.placed.positions(len(prompt)))
            positions[:, row, -len(prompt) :] = of_prompt.to(positions.device)
    return positions


def _with_media(base: PreTrainedModel, ids_NL: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Return the embeddings [N, L, D] of prompts that are padded on the left, with those of their media."""
    embed: Any = base.get_input_embeddings()
    embeddings_NLD = embed(ids_NL)
    for row, prompt in enumerate(prompts):
        if (placed := prompt.placed) is not None:
            tokens = torch.from_numpy(placed.tokens()) + embeddings_NLD.shape[1] - len(prompt)
            embeddings_NLD[row, tokens.to(ids_NL.device)] = towers_of(base, placed.items).embeddings(placed.items)
    return embeddings_NLD


def dequantize_once(model: nn.Module, quant: QuantConfig) -> None:
    """Also keep 4-bit weights in 16 bit on a CPU with enough memory, as `quant.keep_dequantized` does.

    Otherwise each token dequantizes all weights, which takes most of its time. A GPU's kernels read 4-bit weights.
    """
    if quant.type != "nf4" or quant.keep_dequantized or next(model.parameters()).device.type != "cpu":
        return
    # Leave half of the free memory to others.
    if 2 * resident_bytes(model) <= (available_memory() or 0):
        keep_resident(model)
