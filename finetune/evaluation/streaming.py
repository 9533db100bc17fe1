"""Generate one answer token by token, greedy or sampled with the penalties of the model's own settings."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from finetune.data.encoded import Prompt
from finetune.evaluation.generation import decode
from finetune.evaluation.scoring import evaluating
from finetune.losses.cross_entropy import vocabulary_rows
from finetune.losses.hidden_states import base_of

# Of transformers, where generation_config.json has no value.
_TOP_K = 50


@torch.no_grad()
def stream_answer(
    model: nn.Module,
    prompt: Prompt,
    put: Callable[[int], None],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float,
) -> None:
    """Generate an answer to a prompt, which may hold media.

    Args:
        put: called with each token as soon as it is chosen, the one that ends the answer too.
        temperature: 0 chooses the most probable token. Otherwise tokens are sampled, with the repetition penalty and
            the limits of the model's generation_config.json.
    """
    processors = _processors(base_of(model).generation_config, temperature)
    ids = prompt.ids.tolist()

    def choose(logits_1V: Tensor, numbers: list[int], written: list[int]) -> Tensor:
        if temperature == 0:
            chosen = logits_1V.argmax(-1)
        else:
            before: Any = torch.tensor([ids], device=logits_1V.device)
            chosen = processors(before, logits_1V.float()).softmax(-1).multinomial(1).squeeze(1)
        ids.append(int(chosen))
        put(ids[-1])
        return chosen

    options = {"stop_ids": stop_ids, "vocabulary": vocabulary_rows(model)}
    with evaluating(model):
        decode(model, [prompt], [max_new_tokens], choose, **options)


def _processors(settings: GenerationConfig | None, temperature: float) -> LogitsProcessorList:
    """Return what changes the logits before a token is sampled, in the order of transformers."""
    found = LogitsProcessorList()
    if penalty := getattr(settings, "repetition_penalty", None):
        found.append(RepetitionPenaltyLogitsProcessor(penalty))
    if temperature:
        found.append(TemperatureLogitsWarper(temperature))
    top_k = getattr(settings, "top_k", None)
    if top_k != 0:
        found.append(TopKLogitsWarper(_TOP_K if top_k is None else top_k))
    if (top_p := getattr(settings, "top_p", None)) is not None and top_p < 1:
        found.append(TopPLogitsWarper(top_p))
    return found
