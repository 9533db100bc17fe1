"""The rule for prose of CONTRIBUTING.md: words that a reader has to read twice appear nowhere."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = re.compile(r"`[^`]*`")  # `f(s)` is no plural.
FORBIDDEN = re.compile(r"\b(told|whoever|besides)\b|[a-z]\(s\)", re.IGNORECASE)
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = [*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "configs").rglob("*.yaml"), *(ROOT / "launch").rglob("*.sh")]


def text_of(module: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of the docstrings, messages and comments of a file."""
    for token in tokenize.generate_tokens(io.StringIO(module.read_text(encoding="utf-8")).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT):
            for offset, line in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, line


def test_docstrings_comments_and_messages_keep_the_rule():
    found = [
        f"{module.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for module in sorted((ROOT / "finetune").rglob("*.py"))
        for number, line in text_of(module)
        if FORBIDDEN.search(CODE.sub("", line))
    ]
    assert not found


def test_documents_configs_and_notebooks_keep_the_rule():
    found = [
        f"{page.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for page in [*PAGES, *OTHERS, *(ROOT / "finetune").rglob("*.html")]
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
        if FORBIDDEN.search(line)
    ]
    assert not found
