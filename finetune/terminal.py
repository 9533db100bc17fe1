"""Text of others on the user's terminal."""

from __future__ import annotations

_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
_VISIBLE |= {0x7F: 0x2421}
_VISIBLE |= {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}


def printable(text: str) -> str:
    """The text with every control character but tab and newline made visible (escape becomes ␛).

    Answers of a model and rows of a file can hold escape sequences that recolour, rename or retype a terminal.
    """
    return text.translate(_VISIBLE)
