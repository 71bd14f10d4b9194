"""The report page in Debian's chromium: layout, themes, keyboard, accessibility, and that no request leaves."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fake_runs import METHODS, write_runs
from nola_vision.reports.cell import report_of
from nola_vision.reports.html.page import html_page
from nola_vision.runs import store

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]
HOSTILE = ["<img src=x onerror=alert(1)>", "$x$", "a" * 200, "\u202eevil", "日本語", "two words", "</style>", "8"]
PAGES = ["few", "many", "cells", "single", "folds", "league"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages: hostile names, 100 classes and 8 methods, two cells, single runs, cross-validated ones, and a league."""
    folder = tmp_path_factory.mktemp("browser")
    hostile = [METHODS[2], METHODS[-1]._replace(name="<b>nola</b>"), METHODS[-3]._replace(name="x" * 200)]
    write_runs(folder / "few", HOSTILE, hostile, splits=3)
    write_runs(folder / "many", [f"a class of number {i}" for i in range(100)], splits=3)
    for number in range(2):
        write_runs(folder / "cells", ["cat", "dog"], METHODS[-3:], cell=f"vit-folder.photos{number}-5shot-default")
    for name, folds in (("single", 0), ("folds", 5)):
        write_runs(folder / name, ["cat", "dog", "owl"], METHODS[2:], splits=1, inits=1, images=30, folds=folds)
    names = ("nola", "lora", "lora-xs", "vera", "fact", "pranc", "hashednet", "uni-lora", "tiny-lora", "lora-1bit")
    at = [METHODS[-1]._replace(name=f"{name}@{kb}KB", file_bytes=990 * kb) for name in names for kb in (2, 5, 10, 50)]
    write_runs(folder / "league", ["cat", "dog"], [METHODS[0], METHODS[3]._replace(file_bytes=1500), *at], splits=3)
    for name in PAGES:
        rows, problems = store.read_rows(folder / name)
        assert not problems
        (folder / f"{name}.html").write_text(html_page(report_of(rows)).text, encoding="utf-8")
    return folder


@pytest.fixture
def show(browser, folder: Path):
    """Opens a page in a window; at the end nothing was logged and nothing was requested but the page."""
    contexts, messages, requests = [], [], []

    def show(name: str, width: int = 1400, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("dialog", lambda dialog: messages.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((folder / f"{name}.html").as_uri())
        return page

    yield show
    for context in contexts:
        context.close()
    assert messages == []
    assert all(url.startswith("data:") or url.startswith(folder.as_uri()) for url in requests)
    assert len({url for url in requests if not url.startswith("data:")}) <= 1


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [375, 1400])
def test_nothing_is_wider_than_the_window(show, name: str, width: int) -> None:
    page = show(name, width)
    for fold in page.locator("details").all():
        fold.evaluate("fold => { fold.open = true }")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    small = page.evaluate(
        "[...document.querySelectorAll('figure svg text')].map(text => text.getBoundingClientRect().height)"
    )
    assert small and min(small) > 9


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(show, name: str, theme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = show(name, color_scheme=theme)
    for fold in page.locator("details").all():
        fold.evaluate("fold => { fold.open = true }")
    found = [
        (violation["id"], violation["impact"], [node["html"][:200] for node in violation["nodes"][:3]])
        for violation in Axe().run(page).response["violations"]
        if violation["impact"] in ("serious", "critical", "moderate")
    ]
    assert found == []


def test_dark_is_applied_and_print_is_light(show) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    fills = "[...document.querySelectorAll('figure svg *')].map(part => getComputedStyle(part).fill)"
    light, dark = show("few", color_scheme="light"), show("few", color_scheme="dark")
    assert _brightness(light.evaluate(colour)) > 240 and _brightness(dark.evaluate(colour)) < 40
    assert set(light.evaluate(fills)) != set(dark.evaluate(fills))
    dark.emulate_media(media="print", color_scheme="dark")
    assert _brightness(dark.evaluate(colour)) > 240


def _brightness(colour: str) -> float:
    parts = [float(part) for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]
    return sum(parts) / 3


def test_a_table_sorts(show) -> None:
    page = show("many")
    table = page.locator("table.classes").first
    head = table.get_by_role("columnheader", name="logistic %")

    def column() -> list[float]:
        return [float(text) for text in table.locator("tbody tr td:nth-child(5)").all_inner_texts()]

    before = column()
    head.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert column() == sorted(before) != before and head.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Enter")
    assert column() == sorted(before, reverse=True) and head.get_attribute("aria-sort") == "descending"
    table.get_by_role("columnheader", name="class").get_by_role("button").click()
    assert head.get_attribute("aria-sort") is None


def test_the_gallery_opens_by_keyboard(show) -> None:
    page = show("few")
    photos, dialog = page.locator(".photo"), page.get_by_role("dialog")
    photos.first.focus()
    name = photos.first.locator("img").get_attribute("alt")
    assert "image" in name and page.get_by_role("button", name=name).count() == 1
    page.keyboard.press("Enter")
    assert dialog.get_by_role("img").get_attribute("alt") == name
    assert (
        dialog.is_visible() and dialog.locator(".view .of").inner_text() == photos.nth(0).locator(".of").text_content()
    )
    page.keyboard.press("ArrowRight")
    assert dialog.locator(".view .of").inner_text() == photos.nth(1).locator(".of").text_content()
    for _ in range(2):
        page.keyboard.press("ArrowLeft")
    assert dialog.locator(".view .of").inner_text() == photos.last.locator(".of").text_content()
    page.keyboard.press("Escape")
    dialog.wait_for(state="hidden")
    last = "document.activeElement === [...document.querySelectorAll('.photo')].at(-1)"
    page.wait_for_function(last)  # the close event comes a moment later


def test_without_javascript_everything_is_there(show) -> None:
    page = show("few", java_script_enabled=False)
    assert page.locator("th button").count() == 0 and page.locator(".photo").count() > 10
    assert page.locator("figure svg").count() >= 2


def test_print_opens_the_folds(show) -> None:
    page = show("few", width=718)  # A4 with margins of 1 cm
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    wide = "[...document.querySelectorAll('table')].filter(table => table.offsetWidth > 718).length"
    assert page.evaluate(wide) == 0  # or all is printed smaller
