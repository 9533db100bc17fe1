"""Encode conversations as tokens and loss weights, by a chat template.

How a row is encoded:
1. The template is rendered with markers instead of the row's texts (markers.py).
2. The marked rendering is cut at its control tokens into runs of text (layout.py). So control tokens come from the
   template alone: a user who types `<|im_end|>` gets those ten characters.
3. The runs are filled with the row's texts. The result must equal the rendering of the row itself.
4. Each run is tokenized in one piece, because a byte-level BPE merges across the border of header and content.

On text without control tokens, the ids equal those of `tokenizer.apply_chat_template`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from finetune.data.encoded import Encoded
from finetune.data.formats.messages import THINK_TAGS, Conversation, Message
from finetune.data.template.layout import (
    FilledRun,
    Reasoning,
    Run,
    control_pattern,
    lay_out,
    loss_weights,
    reasoning_in,
)
from finetune.data.template.markers import CLOSE, OPEN, MarkedRow
from finetune.data.template.placeholders import place_media
from finetune.data.template.sandbox import Renderer
from finetune.system.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.data.media.processor import MediaProcessor

_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_MOST_LAYOUTS = 2048


@dataclass(slots=True)
class _Row:
    """A conversation as its template writes it.

    loss: weight of each message's targets. rest: weight of all other tokens. reasoning: per run, what weighs nothing.
    """

    runs: list[FilledRun]
    contents: dict[int, int]  # of MarkedRow
    loss: dict[int, float] = field(default_factory=dict)
    rest: float = 0.0
    reasoning: dict[int, list[Reasoning]] = field(default_factory=dict)


class ChatTemplate:
    """Encodes conversations for one tokenizer and one template. Picklable; keeps no reference to the tokenizer.

    tokenizer: a fast tokenizer of transformers.
    template: jinja source; None takes the tokenizer's own.
    control_ids: id of each control token.
    Raises: DataError if there is no template, or it cannot be compiled.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None):
        try:
            self.template: str = tokenizer.get_chat_template(template)
        except ValueError as error:
            raise DataError(
                "the tokenizer has no chat template\n"
                "help: set data.chat_template to a jinja file, or use an Instruct model"
            ) from error
        self.special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
        added = tokenizer.added_tokens_decoder.items()
        self.control_ids = {str(token): i for i, token in added if token.special}
        self._definition: str = tokenizer.backend_tokenizer.to_str()  # type: ignore[attr-defined]
        self._prepare()
        if found := self._unmarked_control_tokens({str(token): i for i, token in added if not token.special}):
            self.control_ids |= found
            definition = json.loads(self._definition)
            for token in definition["added_tokens"]:  # special, so that texts that spell them stay texts
                token["special"] |= token["content"] in found
            self._definition = json.dumps(definition)
            self._prepare()

    def _prepare(self) -> None:
        self._renderer = Renderer(self.template, self.special_tokens)
        self._control = control_pattern(list(self.control_ids))
        self._layouts: dict[tuple, list[Run]] = {}
        self._fixed: dict[str, list[int]] = {}

    def _unmarked_control_tokens(self, ordinary: dict[str, int]) -> dict[str, int]:
        """Return the ordinary added tokens that the template writes around plain turns.

        They are control tokens although the tokenizer does not call them special, as the roles of R1-Distill-Qwen.
        The tags of reasoning are not: a model writes them.
        """
        turns = [Message("user", "a").as_dict(), Message("assistant", "b").as_dict()]
        try:
            plain = self._renderer.render(turns, None, False)
        except DataError:
            return {}
        found = control_pattern(list(ordinary)).findall(plain)
        return {token: ordinary[token] for token in found if token not in THINK_TAGS}

    @cached_property
    def backend(self) -> Tokenizer:
        """The tokenizer, to which control tokens in a text are text.

        Built on first use: a process whose children encode saves its 100 MB.

        Raises: DataError: pieces of the vocabulary do not fit each other.
        """
        try:
            backend = Tokenizer.from_str(self._definition)
        except Exception as error:  # the library raises plain exceptions
            raise DataError(f"the tokenizer is damaged: {str(error)[:200]}") from error
        backend.no_padding()
        backend.no_truncation()
        backend.post_processor = None  # it would trim blanks from the tokens' offsets
        backend.encode_special_tokens = True  # control tokens in a text stay text; not part of the definition
        return backend

    def __getstate__(self) -> tuple[str, dict[str, Any], dict[str, int], str]:
        return self.template, self.special_tokens, self.control_ids, self._definition

    def __setstate__(self, state: tuple[str, dict[str, Any], dict[str, int], str]) -> None:
        self.template, self.special_tokens, self.control_ids, self._definition = state
        self._prepare()

    @cached_property
    def vocabulary_size(self) -> int:
        """The largest id plus 1."""
        return max(self.backend.get_vocab().values()) + 1

    @cached_property
    def text_start(self) -> list[int]:
        """The tokens that the tokenizer puts before every text, as Llama's does; a template writes its own."""
        whole = Tokenizer.from_str(self._definition)
        plain, full = (whole.encode("a", add_special_tokens=special).ids for special in (False, True))
        return full[: full.index(plain[0])] if plain and plain[0] in full else []

    @property
    def eos_id(self) -> int | None:
        """The tokenizer's end token."""
        return self.backend.token_to_id(self.special_tokens.get("eos_token") or "")

    @property
    def end_of_text_id(self) -> int:
        """The token that ends a raw document. Raises: DataError if the tokenizer has none."""
        known = (self.backend.token_to_id(token) for token in _END_OF_TEXT if token in self.control_ids)
        if (found := next(known, self.eos_id)) is None:
            raise DataError("the tokenizer has no token that ends a document, so it cannot train on raw text")
        return found

    @cached_property
    def turn_end_id(self) -> int | None:
        """The control token with which the template ends an assistant turn; None if there is none."""
        try:
            row = self._compose(Conversation((Message("user", "a"), Message("assistant", "b"))), "last")
        except DataError:
            return None
        runs = [filled.run for filled in row.runs]
        return next(self.control_ids[run.control] for run in reversed(runs) if run.spans and run.control)

    def token_of(self, token_id: int | None) -> str | None:
        """Return the text of a token."""
        return None if token_id is None else self.backend.id_to_token(token_id)

    def decode(self, ids: np.ndarray) -> str:
        """Return the text of tokens [T], without control tokens."""
        return self.backend.decode(ids.tolist(), skip_special_tokens=True)

    def stop_ids(self) -> list[int]:
        """Return the tokens that end an answer: the end of an assistant turn, and the tokenizer's end token.

        Tokenizers of base models name only the second, but a model trained on chats writes the first.
        """
        return sorted({i for i in (self.turn_end_id, self.eos_id) if i is not None})

    def control_tokens_in(self, text: str) -> int:
        """Count the control tokens that a text spells out; they are encoded as ordinary text."""
        return len(self._control.findall(text))

    def digest(self) -> str:
        """Return the SHA-256 of everything that decides the tokens of a conversation."""
        parts = [self._definition, self.template, json.dumps(self.special_tokens, sort_keys=True, default=str)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def encode(
        self,
        conversations: Sequence[Conversation],
        train_on: str = "assistant",
        processor: MediaProcessor | None = None,
    ) -> list[Encoded | DataError]:
        """Encode conversations.

        The targets of a turn are what the model writes: its text, its tool calls and the control token that ends it.
        The header before it and the newline after it are no targets. A target has the weight of its message; other
        tokens have weight 0, or 1 under `all`.

        train_on: `assistant` trains every assistant turn, `answer` the same without reasoning, `last` the last
            assistant turn, `all` every token.
        processor: of the model's media, whose tokens are never targets; None if it reads text only.
        Returns: tokens and weights of each conversation, in order; a DataError for one that cannot be encoded.
        """
        rows: list[_Row | DataError] = []
        for conversation in conversations:
            try:
                rows.append(self._compose(conversation, train_on))
            except DataError as error:
                rows.append(error)
        encodings = self._encodings(row for row in rows if isinstance(row, _Row))
        encoded = (row if isinstance(row, DataError) else self._assemble(row, encodings) for row in rows)
        return [
            self._with_media(each, conversation.messages, processor)
            for each, conversation in zip(encoded, conversations, strict=True)
        ]

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode plain texts, control tokens in them as text: ids [T] int32 of each, without an end token.

        Raises: DataError for a text that is not Unicode (half a surrogate pair).
        """
        for text in texts:
            _check_unicode(text)
        found = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in found]

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        processor: MediaProcessor | None = None,
    ) -> Encoded:
        """Encode a prompt: the conversation, then the assistant's header. No token is a target.

        processor: of the model's media; None if it reads text only.
        Raises: DataError if the template refuses the conversation or changes its texts, or media cannot be read.
        """
        row = self._fill(Conversation(tuple(messages), tuple(tools)), frozenset(), prompt=True)
        encoded = self._with_media(self._assemble(row, self._encodings([row])), messages, processor)
        if isinstance(encoded, DataError):
            raise encoded
        return encoded

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Return the tokens of a prompt without media. Raises: as `prompt`."""
        return self.prompt(messages, tools).ids.tolist()

    def _with_media(
        self, encoded: Encoded | DataError, messages: Sequence[Message], processor: MediaProcessor | None
    ) -> Encoded | DataError:
        if isinstance(encoded, DataError) or not any(message.media for message in messages):
            return encoded
        try:
            return place_media(encoded, messages, processor, self.control_ids)
        except DataError as error:
            return error

    def answer_text(self, conversation: Conversation) -> str:
        """Return the last assistant turn without control tokens; its tool calls are as the template writes them.

        Raises: DataError if a turn with tool calls cannot be encoded.
        """
        last = next(message for message in reversed(conversation.messages) if message.role == "assistant")
        if not last.tool_calls:
            return last.content
        row = self._compose(conversation, "last")
        return "".join(filled.text[filled.offsets[filled.run.spans[0][0]] :] for filled in row.runs if filled.run.spans)

    def _compose(self, conversation: Conversation, train_on: str) -> _Row:
        loss = loss_weights(conversation.messages, train_on)
        row = self._fill(conversation, frozenset(loss), complete=train_on != "last")
        row.loss, row.rest = loss, float(train_on == "all")
        if train_on == "answer":
            for number, filled in enumerate(row.runs):
                row.reasoning[number] = reasoning_in(filled, row.contents, conversation.messages)
        return row

    def _fill(
        self, conversation: Conversation, turns: frozenset[int], *, complete: bool = False, prompt: bool = False
    ) -> _Row:
        """Fill a conversation into the layout of its shape, and check it against the template's own rendering.

        turns: messages with targets. complete: every message must be written. prompt: end with the assistant's header.
        """
        marked = MarkedRow(conversation.messages, conversation.tools)
        messages = [message.as_dict() for message in conversation.messages]
        rendered = self._renderer.render(messages, list(conversation.tools) or None, prompt)
        _check_unicode(rendered)
        if OPEN in rendered or CLOSE in rendered:
            raise DataError("a text contains the private-use character U+E0F0 or U+E0F1; remove it")
        outer_values = len(marked.values)
        outer_key = (marked.shape, turns, complete, prompt)
        if (row := self._filled(outer_key, marked, rendered)) is not None:
            return row
        # Either the shape is new, or the template looks into tools, arguments or texts and took another branch here.
        inner_key = (*outer_key, marked.mark_inner())
        if (row := self._filled(inner_key, marked, rendered)) is not None:
            return row

        def render(end: int, header: bool) -> str:
            return self._renderer.render(marked.messages[:end], marked.tools, header)

        runs = lay_out(render, marked, turns, self._control, complete=complete, prompt=prompt)
        if len(self._layouts) >= _MOST_LAYOUTS:
            self._layouts.clear()
            self._fixed.clear()
        last_value = max((number for run in runs for number in run.numbers()), default=0)
        key = outer_key if last_value < outer_values else inner_key
        self._layouts[key] = runs
        if (row := self._filled(key, marked, rendered)) is None:
            raise DataError(
                "the chat template changes a message's text (it trims or splits it), so its loss mask would be a "
                "guess; set data.chat_template to a template that writes texts as they are"
            )
        return row

    def _filled(self, key: tuple, marked: MarkedRow, rendered: str) -> _Row | None:
        """The row in the known layout of this key; None without one, or if the template writes something else."""
        if (runs := self._layouts.get(key)) is None:
            return None
        filled = [run.fill(marked.values) for run in runs]
        whole = "".join(each.text + (each.run.control or "") for each in filled)
        return _Row(filled, marked.contents) if whole == rendered else None

    def _encodings(self, rows: Iterable[_Row]) -> Iterator[Encoding]:
        """The tokens of all runs that are not fixed, in order."""
        texts = [filled.text for row in rows for filled in row.runs if filled.run.fixed is None]
        return iter(self.backend.encode_batch(texts, add_special_tokens=False) if texts else ())

    def _assemble(self, row: _Row, encodings: Iterator[Encoding]) -> Encoded:
        """Join the tokens of the row's runs, and set their weights. Takes from `encodings` what it needs."""
        ids: list[int] = []
        changes: list[tuple[int, float]] = []  # (token, weight from there on)
        reasoning: list[slice] = []
        for number, filled in enumerate(row.runs):
            run, start = filled.run, len(ids)
            if run.fixed is not None:
                if run.fixed not in self._fixed:
                    self._fixed[run.fixed] = self.backend.encode(run.fixed, add_special_tokens=False).ids
                ids += self._fixed[run.fixed]
                changes += [(start, row.loss[turn]) for _, turn in run.spans]
            else:
                encoding, length = next(encodings), len(filled.text)
                ids += encoding.ids
                for piece, turn in run.spans:
                    first = _first_token(encoding, filled.offsets[piece], length)
                    changes.append((start + first, row.loss[turn]))
                for before, first, last, after in row.reasoning.get(number, ()):
                    # A token of a blank and the start of the answer (` Four`) belongs to the answer.
                    begin = min(_first_token(encoding, before, length), _token_at(encoding, first, length))
                    end = max(_first_token(encoding, last, length), _token_at(encoding, after, length))
                    reasoning.append(slice(start + begin, start + end))
            if run.control is not None:
                ids.append(self.control_ids[run.control])
            if run.spans:
                changes.append((len(ids), row.rest))
        weights = np.full(len(ids), row.rest, dtype=np.float32)
        for token, weight in changes:
            weights[token:] = weight
        for tokens in reasoning:
            weights[tokens] = 0
        return Encoded(np.array(ids, dtype=np.int32), weights)


def _first_token(encoding: Encoding, start: int, length: int) -> int:
    """The first token that begins at the character `start` or after it.

    A token that straddles header and text belongs to the header: a served model never predicts it.
    """
    token = _token_at(encoding, start, length)
    while token < len(encoding) and (offsets := encoding.token_to_chars(token)) is not None and offsets[0] < start:
        token += 1
    return token


def _token_at(encoding: Encoding, start: int, length: int) -> int:
    """The token that holds the character `start`, or the first token after it."""
    if start == 0:
        return 0
    tokens = (encoding.char_to_token(character) for character in range(start, length))
    return next((token for token in tokens if token is not None), len(encoding))


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"a text contains half a surrogate pair, found {text[error.start]!r}") from error
