"""The chat page in a real browser: two models side by side, and what is behind their replies."""

import json

import pytest

from tests.serve.conftest import Running
from whet.chat.encode import encode_chat, encode_prompt
from whet.generate.engine import generate
from whet.generate.opened import open_model


@pytest.fixture
def page(browser, server: Running):
    context = browser.new_context(viewport={"width": 390, "height": 844})
    page = context.new_page()
    page.asked, page.problems = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.goto(server.url)
    page.locator(".models label").nth(1).wait_for()
    yield page
    assert page.problems == []
    assert all(url.startswith((server.url, "data:")) for url in page.asked), page.asked
    context.close()


def ask(page, text: str, longest: str = "12") -> None:
    if not page.locator("#temperature").is_visible():
        page.click("summary")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", longest)
    page.fill("#prompt", text)
    page.keyboard.press("Enter")
    page.locator("#send").wait_for()


def test_two_models_side_by_side_and_what_is_behind_their_replies(page, server):
    ask(page, "three plus four")
    replies = page.locator(".reply")
    assert replies.count() == 2
    one = open_model(server.folder / "one")
    talk = [{"role": "user", "content": "three plus four"}]
    prompt = encode_prompt(talk, one.chat)
    options = {"max_new_tokens": 12, "stop_ids": one.chat.stop_ids}
    ids = generate(one.model, [prompt], **options)[0]
    shown = [i for i in ids if i not in one.chat.stop_ids]
    text = one.chat.tokenizer.decode(shown)
    assert replies.nth(0).locator(".text").text_content() == text

    first = replies.nth(0)
    first.get_by_role("button", name="Probabilities").click()
    assert first.get_by_role("option").count() == len(ids)
    first.get_by_role("listbox").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert first.locator("[aria-selected=true]").count() == 1
    assert first.locator(".alternatives tbody tr").count() == 8
    taken = first.locator(".alternatives tr", has_text="taken").locator("td").nth(0)
    assert taken.text_content() == str(ids[1])

    first.get_by_role("button", name="Prompt tokens").click()
    first.get_by_text(f"{len(prompt)} tokens, exactly").wait_for()
    assert first.get_by_role("option").count() == len(prompt)

    first.get_by_role("button", name="As trained").click()
    first.get_by_text("as proven by its certificate").wait_for()
    expected = encode_chat([*talk, {"role": "assistant", "content": text}], one.chat)
    assert first.get_by_role("option").count() == len(expected.ids)
    assert first.locator(".flow .t").count() == int((expected.loss_mask != 0).sum())


def test_a_conversation_goes_on_is_regenerated_and_begun_again(page):
    page.get_by_label("two", exact=True).uncheck()
    ask(page, "one")
    ask(page, "two")
    sent = []
    page.on("request", lambda r: r.post_data and sent.append(json.loads(r.post_data)))
    assert page.get_by_role("button", name="Regenerate").count() == 1
    before = page.locator(".reply").nth(1).locator(".text").text_content()
    page.get_by_role("button", name="Regenerate").click()
    page.locator("#send").wait_for()
    assert page.locator(".reply").nth(1).locator(".text").text_content() == before
    roles = [message["role"] for message in sent[0]["messages"]]
    assert roles == ["user", "assistant", "user"]
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".reply").count() == 0


def test_a_refused_request_is_told_and_nothing_spills_over_a_phone(page):
    ask(page, "one two three " * 99)
    assert "the context holds 200" in page.locator(".problem").nth(0).text_content()
    sizes = page.evaluate("() => [document.documentElement.scrollWidth, innerWidth]")
    assert sizes[0] <= sizes[1]


def test_stop_keeps_what_is_there(page):
    page.fill("#prompt", "one")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    page.locator("#send").wait_for()
    assert page.locator(".reply").count() == 2
