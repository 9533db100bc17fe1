"""Build the service of the embedded engine: base, adapters, template, and the comparison with the trained models."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune import __version__
from finetune.config.command_options import ServeOptions
from finetune.config.schema import RunConfig
from finetune.data.loader import load_chat_template
from finetune.data.template.chat import ChatTemplate
from finetune.evaluation.probe import Comparison
from finetune.models.digest import weights_digest
from finetune.models.families import shape_of
from finetune.models.hub import TEXT_FILES, WEIGHT_FILES, fetch, weight_files
from finetune.models.tokenizer import load_adapter_tokenizer, load_tokenizer
from finetune.serving.adapters import name_base
from finetune.serving.engine.engine import build_engine
from finetune.serving.engine.grammar import GrammarCompiler
from finetune.serving.reference import check_served, recorded, references
from finetune.serving.scorers import engine_scorer
from finetune.serving.service import ServedModel, Service, adapter_digest
from finetune.system.console import log
from finetune.system.errors import ConfigError
from finetune.system.resources import cache_home


def load_service(config: RunConfig, options: ServeOptions, adapters: Mapping[str, Path]) -> Service:
    """Load the base and its adapters, and compare each with its trained model.

    Args:
        config: of the base.
        adapters: folders by name.

    Raises:
        ConfigError: the base or an adapter cannot be served, or adapters have different chat templates.
        IntegrityError: a model does not answer as it was trained to.
    """
    base = name_base(config.model, adapters)
    tokenizer, chat = load_template(config, adapters)
    source = fetch(config.model.name, config.model.revision, TEXT_FILES, "model.name")
    probes = references(config, options, adapters, base)
    named = options.model_copy(update={"adapters": {name: str(folder) for name, folder in adapters.items()}})
    shape = shape_of(str(source.folder)) or {}
    grammars = GrammarCompiler(tokenizer, shape.get("vocab_size", len(tokenizer)))
    engine = build_engine(config, named, grammars=grammars)
    try:
        scorers = {name: engine_scorer(engine, name if name in adapters else None) for name in probes}
        checks = check_served(probes, scorers, options.serve.max_kl)
    except BaseException:
        engine.close()
        raise
    if not probes:
        log("check: none (serve.check_rows=0)")
    now = int(time.time())
    models = [ServedModel(base, None, base_digest(config), now, _details(checks.get(base)))]
    for name, folder in adapters.items():
        models.append(ServedModel(name, name, adapter_digest(folder), now, _details(checks.get(name))))

    def check(name: str, folder: Path) -> dict[str, Any]:
        """Compare an adapter that is loaded later, if its run left a record."""
        if options.serve.check_rows == 0 or (probe := recorded(folder, options.serve.check_rows)) is None:
            return {}
        return _details(check_served({name: probe}, {name: engine_scorer(engine, name)}, options.serve.max_kl)[name])

    return Service(engine, chat, models, options.serve, grammars=grammars, check=check)


def load_template(config: RunConfig, adapters: Mapping[str, Path]) -> tuple[Any, ChatTemplate]:
    """Load the tokenizer and the template: of the adapters, which must agree, or of the base.

    Raises:
        ConfigError: names the adapters with another template, or with other tokens.
    """
    if not adapters:
        tokenizer = load_tokenizer(config.model)
        return tokenizer, load_chat_template(config.data, tokenizer)
    loaded = {name: load_adapter_tokenizer(config.model, folder) for name, folder in adapters.items()}
    templates = {name: ChatTemplate(tokenizer) for name, tokenizer in loaded.items()}
    first = next(iter(adapters))
    problems = [
        f"adapters.{name}: its {what} is not that of {first}"
        for name in adapters
        for what, found in {
            "chat template": {key: chat.template for key, chat in templates.items()},
            "vocabulary": {key: tokenizer.get_vocab() for key, tokenizer in loaded.items()},
        }.items()
        if found[name] != found[first]
    ]
    if problems:
        raise ConfigError("\n".join([*problems, "help: serve each template by a server of its own"]))
    return loaded[first], templates[first]


def base_digest(config: RunConfig) -> str:
    """Return a SHA-256 of what decides the answers of a base: all of its weights, how they are stored, and the version.

    A fingerprint of headers is too little: merged models of one base differ only in the middle of their files, and
    replicas of both may share a Redis.
    """
    model = config.model
    folder = fetch(model.name, model.revision, WEIGHT_FILES, "model.name").folder
    files = sorted(set(weight_files(folder, model.name).values()))
    weights = weights_digest(files, cache_home("quantized") / "digests")
    settings = model.model_dump(exclude={"name", "revision"})
    content = [__version__, weights, settings, config.quant.model_dump(exclude={"cache"})]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _details(check: Comparison | None) -> dict[str, Any]:
    return {} if check is None else {"check": check.details()}
