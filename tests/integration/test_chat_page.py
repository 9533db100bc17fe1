"""The page of a server at `/`, used in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import ModelConfig
from finetune.data.template.chat import ChatTemplate
from finetune.models.tokenizer import load_tokenizer
from tests.browser import CONTRAST, Page
from tests.serving_http import Served, listening, wait_for

PAGE = Path(__file__).resolve().parents[2] / "finetune/serving/http/page"
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> & 你好\n  two"


@pytest.fixture(scope="module")
def template(repo_root: Path) -> ChatTemplate:
    return ChatTemplate(load_tokenizer(ModelConfig(name=str(repo_root / "data/tiny-qwen2.5"))))


@pytest.fixture
def opened(browser: Page, template: ChatTemplate) -> Iterator[Callable[..., Served]]:
    """Return a function that opens the page of a server; its arguments are those of `Served`."""
    with ExitStack() as stack:

        def open_page(*reply: Any, **options: Any) -> Served:
            served = Served(template, *reply, **options)
            stack.callback(served.close)
            browser.look()
            browser.open(stack.enter_context(listening(served.app)))
            browser.wait_for("document.querySelector('#status').textContent")
            return served

        yield open_page
        browser.open("about:blank")


def say(browser: Page, text: str) -> None:
    browser.evaluate("document.querySelector('#text').focus()")
    browser.type(text)
    browser.press("Enter")


def ended(browser: Page) -> None:
    browser.wait_for("!document.querySelector('#send').hidden")


def texts(browser: Page, selector: str) -> list[str]:
    return browser.evaluate(f"[...document.querySelectorAll('{selector}')].map(node => node.textContent)")


def set_field(browser: Page, name: str, value: str) -> None:
    field = f"document.querySelector('[name={name}]')"
    browser.evaluate(f"{field}.value = {json.dumps(value)}")
    browser.evaluate(f"{field}.dispatchEvent(new Event('change'))")


def faults(browser: Page) -> list[Any]:
    """Exceptions, messages on the console, and requests to another place than the server."""
    kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    urls = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    away = [url for url in urls if not url.startswith(("http://127.0.0.1:", "data:,"))]
    return [event for event in browser.events if event.get("method") in kinds] + away


def test_a_conversation_is_streamed_and_the_next_turn_has_it(browser: Page, opened):
    served = opened("fine")
    say(browser, "hi")
    ended(browser)
    say(browser, "bye")
    ended(browser)
    assert texts(browser, ".turn .text") == ["hi", "fine", "bye", "fine"]
    sent = served.chat.backend.decode(list(served.engine.requests[-1].ids), skip_special_tokens=False)
    assert [sent.index(text) for text in ("hi", "fine", "bye")] == sorted(map(sent.index, ("hi", "fine", "bye")))
    assert re.fullmatch(r"\d+ tokens · first after [\d.]+ s( · [\d.]+ tokens/s)?", texts(browser, ".stats")[0])
    assert faults(browser) == []


def test_texts_of_models_and_errors_are_never_html(browser: Page, opened):
    opened("fine")
    chunk = {"choices": [{"delta": {"content": HOSTILE}}]}
    replies = [f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n", json.dumps({"error": {"message": HOSTILE}})]
    for status, reply in zip((200, 500), replies, strict=True):
        # In one piece: single characters never were HTML.
        browser.evaluate(f"window.fetch = async () => new Response({json.dumps(reply)}, {{status: {status}}})")
        say(browser, HOSTILE.replace("\n", " "))
        ended(browser)
    assert texts(browser, ".turn.assistant .text") == [HOSTILE] and HOSTILE in texts(browser, ".error")[0]
    assert browser.evaluate("document.querySelectorAll('.log img, .log script').length") == 0
    assert browser.evaluate("document.title") == "finetune serve" and faults(browser) == []


def test_two_models_answer_side_by_side_and_each_keeps_its_conversation(browser: Page, opened):
    served = opened(lambda request: served.ids("arr" if request.adapter else "yes"))
    browser.evaluate("document.querySelector('#compare').click()")
    browser.wait_for("document.querySelectorAll('.column option').length === 4")
    assert browser.evaluate("[...document.querySelectorAll('select')].map(each => each.value)") == ["pirate", "base"]
    say(browser, "hi")
    ended(browser)
    assert texts(browser, ".turn.assistant .text") == ["arr", "yes"]
    assert sorted(str(request.adapter) for request in served.engine.requests) == ["None", "pirate"]
    browser.evaluate("document.querySelector('[data-do=clear]').click()")
    assert texts(browser, ".turn.assistant .text") == ["yes"]


def test_settings_reach_the_request(browser: Page, opened):
    served = opened("fine")
    for name, value in {
        "temperature": "0.5",
        "top_p": "0.9",
        "max_tokens": "7",
        "seed": "3",
        "system": "Be odd.",
    }.items():
        set_field(browser, name, value)
    say(browser, "hi")
    ended(browser)
    [request] = served.engine.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, request.max_tokens, sampling.seed) == (0.5, 0.9, 7, 3)
    assert "Be odd." in served.chat.backend.decode(list(request.ids))
    set_field(browser, "temperature", "9")
    say(browser, "again")
    ended(browser)
    assert "temperature" in texts(browser, ".error")[0] and len(served.engine.requests) == 1


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_an_answer_can_be_stopped_and_its_start_stays(browser: Page, opened, how: str):
    served = opened(lambda request: [70] * 4000, seconds=0.01)
    set_field(browser, "max_tokens", "4000")
    say(browser, "hi")
    browser.wait_for("document.querySelector('.turn.assistant .text')?.textContent.length > 3")
    if how == "button":
        browser.evaluate("document.querySelector('#stop').click()")
    else:
        browser.press("Escape")
    ended(browser)
    wait_for(lambda: served.engine.cancelled == [1])
    assert "stopped" in texts(browser, ".stats")[0] and len(texts(browser, ".turn.assistant .text")[0]) > 3
    served.engine._reply = lambda request: []
    say(browser, "more")
    ended(browser)
    assert len(served.engine.requests[-1].ids) > len(served.engine.requests[0].ids) + 3


def test_shift_and_enter_begin_a_new_line(browser: Page, opened):
    opened("fine")
    browser.evaluate("document.querySelector('#text').focus()")
    browser.type("one")
    browser.press("Enter", shift=True)
    browser.type("two")
    browser.press("Enter")
    ended(browser)
    assert texts(browser, ".turn.user .text") == ["one\ntwo"]


def test_the_key_is_asked_for_and_stays_in_memory(browser: Page, opened):
    served = opened("fine", api_key="secret")
    browser.wait_for("document.querySelector('#status').textContent.includes('key')")
    assert browser.evaluate("document.querySelector('#settings').open")
    set_field(browser, "key", "secret")
    browser.wait_for("document.querySelectorAll('option').length === 2")
    say(browser, "hi")
    ended(browser)
    assert texts(browser, ".turn.assistant .text") == ["fine"] and len(served.engine.requests) == 1
    assert browser.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0


def test_errors_are_sentences_and_the_message_can_be_sent_again(browser: Page, opened):
    served = opened("fine")
    served.service.ready = False
    say(browser, "hi")
    ended(browser)
    [shown] = texts(browser, ".error")
    assert "not ready" in shown and "503" in shown
    assert browser.evaluate("document.querySelector('#text').value") == "hi" and texts(browser, ".turn") == []
    served.service.ready = True
    browser.press("Enter")
    ended(browser)
    assert texts(browser, ".turn .text") == ["hi", "fine"] and texts(browser, ".error") == []


def test_a_server_that_fails_within_an_answer_is_seen(browser: Page, opened):
    served = opened(lambda request: [70] * 4000, seconds=0.01)
    set_field(browser, "max_tokens", "4000")
    say(browser, "hi")
    browser.wait_for("document.querySelector('.turn.assistant .text')?.textContent.length > 3")
    served.engine.close()
    ended(browser)
    assert len(texts(browser, ".error")) == 1 and len(texts(browser, ".turn.assistant .text")[0]) > 3


def test_copying_takes_the_conversation_or_selects_it(browser: Page, opened):
    opened("fine")
    say(browser, "hi")
    ended(browser)
    browser.evaluate("document.querySelector('[data-do=copy]').click()")
    browser.wait_for("document.querySelector('.stats').textContent.startsWith('The conversation')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1000])
def test_text_is_legible_and_nothing_is_wider_than_the_window(browser: Page, opened, scheme: str, width: int):
    served = opened(HOSTILE + "x" * 300)
    browser.look(width, scheme, 800)
    browser.evaluate("document.querySelector('#compare').click(); document.querySelector('#settings').open = true")
    browser.wait_for("document.querySelectorAll('.column option').length === 4")
    say(browser, "hi")
    ended(browser)
    served.service.ready = False
    say(browser, "hi")
    ended(browser)
    others = CONTRAST.replace("'h1,h2", "'label,input,button,select,textarea,.who,.text,.error,.stats,h1,h2")
    assert browser.evaluate(CONTRAST) == [] and browser.evaluate(others) == []
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser.evaluate("document.querySelector('#text').getBoundingClientRect().width > 150")


def test_its_colors_are_those_of_the_reports(repo_root: Path):
    look = (repo_root / "finetune/report/templates/look.css").read_text()
    own = re.findall(r"(--[a-z-]+): (#[0-9a-f]+);", (PAGE / "page.css").read_text())
    assert own and set(own) <= set(re.findall(r"(--[a-z-]+): (#[0-9a-f]+);", look))
