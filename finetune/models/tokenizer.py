"""Load a tokenizer, without the modules of transformers that build models: their import takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AddedToken, AutoTokenizer
from transformers.utils import logging as transformers_logging

from finetune.config.schema import ModelConfig
from finetune.models.families import shape_of
from finetune.models.hub import TEXT_FILES, TOKENIZER_FILES, fetch, read_json
from finetune.system.errors import ConfigError
from finetune.system.manifest import check_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The library notes each id that a vocabulary leaves out: one large id fills the memory and ends the process.
_LARGEST_ID = 2**22


def load_tokenizer(cfg: ModelConfig) -> PreTrainedTokenizerBase:
    """Load `model.tokenizer`, or the tokenizer of `model.name`, with its chat template.

    Raises:
        ConfigError: it cannot be downloaded, its files are missing or invalid, it names code to run, or its ids do not
            fit the model.
    """
    own = fetch(cfg.name, cfg.revision, TEXT_FILES, "model.name").folder
    if cfg.tokenizer is None:
        return _read_tokenizer(own, cfg.name, "model.name")
    folder = fetch(cfg.tokenizer, None, TEXT_FILES, "model.tokenizer").folder
    given = _read_tokenizer(folder, cfg.tokenizer, "model.tokenizer")
    _check_rows(cfg, given, own)
    return given


def load_adapter_tokenizer(cfg: ModelConfig, adapter: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer saved with an adapter, with its template and new tokens; else that of the base."""
    if not (adapter / TOKENIZER_FILES[0]).is_file():
        return load_tokenizer(cfg)
    check_files(adapter, [*TOKENIZER_FILES, "chat_template.jinja"])
    return load_tokenizer(cfg.model_copy(update={"name": str(adapter), "revision": None, "tokenizer": None}))


def _read_tokenizer(folder: Path, name: str, key: str) -> PreTrainedTokenizerBase:
    for file in TOKENIZER_FILES:
        tree = read_json(folder / file, f"{key}={name}")
        if "auto_map" in tree:
            raise ConfigError(f"{key}={name}: {file} names code to run (auto_map), which is never executed")
        if (largest := _largest_id(tree)) > _LARGEST_ID:
            raise ConfigError(f"{key}={name}: {folder / file} has the token id {largest:,}, above {_LARGEST_ID:,}")
    try:
        with quiet():
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except MemoryError:
        raise
    except Exception as error:  # the library raises plain exceptions of its own, and those of what it meets
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"{key}={name}: the tokenizer in {folder} cannot be loaded: {reason}") from error
    tokenizer.name_or_path = name
    return tokenizer


def _largest_id(tree: dict[str, Any]) -> int:
    """Return the largest id of a token in the content of tokenizer.json; 0 if there is none."""
    model = tree.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = vocabulary.values() if isinstance(vocabulary, dict) else ()
    return max((i for i in ids if isinstance(i, int)), default=0)


def _check_rows(cfg: ModelConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Check that the embedding has a row for each id, and that ids agree with those of the model's own tokenizer."""
    shape, last = shape_of(str(folder)), max(tokenizer.get_vocab().values())
    if shape is not None and last >= shape["vocab_size"]:
        raise ConfigError(
            f"model.tokenizer={cfg.tokenizer}: the last id of the embedding of model.name={cfg.name} is "
            f"{shape['vocab_size'] - 1:,}, found {last:,}\nhelp: name a tokenizer of the same vocabulary"
        )
    if all((folder / file).is_file() for file in TOKENIZER_FILES):
        # Without added tokens: transformers may add some itself.
        both: Any = (_read_tokenizer(folder, cfg.name, "model.name"), tokenizer)
        own, given = (each.backend_tokenizer.get_vocab(with_added_tokens=False) for each in both)
        if moved := [token for token, i in given.items() if own.get(token, i) != i]:
            raise ConfigError(
                f"model.tokenizer={cfg.tokenizer}: does not fit model.name={cfg.name}, found {len(moved):,} tokens "
                f"with another id, like {moved[0]!r}\nhelp: name a tokenizer of the same vocabulary"
            )


def extend_tokenizer(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> None:
    """Add tokens to a tokenizer only, like `attach_lora` does, so that text can be encoded before the model is loaded.

    Raises:
        ConfigError: a token is already in the vocabulary or listed twice.
    """
    check_new(tokenizer, tokens)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])


def check_new(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> None:
    vocabulary = tokenizer.get_vocab()
    known = [token for token in tokens if token in vocabulary]
    doubled = sorted({token for token in tokens if tokens.count(token) > 1})
    if known or doubled:
        raise ConfigError(
            f"lora.new_tokens: already in the vocabulary or listed twice, found {known + doubled}\nhelp: remove them"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars and warnings of transformers; relevant ones are errors here."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
