"""What all routes of the API share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from finetune.serving.http.answers import Asked, End
from finetune.serving.http.errors import ApiError
from finetune.serving.http.prompts import Prompts
from finetune.serving.http.schemas import AnswerBody
from finetune.serving.http.scores import Tokens
from finetune.serving.request import Request
from finetune.serving.service import ServedModel, Service
from finetune.system.errors import InputError


class Common:
    """A service with what its protocol needs: prompts, names of tokens, and requests within the context."""

    def __init__(self, service: Service):
        self.service = service
        self.prompts = Prompts(service.chat)
        self.names = Tokens(service.chat.backend)
        self._stop_ids = frozenset(service.chat.stop_ids())

    def model(self, name: str) -> ServedModel:
        """Return a model by its name. Raises: ApiError (404)."""
        try:
            return self.service.model(name)
        except InputError as error:
            raise ApiError(404, str(error), code="model_not_found", param="model") from error

    def asked(
        self, body: AnswerBody, model: ServedModel, ids: Sequence[int], limit: int | None, **settings: Any
    ) -> Asked:
        """Return the answer to a prompt.

        Args:
            limit: on the tokens of the answer; None: the rest of the context.
            settings: log_probs and prompt_log_probs of `Request`, and the grammar of `Sampling`.

        Raises:
            ApiError: the prompt is empty, or it does not fit in the context with its answer.
        """
        context, needed = self.service.engine.context_tokens, len(ids)
        if not ids:
            raise ApiError(400, "the prompt is empty; it needs one token at least", code="invalid_value")
        answer = 1 if limit is None else limit
        if needed + answer > context:
            raise ApiError(
                400,
                f"the context length is {context:,} tokens, but the prompt needs {needed:,} and its answer {answer:,}",
                code="context_length_exceeded",
                param="messages" if "messages" in type(body).model_fields else "prompt",
            )
        grammar = settings.pop("grammar", None)
        request = Request(
            tuple(ids),
            context - needed if limit is None else limit,
            adapter=model.adapter,
            stop_ids=frozenset() if body.ignore_eos else self._stop_ids.union(body.stop_token_ids),
            sampling=replace(body.sampling(), grammar=grammar),
            **settings,
        )
        return Asked(request, body.stop, body.deadline_seconds)


def usage(prompts: Sequence[Asked], ends: Sequence[End]) -> dict[str, Any]:
    """Count the tokens of the prompts, each once, and of all answers.

    Args:
        ends: of all answers to the first prompt, then of those to the next one.
    """
    prompt = sum(len(each.request.ids) for each in prompts)
    written = sum(end.tokens for end in ends)
    answers = len(ends) // len(prompts)
    cached = sum(min(end.cached_tokens for end in ends[i * answers : (i + 1) * answers]) for i in range(len(prompts)))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
