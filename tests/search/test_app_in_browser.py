"""The page of `icone app` in a real browser, Debian's Chromium. `make app-test` runs this; screenshots: build/app."""

import re
import shutil
from pathlib import Path

import pytest
from search.app_visitor import running
from tiny import make_groups

from icone_hf import IConEModel, IConEProcessor
from icone_hf.search import Gallery, index

pytestmark = pytest.mark.browser
playwright = pytest.importorskip("playwright.sync_api")

SHOTS = Path(__file__).parents[2] / "build" / "app"
ARGUMENTS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
ARGUMENTS += "--disable-component-update --disable-sync"
QUERY = "a red square on a blue ground"
FOUND, DIALOG, SENTENCE = "#results .found button", "dialog.details", "#sentence input"


@pytest.fixture(scope="module")
def gallery(towers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    model, processor = IConEModel.from_encoders(*towers, projection_dim=16), IConEProcessor.from_encoders(*towers)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    index(model, processor, make_groups(30), folder / "index", source_name="groups")
    return Gallery.open(folder / "index", folder / "model")


@pytest.fixture(scope="module")
def server(gallery, tmp_path_factory):
    folder = gallery.folder.path
    with running(folder, folder.parent / "model", tmp_path_factory.mktemp("server") / "tmp") as server:
        yield server


@pytest.fixture(scope="module")
def chromium():
    SHOTS.mkdir(parents=True, exist_ok=True)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS.split())
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, server):
    """Open the page; it may load nothing from elsewhere and say no error to the console."""
    contexts, troubles = [], []

    def opened(width=1280, height=900, scheme="light"):
        contexts.append(chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda said: said.type in ("error", "warning") and troubles.append(said.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda one: one.url.startswith((server.url, "data:", "blob:")) or troubles.append(one.url))
        page.on(
            "response", lambda one: one.status in (200, 206, 304, 422) or troubles.append(f"{one.status} {one.url}")
        )
        page.goto(server.url)
        page.wait_for_selector(SENTENCE)
        page.wait_for_function("document.activeElement?.closest('#sentence')")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not [one for one in troubles if "422" not in one]


def search(page, sentence=QUERY):
    page.fill(SENTENCE, sentence)
    page.press(SENTENCE, "Enter")
    page.wait_for_selector(FOUND)


def ids(page):
    return page.eval_on_selector_all(FOUND, "all => all.map(one => one.dataset.id)")


def settle(page, name):
    page.wait_for_function("[...document.images].every(one => one.complete)")
    page.wait_for_timeout(400)
    page.screenshot(path=SHOTS / f"{name}.png")


def focused(page):
    return page.evaluate("document.activeElement.outerHTML.slice(0, 200)")


def press_until(page, pattern, key="Tab", most=40):
    for _ in range(most):
        page.keyboard.press(key)
        if re.search(pattern, focused(page)):
            return
    raise AssertionError(f"{key} doesn't lead to {pattern}")


def test_the_keyboard_alone_is_enough(open_page, gallery):
    page = open_page()
    page.keyboard.type(QUERY)
    page.keyboard.press("Enter")
    page.wait_for_selector(FOUND)
    expected = gallery.search(QUERY, 20)["id"][:]
    assert ids(page) == expected
    press_until(page, 'type="file"')
    press_until(page, f'data-id="{expected[0]}"')
    press_until(page, f'data-id="{expected[2]}"')
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert outline == "3px"
    settle(page, "focus")
    page.keyboard.press("Enter")
    page.wait_for_selector(f"{DIALOG} figure img")
    assert "close" in focused(page)
    for _ in range(30):  # what is behind the dialog can't be reached
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement === document.body || !!document.activeElement.closest('dialog')")
    page.keyboard.press("Escape")
    assert not page.is_visible(DIALOG)
    assert f'data-id="{expected[2]}"' in focused(page)
    page.keyboard.press("Enter")
    page.wait_for_selector(f"{DIALOG} figure img")
    press_until(page, 'data-mark="less"')
    page.keyboard.press("Enter")
    page.wait_for_selector(".chips li.less")
    assert not page.is_visible(DIALOG)
    page.focus(SENTENCE)
    press_until(page, "data-one=")
    page.keyboard.press("Enter")
    page.wait_for_selector(".chips", state="detached")
    assert page.evaluate("!!document.activeElement.closest('#sentence')")
    page.wait_for_function(f"document.querySelectorAll('{FOUND}')[2]?.dataset.id === '{expected[2]}'")


@pytest.mark.parametrize(
    ("name", "width", "height", "scheme"),
    [("desktop", 1280, 900, "light"), ("phone", 360, 740, "light"), ("dark", 1280, 900, "dark")],
)
def test_every_state_fits_the_screen(open_page, name, width, height, scheme):
    page = open_page(width, height, scheme)

    def shoot(state):
        settle(page, f"{name}_{state}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, state
        inner = page.evaluate("Math.max(0, ...[...document.querySelectorAll('dialog[open]')].map(d => d.scrollWidth))")
        assert inner <= width, state

    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark)[:3])) < 200) == (scheme == "dark")
    shoot("0_start")
    search(page)
    shoot("1_found")
    page.click(f"{FOUND} >> nth=0")
    page.wait_for_selector(f"{DIALOG} figure img")
    choices = page.locator(f"{DIALOG} .layers input:not([disabled])")
    assert choices.count() > 1
    choices.nth(1).check()
    assert page.locator(f"{DIALOG} .layer:visible").count() == 1
    layer, image = (page.locator(f"{DIALOG} {one}").first.bounding_box() for one in (".layer:visible", "figure img"))
    assert all(abs(layer[side] - image[side]) < 1 for side in layer)
    shoot("2_one")
    choices.nth(0).check()
    assert page.locator(f"{DIALOG} .layer:visible").count() == 0
    page.click(f"{DIALOG} [data-mark=more]")
    page.wait_for_selector(".chips li")
    shoot("3_more")
    page.click("#options button")
    page.fill("#where input, #where textarea", "yeer > 2020")
    page.keyboard.press("Enter")
    page.wait_for_selector(".trouble")
    shoot("4_trouble")
    page.fill("#where input, #where textarea", "width > 3000")
    page.keyboard.press("Enter")
    page.wait_for_selector("#results >> text=no image meets the condition")
    shoot("5_nothing")


def test_images_are_chosen_pasted_and_refused(open_page, tmp_path):
    page = open_page()
    make_groups(1)[0]["image"].save(tmp_path / "own.png")
    page.set_input_files("#picker input", tmp_path / "own.png")
    page.wait_for_selector(".chips li.own")
    page.wait_for_selector(FOUND)
    (tmp_path / "bad.png").write_bytes(b"hello")
    page.set_input_files("#picker input", tmp_path / "bad.png")
    page.wait_for_selector("#picker >> text=no image that can be read")
    (tmp_path / "large.png").write_bytes(bytes(20_000_001))
    page.set_input_files("#picker input", tmp_path / "large.png")
    page.wait_for_selector("#picker >> text=the limit is 20")
    settle(page, "refused")


def test_the_last_of_several_queries_counts(open_page, gallery):
    page = open_page()
    for sentence in ("red", "green", "blue", QUERY):
        page.fill(SENTENCE, sentence)
        page.press(SENTENCE, "Enter")
    first = gallery.search(QUERY, 20)["id"][:]
    shown = f"[...document.querySelectorAll('{FOUND}')].map(one => one.dataset.id).join()"
    page.wait_for_function(f"first => {shown} === first", arg=",".join(first))
