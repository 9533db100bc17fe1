"""The base of every section of a config, and the types of values.

The sections themselves are in sections.py.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


def _number(value: Any) -> Any:
    """Convert `2e-4`, which is text for PyYAML and a number for OmegaConf."""
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


def _printable(text: str) -> str:
    """Refuse text that does not survive a round trip through UTF-8 YAML; `???` marks a missing value."""
    if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("text cannot contain a NUL character or half of a surrogate pair")
    if text == "???":
        raise ValueError("a value is missing")
    return text


Text = Annotated[str, StringConstraints(min_length=1), AfterValidator(_printable)]
Name = Annotated[str, StringConstraints(pattern=r"^[^/\\\x00-\x1f]*$"), AfterValidator(_printable)]
Number = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Fraction = Annotated[Number, Field(gt=0, le=1)]

SHORT_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_LONG_DTYPES = {short: long for long, short in SHORT_DTYPES.items()}

# Accepts the short names as well; the value is always the long name.
Dtype = Annotated[
    Literal["bfloat16", "float16", "float32"],
    BeforeValidator(lambda value: _LONG_DTYPES.get(value, value) if isinstance(value, str) else value),
]


class Section(BaseModel):
    """A group of keys: frozen, strict about types, without unknown keys, without NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
