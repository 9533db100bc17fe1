"""Let engines and servers score rows, for the comparison with the trained model (evaluation/probe.py)."""

from __future__ import annotations

import queue
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx
from transformers import PreTrainedTokenizerBase

from finetune.data.documents import evenly_spaced
from finetune.evaluation.probe import TOP, Row, Scored, Scorer
from finetune.serving.request import Engine, Event, Finished, PromptScores, Request
from finetune.system.errors import FinetuneError

_SECONDS = 600.0
# Tokens of a row to ask about, where each costs a request.
_ASKED = 8
Ask = Callable[[httpx.Client, Row], list[Scored | None]]


def engine_scorer(engine: Engine, adapter: str | None) -> Scorer:
    """Return a scorer that asks an engine for the log-probabilities of prompts.

    It raises FinetuneError if the engine fails, or gives no answer in 10 minutes.
    """

    def score(rows: Sequence[Row]) -> list[list[Scored | None]]:
        answers: list[queue.SimpleQueue[Event]] = [queue.SimpleQueue() for _ in rows]
        for row, events in zip(rows, answers, strict=True):
            engine.submit(Request(row.ids, 0, adapter=adapter, prompt_log_probs=TOP), events.put)
        return [_scores(row, events) for row, events in zip(rows, answers, strict=True)]

    return score


def _scores(row: Row, events: queue.SimpleQueue[Event]) -> list[Scored | None]:
    found: list[Scored | None] = []
    while True:
        try:
            event = events.get(timeout=_SECONDS)
        except queue.Empty:
            raise FinetuneError(f"check: the engine gave no scores in {_SECONDS:.0f} s") from None
        if isinstance(event, PromptScores):
            pairs = list(zip(event.tokens, event.top, strict=True))[row.first :]
            found = [Scored(None if own is None else own.log_prob, dict(top)) for own, top in pairs]
        elif isinstance(event, Finished):
            if len(found) != row.scored:
                raise FinetuneError(f"check: the engine scored {len(found)} of {row.scored} tokens; {event.error}")
            return found


def server_scorer(ask: Ask, url: str, key: str | None) -> Scorer:
    """Return a scorer that asks a server. It raises FinetuneError if the server fails, or answers something else.

    Args:
        ask: of the kind of server.
        url: without a path.
        key: sent as `Authorization: Bearer KEY`.
    """

    def score(rows: Sequence[Row]) -> list[list[Scored | None]]:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        with httpx.Client(base_url=url, headers=headers, timeout=_SECONDS, trust_env=False) as client:
            try:
                found = [ask(client, row) for row in rows]
            except httpx.HTTPStatusError as error:
                raise FinetuneError(f"check: {url} refuses: {error.response.text[:400]}") from error
            except (httpx.HTTPError, LookupError, ValueError, TypeError, AttributeError) as error:
                raise FinetuneError(f"check: {url} gave no log-probabilities: {error!r}") from error
        if not any(scored for scores in found for scored in scores):
            raise FinetuneError(f"check: {url} gave log-probabilities of no tokens whose ids are known")
        return found

    return score


def ask_completions(model: str) -> Ask:
    """Ask for the `prompt_logprobs` of /v1/completions, as vLLM and this package's own server have them."""

    def ask(client: httpx.Client, row: Row) -> list[Scored | None]:
        body = {"model": model, "prompt": row.ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": TOP}
        entries = _post(client, "/v1/completions", body)["choices"][0]["prompt_logprobs"]
        return [
            _best(entry[str(id)]["logprob"], {int(other): each["logprob"] for other, each in entry.items()})
            for id, entry in zip(row.ids[row.first :], entries[row.first :], strict=True)
        ]

    return ask


def ask_sglang(adapter: str | None) -> Ask:
    """Ask SGLang's /generate; its OpenAI API has no ids."""

    def ask(client: httpx.Client, row: Row) -> list[Scored | None]:
        body = {
            "input_ids": row.ids,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": TOP,
            "lora_path": adapter,
        }
        meta = _post(client, "/generate", body)["meta_info"]
        places = zip(meta["input_token_logprobs"], meta["input_top_logprobs"], strict=True)
        return [_best(own[0], {each[1]: each[0] for each in top}) for own, top in list(places)[row.first :]]

    return ask


def ask_llamacpp(lora: int | None) -> Ask:
    """Ask llama.cpp's /completion for the next token after 8 beginnings of a row: it scores no prompts.

    lora: number of the adapter; None: the base alone.
    """

    def ask(client: httpx.Client, ids: Sequence[int]) -> Scored:
        body = {
            "prompt": ids,
            "n_predict": 1,
            "temperature": 0,
            "n_probs": TOP,
            "cache_prompt": True,
            "lora": [] if lora is None else [{"id": lora, "scale": 1.0}],
        }
        top = _post(client, "/completion", body)["completion_probabilities"][0]["top_logprobs"]
        return _best(None, {each["id"]: each["logprob"] for each in top})

    return _ask_next_tokens(ask)


def ask_tensorrt_llm(model: str, lora: Mapping[str, Any] | None, ids_of: Mapping[str, int]) -> Ask:
    """Ask trtllm-serve's /v1/completions for the next token after 8 beginnings of a row: it scores no prompts.

    It names tokens by their texts. A place that lists a text of several tokens is not compared.

    Args:
        model: name in the requests; the server has one model.
        lora: its `lora_request`; None: the base alone.
        ids_of: of texts that one token alone has, as `unique_texts` returns them.
    """

    def ask(client: httpx.Client, ids: Sequence[int]) -> Scored | None:
        body: dict[str, Any] = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": TOP}
        if lora is not None:
            body["lora_request"] = dict(lora)
        [top] = _post(client, "/v1/completions", body)["choices"][0]["logprobs"]["top_logprobs"]
        if not top.keys() <= ids_of.keys():
            return None
        return _best(None, {ids_of[text]: log_prob for text, log_prob in top.items()})

    return _ask_next_tokens(ask)


def unique_texts(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the id of every text that a token alone has; pieces of characters share theirs, for instance."""
    texts = tokenizer.batch_decode([[id] for id in range(len(tokenizer))])
    seen = Counter(texts)
    return {text: id for id, text in enumerate(texts) if seen[text] == 1}


def _ask_next_tokens(ask: Callable[[httpx.Client, Sequence[int]], Scored | None]) -> Ask:
    """Score some tokens of a row, each by a request with the tokens before it."""

    def ask_row(client: httpx.Client, row: Row) -> list[Scored | None]:
        found: list[Scored | None] = [None] * row.scored
        for place in evenly_spaced(row.scored, _ASKED):
            found[place] = ask(client, row.ids[: row.first + place])
        return found

    return ask_row


def _post(client: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    answer = client.post(path, json=body)
    answer.raise_for_status()
    return answer.json()


def _best(own: float | None, top: dict[int, float]) -> Scored:
    """Return the most probable tokens alone: a server also lists a row's own token, which may be far below them."""
    if not top:
        raise ValueError("no tokens at a place")
    return Scored(own, dict(sorted(top.items(), key=lambda pair: -pair[1])[:TOP]))
