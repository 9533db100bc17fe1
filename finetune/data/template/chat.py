"""From conversations to tokens and their loss weights, by the tokenizer's own chat template or a given one.

The template is rendered with markers in the place of the row's texts (markers.py), so control tokens are taken from the
template alone: a user who types `<|im_end|>` gets those ten characters. The marked rendering, filled in, is proven
equal to rendering the row itself. What stands between two control tokens is encoded in one piece, because a byte-level
BPE merges across the border (a role header's newline and a content that starts with one). On clean text the ids equal
`tokenizer.apply_chat_template`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from finetune.data.encoded import Encoded
from finetune.data.formats.messages import Conversation, Message
from finetune.data.template.layout import Run, check_complete, control_pattern, lay_out
from finetune.data.template.markers import CLOSE, OPEN, MarkedRow
from finetune.data.template.reasoning import TAGS, Stretch, reasoning_in
from finetune.data.template.sandbox import Renderer
from finetune.system.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_MOST_LAYOUTS = 2048


@dataclass(slots=True)
class _Row:
    """A conversation as its template writes it. loss: the weight of a message's targets; rest: of everything else."""

    runs: list[Run]
    texts: list[str]  # of each run
    places: list[list[int]]  # of each run: the character at which each of its pieces begins
    contents: dict[int, int]  # as MarkedRow's
    loss: dict[int, float] = field(default_factory=dict)
    rest: float = 0.0
    reasoning: dict[int, list[Stretch]] = field(default_factory=dict)  # of each run: what weighs nothing

    def to_tokenize(self) -> list[str]:
        return [text for run, text in zip(self.runs, self.texts, strict=True) if run.fixed is None]


class ChatTemplate:
    """Encodes conversations for one tokenizer and one template. Picklable; keeps no hold on the tokenizer given.

    template: jinja source; the tokenizer's own when None.
    Raises: DataError if there is no template, or it is not one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None):
        try:
            self.template: str = tokenizer.get_chat_template(template)
        except ValueError as error:
            raise DataError(
                "the tokenizer has no chat template; set data.chat_template to a jinja file, or use an Instruct model"
            ) from error
        self.special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
        added = tokenizer.added_tokens_decoder.items()
        self._control_id = {str(token): i for i, token in added if token.special}
        self._definition: str = tokenizer.backend_tokenizer.to_str()  # type: ignore[attr-defined]
        self._prepare()
        if borders := self._borders({str(token): i for i, token in added if not token.special}):
            self._control_id |= borders
            self._definition = _with_special(self._definition, borders)
            self._prepare()

    def _prepare(self) -> None:
        self._renderer = Renderer(self.template, self.special_tokens)
        self._control = control_pattern(list(self._control_id))
        self._layouts: dict[tuple, list[Run]] = {}
        self._fixed: dict[str, list[int]] = {}

    def _borders(self, ordinary: dict[str, int]) -> dict[str, int]:
        """Those of a tokenizer's ordinary added tokens that the template writes around plain turns.

        They are control tokens, whatever the tokenizer says: R1-Distill-Qwen's does not call its roles special. The
        tags of reasoning are what a model says.
        """
        turns = [Message("user", "a").as_dict(), Message("assistant", "b").as_dict()]
        try:
            plain = self._renderer.render(turns, None, False)
        except DataError:
            return {}
        return {token: ordinary[token] for token in control_pattern(list(ordinary)).findall(plain) if token not in TAGS}

    @cached_property
    def _backend(self) -> Tokenizer:
        """Made when it is first needed: a process whose children encode does without its 100 MB."""
        backend = Tokenizer.from_str(self._definition)
        backend.no_padding()
        backend.no_truncation()
        backend.post_processor = None  # it would trim blanks from the tokens' places
        backend.encode_special_tokens = True  # text is text; no part of the definition
        return backend

    def __getstate__(self) -> tuple[str, dict[str, Any], dict[str, int], str]:
        return self.template, self.special_tokens, self._control_id, self._definition

    def __setstate__(self, state: tuple[str, dict[str, Any], dict[str, int], str]) -> None:
        self.template, self.special_tokens, self._control_id, self._definition = state
        self._prepare()

    @cached_property
    def vocabulary_size(self) -> int:
        """One more than the largest id."""
        return max(self._backend.get_vocab().values()) + 1

    @property
    def eos_id(self) -> int | None:
        """The tokenizer's own end token."""
        return self._backend.token_to_id(self.special_tokens.get("eos_token") or "")

    @property
    def end_of_text_id(self) -> int:
        """What ends a raw document. Raises: DataError if the tokenizer has no such token."""
        known = (self._backend.token_to_id(token) for token in _END_OF_TEXT if token in self._control_id)
        if (found := next(known, self.eos_id)) is None:
            raise DataError("the tokenizer has no token that ends a document, so raw text cannot be trained on")
        return found

    @cached_property
    def turn_end_id(self) -> int | None:
        """The control token that the template ends an assistant's turn with; None if it does not."""
        try:
            row = self._compose(Conversation((Message("user", "a"), Message("assistant", "b"))), "last")
        except DataError:
            return None
        return next(self._control_id[run.control] for run in reversed(row.runs) if run.spans and run.control)

    def token_of(self, token_id: int | None) -> str | None:
        """The text of a token."""
        return None if token_id is None else self._backend.id_to_token(token_id)

    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: what the template ends an assistant's turn with, and the tokenizer's own end.

        Base models' tokenizers name only the latter, but what is trained on chats writes the former.
        """
        return sorted({i for i in (self.turn_end_id, self.eos_id) if i is not None})

    def control_tokens_in(self, text: str) -> int:
        """How many control tokens the text spells out; they are encoded as ordinary text."""
        return len(self._control.findall(text))

    def digest(self) -> str:
        """SHA-256 over everything that decides the tokens of a conversation."""
        parts = [self._definition, self.template, json.dumps(self.special_tokens, sort_keys=True, default=str)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def encode(self, conversations: Sequence[Conversation], train_on: str = "assistant") -> list[Encoded | DataError]:
        """Tokens and weights of every conversation, in order; a DataError stands where one could not be encoded.

        train_on: `assistant` trains every assistant turn, `answer` the same without their reasoning, `last` the last of
        them, `all` every token. A turn's targets are what the model would write: its text, its tool calls and the
        control token that ends it, not the header before nor the newline after. They weigh what the message weighs;
        everything else weighs 0, or 1 under `all`.
        """
        rows = [self._compose_or_error(conversation, train_on) for conversation in conversations]
        good = [row for row in rows if isinstance(row, _Row)]
        encodings = iter(self._tokenize([text for row in good for text in row.to_tokenize()]))
        return [row if isinstance(row, DataError) else self._assemble(row, encodings) for row in rows]

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Plain texts, control tokens in them kept as text: ids [T] int32 of each, without an end.

        Raises: DataError for a text that is no Unicode (half a surrogate pair).
        """
        for text in texts:
            _check_unicode(text)
        found = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in found]

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Tokens that ask the model for its next turn: the conversation, then the assistant's header.

        Raises: DataError if the template refuses the conversation or changes its texts.
        """
        row = self._fill(Conversation(tuple(messages), tuple(tools)), frozenset(), prompt=True)
        return self._assemble(row, iter(self._tokenize(row.to_tokenize()))).ids.tolist()

    def answer_text(self, conversation: Conversation) -> str:
        """What the template writes for the last assistant turn, text and tool calls, without control tokens.

        Raises: DataError as for a row that cannot be encoded.
        """
        row = self._compose(conversation, "last")
        filled = zip(row.runs, row.texts, row.places, strict=True)
        return "".join(text[places[run.spans[0][0]] :] for run, text, places in filled if run.spans)

    def _compose_or_error(self, conversation: Conversation, train_on: str) -> _Row | DataError:
        try:
            return self._compose(conversation, train_on)
        except DataError as error:
            return error

    def _compose(self, conversation: Conversation, train_on: str) -> _Row:
        loss = _loss_weights(conversation.messages, train_on)
        row = self._fill(conversation, frozenset(loss), complete=train_on != "last")
        row.loss, row.rest = loss, float(train_on == "all")
        if train_on == "answer":
            for number, (run, text, places) in enumerate(zip(row.runs, row.texts, row.places, strict=True)):
                row.reasoning[number] = reasoning_in(run, text, places, row.contents, conversation.messages)
        return row

    def _fill(
        self, conversation: Conversation, turns: frozenset[int], *, complete: bool = False, prompt: bool = False
    ) -> _Row:
        """The conversation as the template lays out its shape, proven equal to what the template writes for it."""
        marked = MarkedRow(conversation.messages, conversation.tools)
        messages = [message.as_dict() for message in conversation.messages]
        real = self._renderer.render(messages, list(conversation.tools) or None, prompt)
        _check_unicode(real)
        if OPEN in real or CLOSE in real:
            raise DataError("a text holds the private-use character U+E0F0 or U+E0F1; remove it")
        outer = len(marked.values)
        key = (marked.shape, turns, complete, prompt)
        if (row := self._filled(key, marked, real)) is not None:
            return row
        # A new shape; or a template that looks into tools and arguments, or at texts, and took another way here.
        inner_key = (*key, marked.mark_inner())
        if (row := self._filled(inner_key, marked, real)) is not None:
            return row
        runs = self._lay_out(marked, turns, complete, prompt)
        if len(self._layouts) >= _MOST_LAYOUTS:
            self._layouts.clear()
            self._fixed.clear()
        numbers = (number for run in runs for number in run.numbers())
        used = key if max(numbers, default=0) < outer else inner_key
        self._layouts[used] = runs
        if (row := self._filled(used, marked, real)) is None:
            raise DataError(
                "the chat template changes a message's text (it trims or splits it), so its mask would be a guess; "
                "set data.chat_template to a template that writes texts as they are"
            )
        return row

    def _filled(self, key: tuple, marked: MarkedRow, real: str) -> _Row | None:
        """The row in the layout that is known for the key; None if there is none, or the template writes otherwise."""
        if (runs := self._layouts.get(key)) is None:
            return None
        filled = [run.fill(marked.values) for run in runs]
        whole = "".join(text + (run.control or "") for run, (text, _) in zip(runs, filled, strict=True))
        texts, places = [text for text, _ in filled], [places for _, places in filled]
        return _Row(runs, texts, places, marked.contents) if whole == real else None

    def _lay_out(self, marked: MarkedRow, turns: frozenset[int], complete: bool, prompt: bool) -> list[Run]:
        def render(end: int, add_generation_prompt: bool) -> str:
            return self._renderer.render(marked.messages[:end], marked.tools, add_generation_prompt)

        runs = lay_out(render, marked, turns, self._control, prompt)
        if complete:
            check_complete(marked, runs)
        return runs

    def _tokenize(self, texts: list[str]) -> list[Encoding]:
        return self._backend.encode_batch(texts, add_special_tokens=False) if texts else []

    def _assemble(self, row: _Row, encodings: Iterator[Encoding]) -> Encoded:
        ids: list[int] = []
        marks: list[tuple[int, float]] = []  # (token, weight from there on)
        thought: list[slice] = []
        for number, (run, text, places) in enumerate(zip(row.runs, row.texts, row.places, strict=True)):
            before = len(ids)
            if run.fixed is None:
                encoding = next(encodings)
                ids += encoding.ids
                marks += [
                    (before + _first_token(encoding, places[piece], len(text)), row.loss[turn])
                    for piece, turn in run.spans
                ]
                for stretch in row.reasoning.get(number, ()):
                    first, last = _tokens_of(encoding, stretch, len(text))
                    thought.append(slice(before + first, before + last))
            else:
                ids += self._fixed_ids(run.fixed)
                marks += [(before, row.loss[turn]) for _, turn in run.spans]
            if run.control is not None:
                ids.append(self._control_id[run.control])
            if run.spans:
                marks.append((len(ids), row.rest))
        weights = np.full(len(ids), row.rest, dtype=np.float32)
        for token, weight in marks:
            weights[token:] = weight
        for tokens in thought:
            weights[tokens] = 0
        return Encoded(np.array(ids, dtype=np.int32), weights)

    def _fixed_ids(self, text: str) -> list[int]:
        if text not in self._fixed:
            self._fixed[text] = self._backend.encode(text, add_special_tokens=False).ids
        return self._fixed[text]


def advice_on_end_token(chat: ChatTemplate) -> str | None:
    """What to know before training a model whose tokenizer does not name the token that the template ends turns with.

    That is the case of base models: the token's row of the head was never trained. None where both are the same.
    """
    if chat.turn_end_id in (None, chat.eos_id):
        return None
    end, own = (chat.token_of(i) for i in (chat.turn_end_id, chat.eos_id))
    return (
        f"the chat template ends a turn with {end}, but the tokenizer's own end is {own}: this is a base model, whose "
        f"head never learned to write {end}, and adapters on its layers cannot teach it, so answers may not stop; "
        "start from an "
        "Instruct model, or train the head as well: lora.modules_to_save=[lm_head] (where the embedding is tied to "
        "it, both learn)"
    )


def _with_special(definition: str, tokens: Collection[str]) -> str:
    """A tokenizer's definition in which these added tokens are special, so that texts that spell them stay texts."""
    content = json.loads(definition)
    for token in content["added_tokens"]:
        token["special"] |= token["content"] in tokens
    return json.dumps(content)


def _first_token(encoding: Encoding, start: int, length: int) -> int:
    """The first token that begins at the character `start` or after it.

    A token that straddles the header and the text belongs to the header: serving never predicts it.
    """
    token = _token_at(encoding, start, length)
    while token < len(encoding) and (place := encoding.token_to_chars(token)) is not None and place[0] < start:
        token += 1
    return token


def _token_at(encoding: Encoding, start: int, length: int) -> int:
    """The token that holds the character `start`, or the first one after it."""
    if start == 0:
        return 0
    tokens = (encoding.char_to_token(character) for character in range(start, length))
    return next((token for token in tokens if token is not None), len(encoding))


def _tokens_of(encoding: Encoding, stretch: Stretch, length: int) -> tuple[int, int]:
    """The tokens [first, last) that hold anything of the reasoning, or nothing but blanks beside it.

    One that holds a blank and then the answer (` Four`) is the answer's.
    """
    first = min(_first_token(encoding, stretch.before, length), _token_at(encoding, stretch.first, length))
    return first, max(_first_token(encoding, stretch.last, length), _token_at(encoding, stretch.after, length))


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"a text holds half a surrogate pair, {text[error.start]!r}, which is no Unicode") from error


def _loss_weights(messages: Sequence[Message], train_on: str) -> dict[int, float]:
    """The weight of each message whose targets weigh otherwise than the rest of the row."""
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if not turns and train_on != "all":
        raise DataError("no assistant message, so there is nothing to train on")
    if empty := [i for i in turns if not messages[i].content and not messages[i].tool_calls]:
        raise DataError(f"assistant message {empty[0]} is empty, so there is nothing to train on")
    if train_on == "all":
        return {i: m.weight for i, m in enumerate(messages) if m.weight != 1 and (m.content or m.tool_calls)}
    selected = {"assistant": turns, "answer": turns, "last": turns[-1:]}[train_on]
    weights = {i: messages[i].weight for i in selected if messages[i].weight > 0}
    if not weights:
        raise DataError(f"every assistant message that data.train_on={train_on} selects has weight 0")
    return weights
