"""From messages to tokens and a mask, by the tokenizer's own chat template.

The template is rendered with markers in the place of the contents, so that the text the template wrote and the text
the user wrote stay apart: control tokens are taken from the template alone, and a user who types `<|im_end|>` gets
those ten characters. Everything between two control tokens is encoded in one piece, because a byte-level BPE merges
across the border (a role header's newline and a content that starts with one). On clean text the ids equal
`tokenizer.apply_chat_template`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from finetune.data.formats import Message
from finetune.errors import DataError

UNTRAINED = -100
# Private-use characters: no template writes them; a content that holds them is refused.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
_MARKER = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens of one conversation. ids [T] int32; trained [T] bool: the token is a training target."""

    ids: np.ndarray
    trained: np.ndarray


@dataclass(slots=True)
class _Run:
    """Text between two control tokens, with the character ranges that are training targets."""

    text: str
    trained: list[tuple[int, int]]
    control: str | None  # the control token that ends the run
    control_trained: bool = False


class ChatTemplate:
    """Encodes conversations for one tokenizer and one template.

    template: jinja source; the tokenizer's own when None.
    Raises: DataError if there is no template, or it cannot be rendered or masked exactly.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None):
        self.tokenizer = tokenizer
        try:
            self.template: str = tokenizer.get_chat_template(template)
        except ValueError as error:
            raise DataError(
                "the tokenizer has no chat template; set data.chat_template to a jinja file, or use an Instruct model"
            ) from error
        self._control_id: dict[str, int] = {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        longest_first = sorted(self._control_id, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)))
        self._skeletons: dict[tuple, str] = {}

    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: what the template ends an assistant's turn with, and the tokenizer's own end.

        Base models' tokenizers name only the latter, but what is trained on chats writes the former.
        """
        turns = [Message("user", "a"), Message("assistant", "b")]
        runs = self._runs(self._render(turns, add_generation_prompt=False), turns, frozenset({1}))
        ends = {self._control_id[run.control] for run in runs if run.control_trained and run.control is not None}
        return sorted(ends | {self.tokenizer.eos_token_id} - {None})

    def control_tokens_in(self, text: str) -> int:
        """How many control tokens the text spells out; they are encoded as ordinary text."""
        return len(self._control.findall(text))

    def encode(
        self, conversations: Sequence[Sequence[Message]], train_on: str = "assistant"
    ) -> list[Encoded | DataError]:
        """Tokens and mask of every conversation, in order; a DataError stands where one could not be encoded.

        train_on: `assistant` trains every assistant turn, `last` the last of them, `all` every token.
        A turn's targets are its content and the control token that ends it: not its header, not the newline after.
        """
        composed = [self._compose_or_error(messages, train_on) for messages in conversations]
        texts = [run.text for runs in composed if not isinstance(runs, DataError) for run in runs]
        encodings = iter(self._encode_texts(texts))
        return [runs if isinstance(runs, DataError) else self._assemble(runs, encodings) for runs in composed]

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens that ask the model for its next turn: the conversation, then the assistant's header."""
        runs = self._runs(self._render(messages, add_generation_prompt=True), messages, frozenset())
        return self._assemble(runs, iter(self._encode_texts([run.text for run in runs]))).ids.tolist()

    def _compose_or_error(self, messages: Sequence[Message], train_on: str) -> list[_Run] | DataError:
        try:
            trained = _trained_turns(messages, train_on)
            runs = self._runs(self._render(messages, add_generation_prompt=False), messages, trained)
            if train_on == "all":
                for run in runs:
                    run.trained, run.control_trained = [(0, len(run.text))], True
            return runs
        except DataError as error:
            return error

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The template's text with a marker for every content, proven equal to what it makes of the contents."""
        if any(_OPEN in m.content or _CLOSE in m.content for m in messages):
            raise DataError("a content holds the private-use character U+E0F0 or U+E0F1; remove it")
        key = (add_generation_prompt, tuple((m.role, bool(m.content)) for m in messages))
        if key not in self._skeletons:
            marked = [
                {"role": m.role, "content": f"{_OPEN}{i}{_CLOSE}" if m.content else ""} for i, m in enumerate(messages)
            ]
            self._skeletons[key] = self._apply(marked, add_generation_prompt)
        skeleton = self._skeletons[key]
        filled = _MARKER.sub(lambda found: messages[int(found[1])].content, skeleton)
        if filled != self._apply([m.as_dict() for m in messages], add_generation_prompt):
            raise DataError(
                "the chat template changes a message's text (it trims or splits it), so its mask would be a guess; "
                "set data.chat_template to a template that writes contents as they are"
            )
        return skeleton

    def _apply(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, chat_template=self.template, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise DataError(f"the chat template refuses the row: {error}") from error
        return str(text)

    def _runs(self, skeleton: str, messages: Sequence[Message], trained: frozenset[int]) -> list[_Run]:
        """Cut at the control tokens the template wrote; put the contents in."""
        if lost := trained - set(map(int, _MARKER.findall(skeleton))):
            raise DataError(f"the chat template leaves out message {min(lost)} ({messages[min(lost)].role})")
        runs: list[_Run] = []
        start = 0
        for control in self._control.finditer(skeleton):
            runs.append(_fill(skeleton[start : control.start()], messages, trained, control[0]))
            start = control.end()
        runs.append(_fill(skeleton[start:], messages, trained, None))
        if runs[-1].trained:
            raise DataError(
                "the chat template ends an assistant turn without a control token, so the model would never learn to "
                "stop; set data.chat_template"
            )
        return runs

    def _encode_texts(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        if not texts:
            return []
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))

    def _assemble(self, runs: list[_Run], encodings) -> Encoded:
        ids: list[int] = []
        trained: list[bool] = []
        for run in runs:
            run_ids, offsets = next(encodings)
            ids += run_ids
            # A token that straddles the header and the content belongs to the header: serving never predicts it.
            trained += [any(a <= start < b for a, b in run.trained) for start, _ in offsets]
            if run.control is not None:
                ids.append(self._control_id[run.control])
                trained.append(run.control_trained)
        return Encoded(np.asarray(ids, dtype=np.int32), np.asarray(trained, dtype=bool))


def _fill(piece: str, messages: Sequence[Message], trained: frozenset[int], control: str | None) -> _Run:
    run = _Run("", [], control)
    for i, part in enumerate(_MARKER.split(piece)):
        if i % 2 == 0:
            run.text += part
            continue
        content = messages[int(part)].content
        if int(part) in trained:
            run.trained.append((len(run.text), len(run.text) + len(content)))
            run.control_trained = True
        run.text += content
    return run


def _trained_turns(messages: Sequence[Message], train_on: str) -> frozenset[int]:
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if not turns and train_on != "all":
        raise DataError("no assistant message, so there is nothing to train on")
    if empty := [i for i in turns if not messages[i].content]:
        raise DataError(f"assistant message {empty[0]} is empty, so there is nothing to train on")
    return frozenset({"assistant": turns, "last": turns[-1:], "all": turns}[train_on])
