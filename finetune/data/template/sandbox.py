"""Render chat templates, which are programs from strangers, in a sandbox with limits on time and size.

jinja2's ImmutableSandboxedEnvironment keeps a template away from Python. It limits no cost, so this module adds:
- Every value that a template makes is paid for from a budget.
- The size of every result that can be much larger than its operands is estimated first. So `'x' * 10**9` fails before
  it allocates anything. A deadline alone cannot stop such a call: it runs in C and holds the interpreter.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Template, nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.runtime import Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from finetune.data.template.markers import to_json
from finetune.system.errors import DataError

_RENDER_SECONDS = 2.0  # CPU time of the thread: a busy machine does not count
_RENDER_SIZE = 100_000_000  # characters, plus _ITEM per item of a list, over the whole render
_ITEM = 256
_WRITTEN_SIZE = 1_000_000  # characters of the result, which is tokenized: that takes longer than to render it
_SIZE_OF_INPUT = 16  # more per character of the conversation: templates build texts piece by piece
_LARGEST_NUMBER = 100_000  # in the arguments of a filter or a call
_WIDE_PERCENT = re.compile(r"%[^A-Za-z%]*(\*|\d{4})")
_WIDE_BRACES = re.compile(r"\{[^{}]*(\d{4}|\{)")
_DICT_ATTRIBUTES = frozenset(dir(dict))
_TOO_LARGE = f"it makes more than {_RENDER_SIZE:,} characters of one row"
# For web pages, or with a result size that is hard to bound.
_NOT_OFFERED = ("wordwrap", "urlize", "xmlattr", "pprint", "random", "filesizeformat")
_WRITABLE = (str, int, float, type(None), list, tuple, dict, Undefined)


class Renderer:
    """A compiled chat template. Picklable, and usable in any thread.

    variables: names that the template sees in addition to the conversation, such as `bos_token`.
    Raises: DataError if the source cannot be compiled.
    """

    def __init__(self, source: str, variables: Mapping[str, Any]):
        self.source, self.variables = source, dict(variables)
        self._of_thread = threading.local()
        self._compiled()

    def __reduce__(self) -> tuple:
        return Renderer, (self.source, self.variables)

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, add_generation_prompt: bool
    ) -> str:
        """Render a conversation.

        Raises: DataError if the template refuses it, fails, or exceeds a limit.
        """
        environment, template = self._compiled()
        budget = environment.budget
        of_input = _SIZE_OF_INPUT * sum(_length(message["content"]) for message in messages)
        budget.refill(of_input)
        may_write = _WRITTEN_SIZE + of_input
        row = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        # shared: a context that merges the globals itself costs more than the rendering of a short row.
        context = template.new_context(environment.globals | row, shared=True)
        parts: list[str] = []
        try:
            for part in template.root_render_func(context):
                budget.spend(len(part))
                may_write -= len(part)
                if may_write < 0:
                    raise SecurityError(f"it writes more than {_WRITTEN_SIZE:,} characters around the texts of one row")
                parts.append(part)
        except (SecurityError, OverflowError, RecursionError, MemoryError) as error:
            raise DataError(f"data.chat_template: the template exceeds the sandbox: {error}") from error
        except TemplateError as error:
            raise DataError(f"the chat template refuses the row: {error}") from error
        except Exception as error:
            raise DataError(f"the chat template fails on the row: {type(error).__name__}: {error}") from error
        return "".join(parts)

    def _compiled(self) -> tuple[_Environment, Template]:
        """This thread's environment, and its template."""
        if not hasattr(self._of_thread, "compiled"):
            environment = _Environment(self.variables)
            try:
                self._of_thread.compiled = environment, environment.from_string(self.source)
            except TemplateSyntaxError as error:
                raise DataError(f"data.chat_template: line {error.lineno} of the template: {error.message}") from error
            except (TemplateError, RecursionError, ValueError, TypeError) as error:
                raise DataError(f"data.chat_template: the template cannot be compiled: {error}") from error
        return self._of_thread.compiled


def _length(content: str | list[dict[str, str]]) -> int:
    """Return the characters of a content, a text or a list of parts."""
    return len(content) if isinstance(content, str) else sum(len(part.get("text", "")) for part in content)


class _Budget:
    """What one render may still use."""

    __slots__ = ("end", "left", "steps")

    def refill(self, more: int) -> None:
        self.left, self.steps = _RENDER_SIZE + more, 0
        self.end = time.thread_time() + _RENDER_SECONDS

    def spend(self, size: int) -> None:
        self.left -= size
        self.steps += 1
        if self.left < 0:
            raise SecurityError(_TOO_LARGE)
        if not self.steps & 63 and time.thread_time() > self.end:
            raise SecurityError(f"it runs for more than {_RENDER_SECONDS:g} s on one row")

    def check(self, size: int) -> None:
        """Refuse an operation whose result would exceed the budget."""
        if size > self.left:
            raise SecurityError(_TOO_LARGE)

    def pay(self, value: Any) -> Any:
        self.spend(len(value) if isinstance(value, str) else _size(value, self.left))
        return value


def _size(value: Any, most: int) -> int:
    """Characters and items in a value, counted as often as they would be written. Stops above `most`."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        value = [part for pair in value.items() for part in pair]
    elif not isinstance(value, list | tuple | set | frozenset):
        return 1
    size = _ITEM
    for part in value:
        if size > most:
            break
        size += _ITEM + _size(part, most - size)
    return size


def _paid(visit: Callable[..., None]) -> Callable[..., None]:
    def visit_and_pay(generator: CodeGenerator, node: nodes.Expr, frame: Any) -> None:
        if getattr(node, "ctx", "load") == "store":
            visit(generator, node, frame)
        else:
            generator.write("environment.budget.pay(")
            visit(generator, node, frame)
            generator.write(")")

    return visit_and_pay


class _Generator(CodeGenerator):
    """Compiles loops, concatenations and literals with a charge to the budget."""

    visit_List, visit_Dict, visit_Tuple = map(
        _paid, (CodeGenerator.visit_List, CodeGenerator.visit_Dict, CodeGenerator.visit_Tuple)
    )

    def visit_Template(self, node: nodes.Template, frame: Any = None) -> None:
        for loop in node.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "each", [], [], None, None).set_lineno(loop.lineno)
        super().visit_Template(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _GenerationTag(Extension):
    """Accepts `{% generation %}`, which marks targets for other trainers; this project does not need it."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Environment(ImmutableSandboxedEnvironment):
    """The environment that transformers gives to chat templates, with a budget."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, variables: Mapping[str, Any]) -> None:
        self.budget = _Budget()
        extensions = [_GenerationTag, LoopControlExtension]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=_writable, cache_size=0)
        self.budget.refill(0)
        self.filters = {n: self._limited(n, f) for n, f in self.filters.items() if n not in _NOT_OFFERED}
        self.filters |= {"tojson": self._limited("tojson", to_json), "each": self._each}
        self.globals.pop("lipsum")
        offered: dict[str, Any] = {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": lambda *pairs, **named: dict(*pairs, **named),
            "namespace": _Namespace,
            "documents": None,
        }
        self.globals = self.globals | offered | {**variables}

    def concat(self, parts: Iterable[Any]) -> str:
        parts = [str(part) for part in parts]
        self.budget.spend(sum(map(len, parts)))
        return "".join(parts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and type(left) is type(right) is str:
            self.budget.spend(len(left) + len(right))
            return left + right
        self.budget.check(_binop_size(operator, left, right))
        return self.budget.pay(self.binop_table[operator](left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        # jinja raises and catches an exception for each key of a dict, which is most of a template's time.
        if type(obj) is dict and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        costly = isinstance(obj, str) and attr in ("translate", "format_map")
        return not costly and super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            __self._check(f".{__obj.__name__}", owner, [*args, *kwargs.values()])
        else:
            _check_numbers([*args, *kwargs.values()])
        return __self.budget.pay(super().call(__context, __obj, *args, **kwargs))

    def _each(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.budget.spend(1)
            yield value

    def _limited(self, name: str, function: Callable) -> Callable:
        extra = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            self._check(name, args[extra], [*args[extra + 1 :], *kwargs.values()])
            return self.budget.pay(function(*args, **kwargs))

        return limited

    def _check(self, name: str, value: Any, arguments: Sequence[Any]) -> None:
        """Refuse a filter, or a method of a text (`.name`), whose result would be too large."""
        largest = _check_numbers(arguments)
        if largest > 1:
            self.budget.check(largest * _size(value, self.budget.left))
        if name in _RESULT_SIZE:
            self.budget.check(_RESULT_SIZE[name](value, arguments))


def _check_numbers(arguments: Sequence[Any]) -> int:
    largest = max((abs(n) for n in arguments if isinstance(n, int)), default=0)
    if largest > _LARGEST_NUMBER:
        raise SecurityError(f"it counts to more than {_LARGEST_NUMBER:,}")
    return largest


def _binop_size(operator: str, left: Any, right: Any) -> int:
    """An upper bound of the size of a product, power or formatted text."""
    if operator == "+" or isinstance(left, float) or isinstance(right, float):
        return 0
    if operator == "%":
        return _formatted_size(left, [right]) if isinstance(left, str) else 0
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > _LARGEST_NUMBER:
            raise SecurityError(f"it makes a number of more than {_LARGEST_NUMBER:,} bits")
        return bits
    if isinstance(left, int):
        left, right = right, left
    return _size(left, _RENDER_SIZE) * max(right, 0) if isinstance(right, int) else 0


def _formatted_size(pattern: str, arguments: Sequence[Any]) -> int:
    """An upper bound of the length of `pattern % arguments` and `pattern.format(*arguments)`."""
    if _WIDE_PERCENT.search(pattern) or _WIDE_BRACES.search(pattern):
        raise SecurityError("it pads a text too wide")
    fields = pattern.count("%") + pattern.count("{")
    return len(pattern) + fields * (_size(list(arguments), _RENDER_SIZE) + 1000)


def _replaced_size(text: Any, arguments: Sequence[Any]) -> int:
    old, new = (str(argument) for argument in arguments[:2])
    return len(str(text)) + str(text).count(old) * len(new)


def _joined_size(parts: Any, separator: Any) -> int:
    items = len(parts) if isinstance(parts, list | tuple | str) else 0
    return _size(parts, _RENDER_SIZE) + items * _size(separator, _RENDER_SIZE)


def _json_size(value: Any, arguments: Sequence[Any]) -> int:
    if _check_numbers(arguments) > 100 or len(str(list(arguments))) > 200:
        raise SecurityError("it indents JSON too far")
    return 0


def _summed_size(value: Any, arguments: Sequence[Any]) -> int:
    if any(isinstance(argument, list | tuple) for argument in arguments):
        raise SecurityError("it sums lists")
    return 0


# Upper bounds of results of filters and methods of texts that no number among their arguments bounds.
_RESULT_SIZE: dict[str, Callable[[Any, Sequence[Any]], int]] = {
    "replace": _replaced_size,
    ".replace": _replaced_size,
    "join": lambda parts, arguments: _joined_size(parts, arguments[0] if arguments else ""),
    ".join": lambda separator, arguments: _joined_size(arguments[0], separator),
    "format": _formatted_size,
    ".format": _formatted_size,
    "indent": lambda text, arguments: str(text).count("\n") * _size(list(arguments), _RENDER_SIZE),
    "tojson": _json_size,
    "sum": _summed_size,
}


def _writable(value: Any) -> Any:
    if isinstance(value, _WRITABLE):
        return value
    raise SecurityError(f"it writes a {type(value).__name__} as text")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    if _WIDE_PERCENT.search(pattern):
        raise SecurityError("it pads a date too wide")
    return datetime.now().strftime(pattern)


class _Namespace(Namespace):
    """jinja's namespace without names that start with an underscore: those reach into Python."""

    def __init__(self, /, *pairs: Any, **named: Any) -> None:  # a field may be called self
        for name in (fields := dict(*pairs, **named)):
            _check_field(name)
        super().__init__(fields)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_field(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"  # its fields may be namespaces that contain each other


def _check_field(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"its namespace has a field {name}")
