"""Services for tests of the HTTP API."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from finetune.config.schema import ModelConfig
from finetune.data.template.chat import ChatTemplate
from finetune.models.tokenizer import load_tokenizer
from tests.serving_http import TOOLS_TEMPLATE, Served, listening


@pytest.fixture(scope="session")
def templates(repo_root: Path) -> dict[bool, ChatTemplate]:
    """Return the embedded base's template, and one that has tools."""
    tokenizer = load_tokenizer(ModelConfig(name=str(repo_root / "data/tiny-qwen2.5")))
    return {False: ChatTemplate(tokenizer), True: ChatTemplate(tokenizer, TOOLS_TEMPLATE)}


@pytest.fixture
def serve(templates: dict[bool, ChatTemplate]) -> Iterator[Callable[..., Served]]:
    """Return a function that builds a service; tools=True: with a template that has them."""
    with ExitStack() as stack:

        def build(*, tools: bool = False, **options) -> Served:
            served = Served(templates[tools], **options)
            stack.callback(served.close)
            return served

        yield build


@pytest.fixture
def listen(serve: Callable[..., Served]) -> Iterator[Callable[..., tuple[str, Served]]]:
    """Return a function that builds a service behind a socket, and returns its URL and the service."""
    with ExitStack() as stack:

        def build(**options) -> tuple[str, Served]:
            served = serve(**options)
            return stack.enter_context(listening(served.app)), served

        yield build
