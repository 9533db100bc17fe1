"""The policies that training stays close to: the base, or the adapter that training starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn

from finetune.evaluation.scoring import evaluating

# A context in which the model is the reference policy.
ReferencePolicy = Callable[[], AbstractContextManager[None]]


def base_policy(model: PeftModel) -> ReferencePolicy:
    """Return the base: the model with its adapter switched off."""

    @contextmanager
    def policy() -> Iterator[None]:
        with evaluating(model), model.disable_adapter():
            yield

    return policy


def initial_policy(model: PeftModel) -> ReferencePolicy:
    """Return the adapter as it is now, kept in a copy beside the one that is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    initial = [parameter.detach().clone() for parameter in trained]

    @contextmanager
    def policy() -> Iterator[None]:
        current = [parameter.detach().clone() for parameter in trained]
        _set(trained, initial)
        try:
            with evaluating(model):
                yield
        finally:
            _set(trained, current)

    return policy


@torch.no_grad()
def _set(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
