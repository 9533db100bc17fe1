"""/v1/completions: prompts as texts or tokens, scored or continued."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import Request as HttpRequest
from fastapi import Response

from finetune.serving.http.answers import Asked, End, Piece, Written, all_whole, copies, merged, while_connected
from finetune.serving.http.common import Common, usage
from finetune.serving.http.errors import ApiError
from finetune.serving.http.json_bodies import JsonReply, as_json
from finetune.serving.http.schemas import MOST_ANSWERS, CompletionBody
from finetune.serving.http.scores import completion_scores, prompt_tokens, vllm_prompt_scores
from finetune.serving.http.sse import GONE, event_stream
from finetune.serving.request import PromptScores, Token
from finetune.serving.service import ServedModel

# Entries of prompt_logprobs in one answer: a million take about 100 MB.
_MOST_SCORES = 2**20


async def answer_completion(common: Common, http: HttpRequest, body: CompletionBody) -> Response:
    """Answer prompts. Raises: ApiError; as `Service.answer`."""
    model = common.model(body.model)
    prompts = prompts_of(body)
    if len(prompts) * body.n > MOST_ANSWERS:
        raise ApiError(
            400, f"prompt: at most {MOST_ANSWERS} answers in one request, found {len(prompts) * body.n}", param="prompt"
        )
    ids = await common.prompts.run(lambda: [common.prompts.of_completion(prompt) for prompt in prompts])
    scored = _prompt_log_probs(common, body, sum(map(len, ids)))
    limit = body.max_tokens
    asked = [common.asked(body, model, each, limit, log_probs=body.logprobs, prompt_log_probs=scored) for each in ids]
    answers = _Completions(common, body, model, asked)
    if body.stream:
        return await event_stream(http, answers.chunks())
    written = await while_connected(http, all_whole(common.service, answers.asked))
    if written is None:
        return Response(status_code=GONE)
    return JsonReply(await common.prompts.run(lambda: as_json(answers.whole(written))))


def prompts_of(body: CompletionBody) -> list[str] | list[list[int]]:
    """Return the prompts of a request, each a text or its tokens."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    return [prompt] if isinstance(prompt[0], int) else prompt  # type: ignore[return-value, list-item]


def _prompt_log_probs(common: Common, body: CompletionBody, tokens: int) -> int | None:
    """Return how many tokens to score at each token of the prompts. Raises: ApiError for too many."""
    wanted = body.prompt_logprobs
    if wanted is None:
        return body.logprobs if body.echo else None
    if wanted > common.service.chat.vocabulary_size:
        most = common.service.chat.vocabulary_size
        raise ApiError(400, f"prompt_logprobs: {wanted} is greater than max allowed, {most}", param="prompt_logprobs")
    if tokens * (wanted + 1) * body.n > _MOST_SCORES:
        raise ApiError(
            400,
            f"prompt_logprobs: {tokens:,} tokens with {wanted + 1:,} scores each are more than {_MOST_SCORES:,}",
            param="prompt_logprobs",
        )
    return max(wanted, (body.logprobs or 0) if body.echo else 0)


class _Completions:
    """The answers to the prompts of one request."""

    def __init__(self, common: Common, body: CompletionBody, model: ServedModel, prompts: list[Asked]):
        self._common, self._body, self._prompts = common, body, prompts
        self.asked = [copy for prompt in prompts for copy in copies(prompt, body.n)]
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": f"fp_{model.digest[:16]}",
        }

    def whole(self, written: Sequence[Written]) -> dict[str, Any]:
        """Return the body of all answers."""
        choices = [self._choice(number, each) for number, each in enumerate(written)]
        return self._head | {"choices": choices, "usage": usage(self._prompts, [each.end for each in written])}

    def _choice(self, number: int, written: Written) -> dict[str, Any]:
        echoed, prompt_scores = self._echo(number), written.prompt
        scores = self._scores(written.tokens, len(echoed), self._prompt(number, prompt_scores))
        choice: dict[str, Any] = {
            "index": number,
            "text": echoed + written.text,
            "logprobs": scores,
            "finish_reason": written.end.reason,
        }
        if self._body.prompt_logprobs is not None and prompt_scores is not None:
            choice["prompt_logprobs"] = vllm_prompt_scores(self._common.names, prompt_scores)
        return choice

    def _echo(self, number: int) -> str:
        """Return the prompt's text, if it stands before the answer."""
        if not self._body.echo:
            return ""
        ids = self.asked[number].request.ids
        return self._common.service.chat.backend.decode(list(ids), skip_special_tokens=False)

    def _prompt(self, number: int, scores: PromptScores | None) -> list[Token]:
        """Return the prompt's tokens, if they stand before the answer with their scores."""
        if not self._body.echo or self._body.logprobs is None or scores is None:
            return []
        return prompt_tokens(self.asked[number].request.ids, scores)

    def _scores(self, tokens: Sequence[Token], start: int, prompt: Sequence[Token] = ()) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        return completion_scores(
            self._common.names,
            [*prompt, *tokens],
            start=0 if prompt else start,
            as_ids=self._body.return_tokens_as_token_ids,
            first_unknown=bool(prompt),
        )

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the chunks of all answers."""
        counted = self._body.stream_options is not None and self._body.stream_options.include_usage
        head = self._head | {"usage": None} if counted else self._head
        ends: dict[int, End] = {}
        written: dict[int, int] = {}  # characters
        prompt: list[Token]
        async for number, each in merged(self._common.service, self.asked):
            if number not in written:
                echoed = self._echo(number)
                written[number] = len(echoed)
                if echoed:
                    prompt = self._prompt(number, each if isinstance(each, PromptScores) else None)
                    yield self._chunk(head, number, echoed, self._scores([], 0, prompt))
            if isinstance(each, Piece):
                scores = self._scores(each.tokens, written[number])
                written[number] += len(each.text)
                yield self._chunk(head, number, each.text, scores)
            elif isinstance(each, End):
                ends[number] = each
                yield self._chunk(head, number, "", None, each.reason)
        if counted:
            yield head | {"choices": [], "usage": usage(self._prompts, [ends[number] for number in sorted(ends)])}

    def _chunk(
        self, head: dict[str, Any], number: int, text: str, scores: dict[str, Any] | None, reason: str | None = None
    ) -> dict[str, Any]:
        return head | {"choices": [{"index": number, "text": text, "logprobs": scores, "finish_reason": reason}]}
