"""The conversation of `finetune chat url=…`: a model of any server with OpenAI's API."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from finetune.commands.chat import stoppable, with_system
from finetune.data.formats.messages import MediaPart, Message
from finetune.data.media.media import MediaKind
from finetune.serving.client import ChatClient
from finetune.system.console import log, printable
from finetune.system.errors import InputError

if TYPE_CHECKING:
    from finetune.config.command_options import ChatOptions

# The first one that is set.
KEY_VARIABLES = ("FINETUNE_API_KEY", "OPENAI_API_KEY")


@dataclass
class RemoteConversation:
    """The turns so far with a served model."""

    client: ChatClient
    model: str
    options: ChatOptions
    turns: list[Message] = field(default_factory=list)
    files: list[MediaPart] = field(default_factory=list)

    @classmethod
    def reach(cls, options: ChatOptions) -> Self:
        """Reach the server of `url`, and choose its model.

        Raises:
            InputError: the address is wrong, or the server cannot be reached or does not serve this model.
        """
        key = next((value for name in KEY_VARIABLES if (value := os.environ.get(name, "").strip())), None)
        client = ChatClient(options.url or "", key)
        adapters = client.models()
        names = list(adapters)
        if options.model is not None and options.model not in adapters:
            raise InputError(f"model={options.model}: is not served; there are: {printable(', '.join(names))}")
        if not names:
            raise InputError(f"url={options.url}: the server has no model")
        model = options.model or next((name for name in names if adapters[name]), names[0])
        if len(names) > 1:
            log(f"served: {printable(', '.join(names))}")
        return cls(client, model, options)

    def answer(self, text: str) -> None:
        """Print the server's answer as it comes, and keep both turns. Ctrl+C stops the answer and keeps its start.

        Raises: InputError if the server refuses or fails.
        """
        turns = [*self.turns, Message("user", text)]
        settings = {"max_tokens": self.options.max_new_tokens, "temperature": self.options.temperature}
        answer = self.client.answer(self.model, [m.as_dict() for m in with_system(self.options, turns)], settings)
        with stoppable(lambda: answer.tokens), closing(iter(answer)) as pieces:
            for piece in pieces:
                print(printable(piece), end="", flush=True)
        if answer.text:
            self.turns = [*turns, Message("assistant", answer.text)]

    def add_file(self, kind: MediaKind, name: str) -> None:
        """Refuse a file. Raises: InputError."""
        raise InputError(f"/{kind}: with url=, a chat has texts only")

    def messages(self) -> list[Message]:
        """Return the system message, if there is one, and the turns so far."""
        return with_system(self.options, self.turns)
