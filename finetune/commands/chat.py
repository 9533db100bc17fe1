"""`finetune chat`: talk to a base model, or to a base with a trained adapter, answer after answer as it is written."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.system.arguments import Arguments, nearest
from finetune.system.console import log, printable
from finetune.system.errors import ConfigError, DataError, InputError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from finetune.config.schema import RunConfig
    from finetune.data.formats.messages import Message
    from finetune.data.template.chat import ChatTemplate

HELP = """\
usage: finetune chat adapter=FOLDER [key=value …]     a trained adapter on its base
       finetune chat model=NAME [key=value …]         a base model: hub id or folder
       finetune chat config=X.yaml [adapter=FOLDER] [key=value …]

The folder of a run, or a checkpoint in it, brings the settings it was trained with; a bare adapter or model is loaded
as in lora.yaml (4-bit). Any key of a config can be given as well (quant.type=none). Beside a config, model= chooses one
of its model groups, as in `finetune train`.
  max_new_tokens=512   longest answer in tokens
  temperature=0        0 always takes the likeliest token; above, the answer is drawn
  system=TEXT          the system message; the template's own when not given

While talking: /reset forgets the conversation, /help lists the commands, /exit or Ctrl+D leaves, Ctrl+C stops an
answer.
With a pipe as input every line is one prompt: echo "Hello" | finetune chat adapter=outputs/quickstart"""

SLASH_COMMANDS = {
    "/reset": "forget the conversation",
    "/help": "list these commands",
    "/exit": "leave (so does Ctrl+D)",
}


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """temperature 0 is greedy; system None leaves the template's default."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    system: str | None = None


@dataclass
class Conversation:
    """A model, its tokenizer and template, and the turns so far."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    chat: ChatTemplate
    settings: ChatSettings
    turns: list[Message] = field(default_factory=list)

    def reset(self) -> None:
        self.turns.clear()

    def answer(self, text: str) -> None:
        """Write the model's answer to stdout while it is made, and remember both turns; Ctrl+C keeps what is written.

        Raises: DataError if the text cannot be encoded or the conversation has outgrown the model's context.
        """
        from finetune.data.formats.messages import Message

        asked = [*self.turns, Message("user", text)]
        system = [] if self.settings.system is None else [Message("system", self.settings.system)]
        ids = self.chat.prompt_ids([*system, *asked])
        room_tokens = self.model.config.max_position_embeddings - len(ids)
        if room_tokens < 1:
            raise DataError(f"the conversation has {len(ids)} tokens, more than the model can read; /reset starts anew")
        given = self._stream(ids, min(self.settings.max_new_tokens, room_tokens))
        if given:
            self.turns = [*asked, Message("assistant", given)]

    def _stream(self, ids: list[int], max_new_tokens: int) -> str:
        import torch

        from finetune.models.load import quiet

        streamer = _terminal_streamer(self.tokenizer)
        prompt = torch.tensor([ids], device=self.model.device)
        try:
            with torch.no_grad(), quiet():
                self.model.generate(  # type: ignore[operator]
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=self._generation_config(max_new_tokens),
                    streamer=streamer,
                )
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print(" [stopped]", file=sys.stderr)
        print(flush=True)
        return streamer.written

    def _generation_config(self, max_new_tokens: int) -> Any:
        from transformers import GenerationConfig

        # Drawn answers keep the penalties and cut-offs that the model's makers ship; greedy ones are the model's alone.
        drawn: dict[str, Any] = {"do_sample": True, "temperature": self.settings.temperature}
        greedy: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0}
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=self.chat.stop_ids(),
            pad_token_id=self.tokenizer.pad_token_id,
            **(drawn if self.settings.temperature > 0 else greedy),
        )


_OWN = ("adapter", "max_new_tokens", "temperature", "system")


def run_chat(arguments: Arguments) -> int:
    """`finetune chat`. Raises: InputError for settings that do not go together."""
    # Beside config=, model= chooses a model group.
    own, overrides = arguments.split(_OWN if arguments.config else (*_OWN, "model"))
    settings = _chat_settings(own)
    adapter = Path(own["adapter"]).expanduser() if "adapter" in own else None
    config = _find_config(arguments.config, own.get("model"), adapter, overrides)
    conversation = load_conversation(config, adapter, settings)
    if sys.stdin.isatty():
        log(f"{printable(config.model.name)}{f' with {adapter}' if adapter else ''}. /help lists the commands.")
        talk(conversation, _typed_lines())
    else:
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        for text in filter(None, (line.rstrip("\r\n") for line in sys.stdin)):
            if not respond(conversation, text):
                break
    return 0


def load_conversation(config: RunConfig, adapter: Path | None, settings: ChatSettings) -> Conversation:
    """The base of a config, with an adapter if one is named, ready to talk.

    Raises: what loading them raises: ConfigError, IntegrityError, ResourceError, MissingExtra.
    """
    from finetune.data.loader import load_chat_template
    from finetune.data.template.chat import ChatTemplate
    from finetune.evaluation.decoding import dequantize_once
    from finetune.models.adapters.attach import load_adapter
    from finetune.models.fused import fuse_layers
    from finetune.models.load import load_adapter_tokenizer, load_base, load_tokenizer

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
    return Conversation(model, tokenizer, chat, settings)


def talk(conversation: Conversation, lines: Iterable[str]) -> None:
    """Answer line by line until they end or ask to leave; a line that cannot be answered is explained."""
    for text in lines:
        try:
            if not respond(conversation, text):
                return
        except DataError as error:
            log(f"error: {printable(str(error))}")


def respond(conversation: Conversation, text: str) -> bool:
    """Act on one line. Returns: False if it asks to leave."""
    match text.strip():
        case "/exit":
            return False
        case "/reset":
            conversation.reset()
        case "/help":
            log("\n".join(f"  {name:<7} {summary}" for name, summary in SLASH_COMMANDS.items()))
        case word if word.startswith("/") and (close := nearest(word, SLASH_COMMANDS)):
            log(f"unknown command {printable(word)}{close}")
        case _:
            conversation.answer(text)
    return True


def _typed_lines() -> Iterator[str]:
    """Lines typed at a prompt until Ctrl+D, without the empty ones; Ctrl+C drops a line."""
    import readline  # noqa: F401 - gives input() its editing and history

    while True:
        try:
            text = input("> ")
        except EOFError:
            log("")
            return
        except KeyboardInterrupt:
            log("\n(Ctrl+D or /exit leaves)")
            continue
        if text.strip():
            yield text


def _chat_settings(own: dict[str, str]) -> ChatSettings:
    values: dict[str, Any] = {"system": own.get("system")}
    wrong = []
    for key, kind, lowest in (("max_new_tokens", int, 1), ("temperature", float, 0)):
        if key not in own:
            continue
        try:
            values[key] = kind(own[key])
        except ValueError:
            values[key] = -1
        if not lowest <= values[key] < float("inf"):
            wrong.append(
                f"{key} must be {'a whole number' if kind is int else 'a number'} from {lowest} on, got {own[key]!r}"
            )
    if wrong:
        raise InputError("; ".join(wrong))
    return ChatSettings(**values)


def _find_config(file: str | None, model: str | None, adapter: Path | None, overrides: list[str]) -> RunConfig:
    """The settings to load the base with: a config's, those an adapter was trained with, or lora.yaml's."""
    from finetune.config.compose import load_config, saved_config
    from finetune.system.resources import packaged

    if file is not None:
        return load_config(file, overrides)
    if model is None and adapter is None:
        raise InputError("finetune chat needs adapter=FOLDER, model=NAME or config=X.yaml")
    chosen = [] if model is None else [f"model.name={_quoted(model)}", "model.revision=null"]
    if adapter is not None:
        if (saved := saved_config(adapter, [*chosen, *overrides])) is not None:
            return saved
        chosen = chosen or _base_of(adapter)
    return load_config(str(packaged("configs") / "lora.yaml"), [*chosen, *overrides])


def _base_of(adapter: Path) -> list[str]:
    """Overrides that name the base an adapter's own file names."""
    from finetune.models.hub import read_json

    config = read_json(adapter / "adapter_config.json", f"adapter={adapter}")
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not base:
        raise ConfigError(f"adapter={adapter}: its adapter_config.json names no base model; give model=NAME")
    return [f"model.name={_quoted(str(base))}", f"model.revision={_quoted(str(revision)) if revision else 'null'}"]


def _quoted(text: str) -> str:
    """A text as Hydra's override grammar reads it back, whatever is in it."""
    # Only backslashes before a quote are escapes there.
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text) + "'"


def _terminal_streamer(tokenizer: Any) -> Any:
    """A streamer that writes to stdout what the model wrote, control characters made visible, and keeps it."""
    from transformers import TextStreamer

    class TerminalStreamer(TextStreamer):
        written = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.written += text
            print(printable(text), end="", flush=True)

    return TerminalStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
