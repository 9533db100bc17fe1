"""A chat template sees what transformers shows it, reaches nothing else, and stops at its limits."""

from __future__ import annotations

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from finetune.data.template import sandbox as limits
from finetune.data.template.sandbox import Renderer
from finetune.system.errors import DataError

CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": " Grüße <b>&'\"\n"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
]
TOOLS = [{"type": "function", "function": {"name": "f", "b": [1, 2.5, None, True], "a": {"é": "\u2028</tool>"}}}]


def render(source: str, messages=MESSAGES, tools=TOOLS, prompt: bool = False, **variables) -> str:
    return Renderer(source, variables).render(messages, tools, prompt)


@pytest.mark.parametrize(
    "source",
    [
        "{{ tools | tojson }}{{ tools[0] | tojson(indent=2) }}{{ tools | tojson(ensure_ascii=true, sort_keys=true) }}",
        "{{ tools[0] | tojson(separators=(',', ':')) }}{{ messages | string | length }}",
        "{%- for m in messages %}\n    {%- if loop.first %}{% continue %}{% endif %}\n  {{ m.role }} {{ loop.index }}\n"
        "{% if loop.nextitem is defined %}{{ loop.nextitem.role }}{% endif %}{% if loop.last %}{% break %}{% endif %}"
        "{% endfor %}",
        "{% for m in messages if m.content %}{{ loop.length }}{{ m.content | trim | upper }}{% else %}none{% endfor %}",
        "{% for m in messages %}{% generation %}{% set x = m.content %}{{ x }}{% endgeneration %}{{ x }}{% endfor %}",
        "{% set ns = namespace(n=0, t='') %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}"
        "{% set ns.t = ns.t ~ m.role ~ ns.n %}{% endfor %}{{ ns.t }}",
        "{% macro turn(m, end='') %}<{{ m.role }}>{{ caller() if caller else m.content }}{{ end }}{% endmacro %}"
        "{{ turn(messages[1], end='!') }}{% call turn(messages[0]) %}called{% endcall %}",
        "{{ bos_token }}{{ missing }}{{ missing is defined }}{{ documents is none }}{{ none }}{{ 2 * 3 ** 2 % 4 / 5 }}",
        "{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('content') | list | length }}",
        "{% set a, b = (1, [2, {'k': 'v'}]) %}{{ a }}{{ b }}{{ {'x': (1,)} }}{{ messages[::-1][0].role }}{{ 'a' * 3}}",
        "{{ 'a-b'.split('-') }}{{ ' x '.strip() }}{{ 'x'.startswith('x') }}{{ '%s is %d' % ('a', 3) }}",
        "{{ '{} {}'.format(1, 'b') }}{{ range(3) | list }}{{ 'a,b' | replace(',', ';') }}{{ 'a%sb' | format('-') }}",
        "{{ dict(a=1).items() | list }}{{ tools[0].function.a.items() | list }}{{ tools[0] | items | list }}",
        "{{ strftime_now('%Y') }}{% if add_generation_prompt %}go{% endif %}{{ messages[1].content | e | indent }}",
        "{% for g in messages | groupby('role') %}{{ g.grouper }}{% endfor %}{% filter upper %}a{% endfilter %}",
        "{% for i in [[1, [2]]] recursive %}{{ loop(i) if i is iterable else i }}{{ loop.depth }}{% endfor %}",
        "{% set text %}a{{ 1 }}{% endset %}{{ text | default('b') }}{{ 1.5 * 2 }}{{ 3.1 | round }}",
    ],
)
def test_templates_write_what_they_write_under_transformers(source: str):
    for prompt in (False, True):
        [expected], _ = render_jinja_template(
            [MESSAGES], tools=TOOLS, chat_template=source, add_generation_prompt=prompt, bos_token="<s>"
        )
        assert render(source, prompt=prompt, bos_token="<s>") == expected


# Rows that hold the markers' own characters are refused before they are rendered.
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\ue0f0\ue0f1"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
)


@settings(max_examples=50)
@given(value=st.dictionaries(TEXT, JSON), ascii_only=st.booleans(), indent=st.sampled_from([None, 0, 3]))
def test_json_is_written_as_transformers_writes_it(value, ascii_only, indent):
    source = f"{{{{ tools[0] | tojson(ensure_ascii={str(ascii_only).lower()}, indent={str(indent).lower()}) }}}}"
    [expected], _ = render_jinja_template([MESSAGES], tools=[value], chat_template=source)
    assert render(source, tools=[value]) == expected


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(a=1) }}",
    "{{ ''['__class__'] }}",
    "{{ (''|attr('__class__')).x }}",
    "{{ raise_exception.__globals__['sys'] }}",
    "{{ namespace.__init__ }}",
    "{{ strftime_now.__globals__ }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{% set ns = namespace(__class__=1) %}",
    "{% set ns = namespace() %}{% set ns.__call__ = 1 %}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ joiner }}",
    "{{ self }}",
    "{{ dict.mro() }}",
    "{% include 'x' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_cannot_reach_python(source: str):
    def attempt() -> str:
        return render(source)

    try:
        written = attempt()
    except DataError:
        return
    assert written == "", "what is refused may also be undefined, which writes nothing"


BOMBS = [
    # one operation
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{{ [0] * 10**10 }}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ 2 ** (10 ** 7) }}",
    "{{ range(10**9) }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ 1.5 | round(10**9) }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ 'a'.zfill(10**9) }}",
    "{{ 'a' | indent(10**9, true) }}",
    "{{ ('\\t' * 10**5).expandtabs(10**5) }}",
    "{{ ('\\n' * 10**6) | indent(10**5) }}",
    "{{ ('\\n' * 10**6) | indent('a' * 10**6) }}",
    "{{ '%1000000000d' % 5 }}",
    "{{ '%*d' % (10**9, 5) }}",
    "{{ '{:1000000000}'.format(5) }}",
    "{{ '{:{}}'.format(5, 10**9) }}",
    "{{ '%1000000000d' | format(5) }}",
    "{{ ('%s' * 10**5) | format(*(['a' * 10**5] * 10**5)) }}",
    "{{ ('%(a)s' * 10**5) % {'a': 'a' * 10**6} }}",
    "{{ strftime_now('%1000000000d') }}",
    "{{ ('a' * 10**6) | replace('a', 'a' * 10**6) }}",
    "{{ ('a' * 10**6).replace('a', 'a' * 10**6) }}",
    "{{ (['a' * 10**6] * 10**6) | join }}",
    "{{ ''.join(['a' * 10**6] * 10**6) }}",
    "{{ ('a' * 10**6) | join('b' * 10**6) }}",
    "{{ ('a' * 10**6).join('b' * 10**6) }}",
    "{{ ([[0] * 10**4] * 10**5) | sum(start=[]) }}",
    "{{ tools | tojson(indent=10**6) }}",
    "{{ tools | tojson(indent='a' * 10**7) }}",
    "{{ tools | tojson(separators=('a' * 10**7, '')) }}",
    # many operations
    "{% for i in range(99999) %}{{ 'a' * 10**6 }}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% if i == j %}{% endif %}{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "{% for i in [[1]] recursive %}{{ loop([[1], [1]]) }}{% endfor %}",
    "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l = [ns.l, 'a' * 10**6 ~ i] %}{% endfor %}",
    "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ range(99999) | map('center', 99999) | join | length }}",
    "{% for i in range(99999) | map('string') | map('list') | list %}{{ range(99999) | list | length }}{% endfor %}",
]
DOUBLING = [
    ("'a'", "ns.x + ns.x"),
    ("'a'", "ns.x ~ ns.x"),
    ("'a'", "[ns.x, ns.x] | join"),
    ("'a'", "'%s%s' % (ns.x, ns.x)"),
    ("'a'", "'{0}{0}'.format(ns.x)"),
    ("[1]", "ns.x + ns.x"),
    ("[1]", "[ns.x, ns.x]"),
    ("[1]", "{'a': ns.x, 'b': ns.x}"),
    ("[1]", "(ns.x, ns.x)"),
    ("[1]", "dict(a=ns.x, b=ns.x)"),
    ("[1]", "[ns.x] + [ns.x]"),
    ("'a'", "twice()"),
]


@pytest.fixture
def in_half_a_second(monkeypatch):
    monkeypatch.setattr(limits, "_RENDER_SECONDS", 0.5)


@pytest.mark.parametrize("source", BOMBS)
def test_a_template_that_exceeds_its_limits_is_stopped(in_half_a_second, source: str):
    with pytest.raises(DataError, match=r"data\.chat_template"):
        render(source)


@pytest.mark.parametrize("assign", ["{% set ns.x = GROWN %}", "{% set x %}{{ GROWN }}{% endset %}{% set ns.x = x %}"])
@pytest.mark.parametrize(("start", "grown"), DOUBLING)
def test_a_value_that_doubles_is_stopped_before_it_is_used(in_half_a_second, start: str, grown: str, assign: str):
    source = (
        f"{{% set ns = namespace(x={start}) %}}{{% macro twice() %}}{{{{ ns.x }}}}{{{{ ns.x }}}}{{% endmacro %}}"
        f"{{% for i in range(60) %}}{assign.replace('GROWN', grown)}{{% endfor %}}"
    )
    with pytest.raises(DataError, match=r"data\.chat_template"):
        render(source)


def test_a_template_writes_little_more_than_the_texts_of_a_row():
    """What it writes is tokenized, which takes longer than to write it."""
    with pytest.raises(DataError, match="writes more than 1,000,000 characters"):
        render("{% for i in range(1001) %}{{ 'a' * 1000 }}{% endfor %}")
    long = [{"role": "user", "content": "a" * 2_000_000}]
    assert len(render("{{ messages[0].content }}", messages=long)) == 2_000_000


def test_namespaces_that_contain_each_other_have_a_short_text():
    source = (
        "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = namespace(a=[ns.x, ns.x]) %}{% endfor %}"
    )
    assert len(render(source + "{{ [ns.x] }}{{ ns.x ~ '' }}{{ '%s' % ns.x }}")) < 100


def test_limits_hold_in_any_thread_and_the_next_render_starts_anew(in_half_a_second):
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    renderer = Renderer("{% if messages | length == 3 %}" + endless + "{% endif %}ok", {})

    def attempt(_: int) -> str:
        with pytest.raises(DataError, match=r"runs for more than .* s on one row"):
            renderer.render(MESSAGES, None, False)
        return renderer.render(MESSAGES[:1], None, False)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(attempt, range(2))) == ["ok", "ok"]


def test_a_long_row_is_within_the_limits():
    long = [{"role": "user", "content": "ab" * 10**7}] * 3
    written = render(
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</' + m.role + '>\n' }}{% endfor %}", long
    )
    assert len(written) == 3 * (2 * 10**7 + len("<user></user>\n"))


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{% for m in messages %}\n\n{{ m. }}", "line 3"),
        ("{{ x | nosuchfilter }}", "nosuchfilter"),
        ("{{ " + "(" * 2000 + ")" * 2000 + " }}", "data.chat_template"),
        ("{% foo %}", "foo"),
    ],
)
def test_an_invalid_template_is_refused_at_once(source: str, complaint: str):
    with pytest.raises(DataError, match=r"data\.chat_template") as caught:
        Renderer(source, {})
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[0].nothing.more }}",
        "{{ 1 / 0 }}",
        "{{ 1 + 'a' }}",
        "{{ messages | tojson(1, 2, 3, 4, 5, 6) }}",
    ],
)
def test_a_template_that_fails_on_a_row_makes_it_a_bad_row(source: str):
    with pytest.raises(DataError, match="chat template"):
        render(source)


def test_a_pickled_renderer_writes_alike():
    renderer = Renderer("{{ bos_token }}{{ messages[0].content }}", {"bos_token": "<s>"})
    again = pickle.loads(pickle.dumps(renderer))  # noqa: S301
    assert again.render(MESSAGES, None, False) == renderer.render(MESSAGES, None, False) == "<s>be brief"


def test_workers_need_neither_torch_nor_transformers():
    heavy = "{'torch', 'transformers', 'datasets', 'pandas'}"
    code = f"import sys; import finetune.data.template.chat; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
