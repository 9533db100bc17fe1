"""usage: finetune chat adapter=FOLDER [key=value …]     a trained adapter on its base
       finetune chat model=NAME [key=value …]         a base model: hub id or folder
       finetune chat config=X.yaml [adapter=FOLDER] [key=value …]
       finetune chat url=http://HOST:PORT [model=NAME] [key=value …]     a model of any server with OpenAI's API

The folder of a run, or a checkpoint in it, brings its own config. A bare adapter or model is loaded as in lora.yaml
(4-bit); quant.type=none loads it in 16 bit. With url=, the environment variable FINETUNE_API_KEY, or else
OPENAI_API_KEY, is the server's key.
In the chat: /system TEXT and /temperature NUMBER change the settings, /reset starts a new conversation, /save FILE
keeps it as a row, /help lists the commands, /exit or Ctrl+D leaves, Ctrl+C stops an answer. A line that ends in a
backslash continues on the next one. /image FILE, /audio FILE and /video FILE put a file before the next text, if the
model reads that kind; /send asks without a text.
With a pipe as input, every line is one prompt or command.

Examples
  finetune chat adapter=outputs/quickstart
  finetune chat model=Qwen/Qwen2.5-0.5B-Instruct temperature=0.7
  echo "Hello" | finetune chat adapter=outputs/quickstart
  finetune chat url=http://127.0.0.1:8000 model=quickstart
  printf '/image cat.png\\nWhat is this?\\n' | finetune chat adapter=outputs/vision
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from finetune.commands.base import Command
from finetune.data.encoded import Prompt
from finetune.data.formats.attachments import row_of
from finetune.data.formats.messages import MediaPart, Message
from finetune.data.media.media import KINDS, MediaKind
from finetune.system.arguments import Arguments, nearest
from finetune.system.console import log, printable, silent_keys
from finetune.system.errors import ConfigError, DataError, InputError, os_errors_as

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from finetune.config.command_options import ChatOptions
    from finetune.config.schema import RunConfig
    from finetune.data.media.processor import MediaProcessor
    from finetune.data.template.chat import ChatTemplate

# By command, the kind of its file.
_MEDIA: dict[str, MediaKind] = {f"/{kind}": kind for kind in KINDS}
SLASH_COMMANDS = {
    "/system": "set the system message; alone: show it",
    "/temperature": "set the sampling temperature; 0: the most probable token; alone: show it",
    **{name: f"put {kind} before the next text, as {name} FILE" for name, kind in _MEDIA.items()},
    "/send": "ask about the files, without a text",
    "/reset": "forget the conversation",
    "/save": "add the conversation to a file of rows, as /save rows.jsonl",
    "/help": "list these commands",
    "/exit": "leave, as Ctrl+D",
}
# One word after the slash: a path or a fraction is text for the model.
_COMMAND = re.compile(r"(/[A-Za-z_-]+)(?:\s+(.*))?", re.DOTALL)


@dataclass
class Conversation:
    """A model, its tokenizer and template, and the turns so far.

    context_tokens: the longest conversation, with its answer. processor: of the model's media; None if it reads text
    only. files: they stand before the next text.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    chat: ChatTemplate
    options: ChatOptions
    context_tokens: int
    processor: MediaProcessor | None = None
    turns: list[Message] = field(default_factory=list)
    files: list[MediaPart] = field(default_factory=list)

    def answer(self, text: str) -> None:
        """Print the model's answer token by token and keep both turns. Ctrl+C stops the answer and keeps its start.

        Raises:
            DataError: the text cannot be encoded, a file cannot be read any more, or the conversation is longer than
                the model's context.
        """
        turns = [*self.turns, Message("user", text, media=tuple(self.files))]
        self.files.clear()  # A file that the model cannot answer must not stay before every text.
        encoded = self.chat.prompt([*self.messages(), turns[-1]], processor=self.processor)
        prompt = Prompt(encoded.ids, encoded.placed)
        room_tokens = self.context_tokens - len(prompt)
        if room_tokens < 1:
            raise DataError(
                f"the conversation has {len(prompt)} tokens, more than the model's context; /reset clears it"
            )
        answer = self._stream(prompt, min(self.options.max_new_tokens, room_tokens))
        if answer:
            self.turns = [*turns, Message("assistant", answer)]

    def add_file(self, kind: MediaKind, name: str) -> None:
        """Put a file before the next text. Raises: InputError if it or its kind cannot be read."""
        kinds = () if self.processor is None else self.processor.kinds
        if self.processor is None or kind not in kinds:
            raise InputError(f"/{kind}: the model reads text{''.join(f', {each}' for each in kinds) or ' only'}")
        media = self.processor.measure(kind, name)
        self.files.append(MediaPart(kind, media.path, 0))
        log(f"{kind}: {printable(name)}, tokens={media.tokens:,}")

    def messages(self) -> list[Message]:
        """Return the system message, if there is one, and the turns so far."""
        return with_system(self.options, self.turns)

    def _stream(self, prompt: Prompt, max_new_tokens: int) -> str:
        import torch

        from finetune.evaluation.streaming import stream_answer

        streamer = _terminal_streamer(self.tokenizer)
        with stoppable(lambda: streamer.tokens):
            stream_answer(
                self.model,
                prompt,
                lambda token: streamer.put(torch.tensor([token])),
                max_new_tokens=max_new_tokens,
                stop_ids=self.chat.stop_ids(),
                temperature=self.options.temperature,
            )
            streamer.end()
        return streamer.written


@contextmanager
def stoppable(tokens: Callable[[], int]) -> Iterator[None]:
    """Print an answer in the block, which Ctrl+C at a terminal ends; then its speed. tokens: those written so far."""
    began = time.monotonic()
    try:
        with silent_keys():
            yield
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        print(" [stopped]", file=sys.stderr)
    print(flush=True)
    if sys.stdin.isatty():
        log(f"({tokens()} tokens, {tokens() / (time.monotonic() - began):.1f} tokens/s)")


class Talk(Protocol):
    """A conversation with a model, here or on a server."""

    options: ChatOptions
    turns: list[Message]
    files: list[MediaPart]

    def answer(self, text: str) -> None: ...

    def add_file(self, kind: MediaKind, name: str) -> None: ...

    def messages(self) -> list[Message]: ...


def with_system(options: ChatOptions, turns: Sequence[Message]) -> list[Message]:
    """Return the turns of a conversation after its system message, if there is one."""
    return [*([] if options.system is None else [Message("system", options.system)]), *turns]


def run(arguments: Arguments) -> int:
    """Load the model or reach its server, then answer the lines of a terminal or a pipe."""
    conversation, name = _remote(arguments) if arguments.options.url is not None else _local(arguments)
    if sys.stdin.isatty():
        log(f"{printable(name)}. /help lists the commands.")
        talk(conversation, _typed_lines(conversation.files))
    else:
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        for text in filter(None, (line.rstrip("\r\n") for line in sys.stdin)):
            if not respond(conversation, text):
                break
    return 0


def _remote(arguments: Arguments) -> tuple[Talk, str]:
    """Return a conversation with a served model, and the model's name."""
    from finetune.commands.chat_remote import RemoteConversation

    options = arguments.options
    extra = [f"adapter={options.adapter}"] if options.adapter is not None else []
    extra += [f"config={arguments.config}"] if arguments.config is not None else []
    if extra := [*extra, *arguments.overrides]:
        raise ConfigError(f"{extra[0]}: has no effect with url=, where the server has loaded the model; remove it")
    conversation = RemoteConversation.reach(options)
    return conversation, conversation.model


def _local(arguments: Arguments) -> tuple[Talk, str]:
    """Return a conversation with a model loaded here, and the model's name."""
    from finetune.models.adapters.base_config import find_base_config
    from finetune.models.adapters.folder import check_adapter_folder

    options = arguments.options
    adapter = None if options.adapter is None else Path(options.adapter).expanduser()
    # Before torch is imported, which takes ten times as long.
    if adapter is not None:
        check_adapter_folder(adapter, "adapter")
    config = find_base_config("finetune chat", arguments.config, options.model, adapter, arguments.overrides)
    return load_conversation(config, adapter, options), f"{config.model.name}{f' with {adapter}' if adapter else ''}"


def load_conversation(config: RunConfig, adapter: Path | None, options: ChatOptions) -> Conversation:
    """Load the base of a config, its tokenizer and template, and the adapter."""
    from finetune.models.hub import check_model

    check_model(config.model)  # Takes a tenth of the time of importing torch.

    from finetune.data.loader import load_chat_template, load_media_processor
    from finetune.data.template.chat import ChatTemplate
    from finetune.evaluation.generation import dequantize_once
    from finetune.losses.hidden_states import base_of
    from finetune.models.adapters.files import load_adapter
    from finetune.models.decoder import text_config
    from finetune.models.fused import fuse_layers
    from finetune.models.load import load_base
    from finetune.models.tokenizer import load_adapter_tokenizer, load_tokenizer
    from finetune.towers.towers import build_towers

    if adapter is None:
        tokenizer = load_tokenizer(config.model)
        chat = load_chat_template(config.data, tokenizer)
        model: PreTrainedModel | PeftModel = load_base(config.model, config.quant)
    else:
        tokenizer = load_adapter_tokenizer(config.model, adapter)
        chat = ChatTemplate(tokenizer)
        model = load_adapter(load_base(config.model, config.quant), adapter)
    if config.train.kernels == "fused":
        fuse_layers(model)
        dequantize_once(model, config.quant)
    base, processor = base_of(model), load_media_processor(config.model, config.data)
    build_towers(base, config.model, processor)
    return Conversation(model, tokenizer, chat, options, text_config(base).max_position_embeddings, processor)


def talk(conversation: Talk, lines: Iterable[str]) -> None:
    """Answer line by line until the end or /exit; log the error of a line that is wrong or has no answer."""
    for text in lines:
        try:
            if not respond(conversation, text):
                return
        except InputError as error:
            log(f"error: {printable(str(error))}")


def respond(conversation: Talk, text: str) -> bool:
    """Answer one line or run its command; return False for /exit."""
    found = _COMMAND.fullmatch(text.strip())
    if found is None:
        conversation.answer(text)
        return True
    name, value = found[1], found[2]
    match name:
        case "/exit":
            return False
        case "/reset":
            conversation.turns.clear()
            conversation.files.clear()
        case "/help":
            log("\n".join(f"  {name:<13} {summary}" for name, summary in SLASH_COMMANDS.items()))
        case "/image" | "/audio" | "/video":
            if not value:
                raise InputError(f"{name}: needs a file, as {name} FILE")
            conversation.add_file(_MEDIA[name], value)
        case "/send":
            if not conversation.files:
                raise InputError("/send: no file waits; add one with /image, /audio or /video")
            conversation.answer("")
        case "/save":
            _save(conversation, value)
        case "/system" | "/temperature":
            _set_option(conversation, name.removeprefix("/"), value)
        case _:
            advice = nearest(name, SLASH_COMMANDS) or "; /help lists the commands"
            log(f"unknown command {printable(name)}{advice}")
    return True


def _set_option(conversation: Talk, name: str, value: str | None) -> None:
    """Change an option of the conversation for the next answers, as on the command line, and show its value."""
    from finetune.config.command_options import ChatOptions
    from finetune.config.overrides import quoted, read_options

    if value is not None:
        text = quoted(value) if name == "system" else value
        read = read_options(ChatOptions, [f"{name}={text}"], f"/{name}")
        conversation.options = conversation.options.model_copy(update={name: getattr(read, name)})
    shown = getattr(conversation.options, name)
    log(f"{name}: {'the one of the template' if shown is None else printable(str(shown))}")


def _save(conversation: Talk, name: str | None) -> None:
    """Append the conversation to a file as one training row. Raises: InputError if there is nothing, or no file."""
    if not name or not conversation.turns:
        raise InputError("/save: " + ("the conversation is empty" if name else "needs a file, as /save rows.jsonl"))
    messages, file = conversation.messages(), Path(name).expanduser()
    with os_errors_as(InputError, f"/save: {file} cannot be written"), file.open("a", encoding="utf-8") as rows:
        rows.write(json.dumps(row_of(messages), ensure_ascii=False) + "\n")
    log(f"saved: {len(messages)} messages in {file}")


def _typed_lines(files: Sequence[MediaPart] = ()) -> Iterator[str]:
    """Yield the texts typed at a prompt until Ctrl+D, without empty ones; Ctrl+C drops a text.

    A line that ends in a backslash continues on the next one. files: the prompt shows that they come first.
    """
    import readline  # noqa: F401 - gives input() its editing and history

    while True:
        try:
            text = input("".join(f"<{file.kind}> " for file in files) + "> ")
            while text.endswith("\\"):
                text = f"{text[:-1]}\n{input('. ')}"
        except EOFError:
            log("")
            return
        except KeyboardInterrupt:
            log("\n(Ctrl+D or /exit leaves)")
            continue
        if text.strip():
            yield text


def _terminal_streamer(tokenizer: Any) -> Any:
    """Return a streamer that prints the answer, with control characters visible, and keeps it in `written`."""
    from transformers import TextStreamer

    class TerminalStreamer(TextStreamer):
        written = ""
        tokens = 0

        def put(self, value: Any) -> None:
            super().put(value)
            self.tokens += 1

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.written += text
            print(printable(text), end="", flush=True)

    return TerminalStreamer(tokenizer, skip_special_tokens=True)


COMMAND = Command("chat", __doc__, run, options="ChatOptions", config="optional")
