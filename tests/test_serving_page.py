"""The page of the service in Debian's chromium: answers, search, keyboard, accessibility; no request leaves."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_bank import GOOD, expected, png
from nola_vision.serving.http.settings import Settings
from test_serving_app import Served, serve

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]
HOSTILE = "<img src=x onerror=alert(1)> \u202eevil 日本語 "
KEY = "0123456789abcdef"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("page") / "adapters"
    with serve(folder) as found:
        for name in [HOSTILE, "a-very-long-name-" * 9, *[f"digits-{number:05}" for number in range(2000)]]:
            (folder / f"{name}.safetensors").write_bytes(GOOD)
        yield found


@pytest.fixture(scope="module")
def with_key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("keyed") / "adapters", Settings(api_key=KEY)) as found:
        yield found


@pytest.fixture
def show(browser, request: pytest.FixtureRequest):
    """Opens the page; at the end nothing was logged, but for refusals that the test expects, and no request left."""
    contexts, messages, requests, urls = [], [], [], []

    def show(served: Served, width: int = 1280, **options: Any):
        urls.append(served.url)
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("dialog", lambda dialog: messages.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(served.url)
        return page

    yield show
    for context in contexts:
        context.close()
    assert [message for message in messages if "Failed to load resource" not in message] == []
    assert all(url.startswith((*urls, "blob:", "data:")) for url in requests)


def give(page: Any, level: int, name: str = "photo.png") -> None:
    page.locator("#file").set_input_files({"name": name, "mimeType": "image/png", "buffer": png(level, 64)})


def cards(page: Any) -> dict[str, list[tuple[str, str]]]:
    """The labels and percentages of each adapter's card, once all are there."""
    page.get_by_text("Answers of").wait_for()  # `wait_for_function` needs eval, which the page forbids
    return {
        card.locator("h3").inner_text(): [
            (row.locator("th").inner_text().strip(), row.locator("td").inner_text()) for row in card.locator("tr").all()
        ]
        for card in page.locator("#answers > li").all()
    }


def best(name: str, level: int) -> list[tuple[str, str]]:
    return [(one["label"], f"{100 * one['score']:.1f} %") for one in expected(name, level)]


def test_answers_side_by_side(show, served: Served) -> None:
    page = show(served)
    page.get_by_label("birds").check()
    page.get_by_label("cats", exact=True).check()
    assert page.locator("#hint").inner_text() == "Choose an image."
    give(page, 200)
    assert cards(page) == {"birds": best("birds", 200), "cats": best("cats", 200)}
    give(page, 90, "\u202egnp.png")
    page.get_by_text("\\u202egnp.png").wait_for()
    assert cards(page) == {"birds": best("birds", 90), "cats": best("cats", 90)}
    page.get_by_role("button", name="Remove birds").click()
    assert list(cards(page)) == ["cats"] and not page.get_by_label("birds").is_checked()
    page.get_by_label("bad").check()
    page.get_by_text("is damaged").wait_for()
    page.locator("#file").set_input_files({"name": "x.png", "mimeType": "image/png", "buffer": b"no image"})
    page.get_by_text("cannot decode the image").wait_for()


def test_an_image_is_dropped_or_pasted(show, served: Served) -> None:
    page = show(served)
    page.get_by_label("cats", exact=True).check()
    for event, field, level in (("drop", "dataTransfer", 10), ("paste", "clipboardData", 220)):
        page.evaluate(
            """([event, field, bytes]) => {
                const data = new DataTransfer();
                data.items.add(new File([new Uint8Array(bytes)], "a.png", { type: "image/png" }));
                document.body.dispatchEvent(event === "drop"
                    ? new DragEvent(event, { [field]: data, bubbles: true, cancelable: true })
                    : new ClipboardEvent(event, { [field]: data, bubbles: true, cancelable: true }));
            }""",
            [event, field, list(png(level))],
        )
        assert cards(page) == {"cats": best("cats", level)}


def test_search_among_many(show, served: Served) -> None:
    page = show(served)
    page.get_by_text("The first 50 of 2,009").wait_for()
    assert page.locator("#list li").count() == 50
    page.get_by_label("Search by name").fill("TS-0123")
    page.get_by_text("10 adapters").wait_for()
    assert page.locator("#list li").all_inner_texts() == [f"digits-{number:05}" for number in range(1230, 1240)]
    page.get_by_label("Search by name").fill("digits-01999")
    page.get_by_text("1 adapter", exact=True).wait_for()
    page.get_by_label("Search by name").fill("nothing like it")
    page.get_by_text("No adapter has this in its name.").wait_for()


def test_a_folder_without_adapters(show, tmp_path: Path) -> None:
    with serve(tmp_path / "adapters") as empty:
        for file in empty.folder.iterdir():
            file.unlink()
        empty.app.state.service.folder._next_scan = 0
        page = show(empty)
        page.get_by_text("The service has no adapters.").wait_for()


def test_by_keyboard(show, served: Served) -> None:
    page = show(served)
    page.get_by_label("Search by name").focus()
    page.keyboard.type("digits-00007")
    page.get_by_text("1 adapter", exact=True).wait_for()
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    give(page, 50)
    assert cards(page) == {"digits-00007": best("digits-00007", 50)}
    page.get_by_role("button", name="Remove").focus()
    page.keyboard.press("Enter")
    page.get_by_text("Choose one or more adapters.").wait_for()
    assert page.evaluate("document.activeElement.id") == "search"


def test_names_are_text(show, served: Served) -> None:
    page = show(served)
    page.get_by_label("Search by name").fill("onerror")
    page.get_by_text("1 adapter", exact=True).wait_for()
    page.locator("#list input").check()
    give(page, 50)
    assert [*cards(page)] == [HOSTILE.replace("\u202e", "\\u202e").strip()]
    assert page.locator("#answers img, #list img").count() == 0


def test_the_key_is_asked_for(show, with_key: Served) -> None:
    page = show(with_key)
    field = page.get_by_label("API key")
    field.wait_for()
    field.fill("wrong")
    page.keyboard.press("Enter")
    page.get_by_text("The service does not accept this key: enter another.").wait_for()
    field.fill(KEY)
    page.get_by_role("button", name="Use this key").click()
    page.get_by_label("birds").check()
    give(page, 10)
    assert cards(page) == {"birds": best("birds", 10)} and not field.is_visible()
    page.evaluate("key = 'another'")  # as if the service had been started again with a new key
    give(page, 200)
    page.get_by_text("The service does not accept this API key.").wait_for()
    field.fill(KEY)
    page.keyboard.press("Enter")
    page.get_by_role("row").first.wait_for()
    assert cards(page) == {"birds": best("birds", 200)}
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


def fill(page: Any) -> None:
    page.get_by_text("The first 50").wait_for()
    page.locator("#list input").first.check()  # the hostile name
    for name in ("birds", "cats", "bad"):
        page.get_by_label(name, exact=True).check()
    page.get_by_label("Search by name").fill("many")
    page.get_by_label("many classes", exact=True).check()
    give(page, 128)
    cards(page)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_layout_themes_and_accessibility(show, served: Served, width: int, theme: str, tmp_path: Path) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = show(served, width, color_scheme=theme)
    fill(page)
    page.screenshot(path=tmp_path / f"{theme}-{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, colour.partition("(")[2].rstrip(")").split(",")[:3])) / 3
    assert brightness > 240 if theme == "light" else brightness < 40
    found = [
        (violation["id"], [node["html"][:200] for node in violation["nodes"][:3]])
        for violation in Axe().run(page).response["violations"]
        if violation["impact"] in ("serious", "critical", "moderate")
    ]
    assert found == []
