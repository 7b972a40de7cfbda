"""The demo's page in a headless Chromium: a puzzle pasted, solved and seen, and what goes wrong.

Skipped where there is no Chromium or no Playwright; TRM_FAST_BROWSER=require, as in CI, fails
instead. Playwright drives the browser that is installed and downloads none.
"""

import os
import re
import shutil
import threading

import pytest
import torch
from answering import tiny_model
from test_demo_work import loaded

from trm_fast.demo.server import DemoServer
from trm_fast.demo.work import Demo
from trm_fast.inference import predict
from trm_fast.loading import load

# Not the board that the page begins with, but its image in the diagonal.
BOARD = "56.847...3.9...6....8.......1..8..4.79.6.2.18.5..3..9.......2....6...8.7...316.59"
SOLVED = "561847923379521684428963175613789542794652318852134796935478261146295837287316459"
# No connection of its own: without these it looks up hosts at every start.
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


# What the player said it showed, in order; how many frames there are is known at the end only.
RECORD = """() => {
    window.seen = [];
    const where = document.getElementById("where");
    new MutationObserver(() => {
        const text = where.textContent.replace(/ of .*/, "");
        if (window.seen.at(-1) !== text) window.seen.push(text);
    }).observe(where, { childList: true });
}"""


def unavailable(reason: str) -> None:
    if os.environ.get("TRM_FAST_BROWSER") == "require":
        pytest.fail(f"TRM_FAST_BROWSER=require: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser():
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    path = next(filter(None, found), None)
    if path is None:
        unavailable("no Chromium: apt-get install chromium, or another Chromium on PATH")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        unavailable("no Playwright: pip install playwright")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, headless=True, args=QUIET)
        yield running
        running.close()


@pytest.fixture(scope="module")
def models():
    return [load("shipped", device="cpu"), loaded(tiny_model(4, seq_len=25, vocab_size=6))]


@pytest.fixture(scope="module")
def server(models):
    with DemoServer(Demo(models), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def page(browser, server):
    """The page, loaded; at the end nothing was said on its console and no other host asked."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(20_000)
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    page.wait_for_selector("body[data-ready=true]")
    page.wait_for_selector("#grid input.filled")  # the board that it begins with
    yield page
    context.close()
    refused = [text for text in said if "status of 400" not in text]  # the browser's own words
    assert refused == []
    assert asked and all(url.startswith(server.url) for url in asked), asked


def shows(page, selector, text):
    """Wait until an element has a text (a function to wait for is what the page forbids: eval)."""
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_text(text, timeout=20_000)


def has(page, selector, value):
    """The same of a field's value."""
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_value(value, timeout=20_000)


def solved(page):
    """Press the button and wait for the answer, which is shown at once."""
    page.evaluate("document.getElementById('speed').value = '0'")
    page.click("#run")
    page.wait_for_selector("#verdict:not([hidden])")
    page.wait_for_selector("body[data-busy=false]")


def test_a_pasted_puzzle_is_solved_step_by_step(page, models, tmp_path):
    rows = "\n".join(" ".join(BOARD[start : start + 9]) + " |" for start in range(0, len(BOARD), 9))
    page.fill("#paste", rows)
    page.click("#load")
    has(page, "#grid input >> nth=1", BOARD[1])
    cells = page.locator("#grid input").evaluate_all("all => all.map(c => c.value || '.')")
    assert "".join(cells) == BOARD
    assert page.input_value("#set-rollouts") == "4"
    page.evaluate(RECORD)
    page.evaluate("document.getElementById('speed').value = '12'")
    page.click("#run")
    shows(page, "#where", "the answer")
    steps = [f"frame {number}" for number in range(1, 17)]
    assert page.evaluate("window.seen") == [*steps, "the answer"]
    inputs = torch.tensor([[1 if c == "." else int(c) + 1 for c in BOARD]])
    want = predict(models[0].model, inputs, rollouts=4, depth=16)
    digits = "".join(str(token - 1) for token in want.tokens[0].tolist())
    assert page.text_content("#answer").split()[0] == digits == SOLVED
    verdict = page.text_content("#verdict")
    place = f"rollout {int(want.rollout) + 1}, step {int(want.step)}, q +{float(want.q):.2f}"
    assert verdict.startswith(f"Answer: valid ({place}, confidence 0.")
    assert verdict.endswith("64 passes of the network)")
    cards = page.locator("#rollouts button")
    assert cards.count() == 4
    assert "the answer" in cards.nth(int(want.rollout)).text_content()
    assert page.locator("#curve polyline").count() == 4
    path = tmp_path / "page.png"
    page.screenshot(path=path, full_page=True)
    assert path.stat().st_size > 30_000


def test_the_steps_are_scrubbed_with_the_keyboard(page):
    solved(page)
    page.focus("#scrub")
    page.keyboard.press("Home")
    assert page.text_content("#where") == "frame 1 of 16"
    first = page.text_content("#large-caption")
    assert re.search(r"Rollout \d at step 1 of 16: q −\d", first)
    label = page.get_attribute("#large", "aria-label")
    page.keyboard.press("ArrowRight")
    assert page.text_content("#where") == "frame 2 of 16"
    assert page.text_content("#large-caption") != first
    assert page.get_attribute("#large", "aria-label") != label
    page.locator("#rollouts button").nth(2).click()
    assert page.text_content("#large-caption").startswith("Rollout 3 at step 2 of 16")


def test_a_malformed_paste_says_what_is_wrong(page):
    page.fill("#paste", "12345")
    page.click("#load")
    page.wait_for_selector("#message:not(:empty)")
    want = "5 characters: a board has 81"
    assert page.text_content("#message") == want
    page.fill("#paste", BOARD)
    page.click("#load")
    page.wait_for_selector("#message:empty", state="attached")
    page.fill("#set-noise", "-1")
    page.click("#run")
    page.wait_for_selector("#message:not(:empty)")
    assert page.text_content("#message") == "noise must be a number of at least 0, got -1"


def test_typing_moves_on_and_marks_digits_that_clash(page):
    page.click("#clear")
    page.keyboard.type("55")
    page.keyboard.press("ArrowDown")
    page.keyboard.type("7")
    values = page.locator("#grid input").evaluate_all("all => all.map(c => c.value)")
    assert (values[0], values[1], values[11]) == ("5", "5", "7")
    clash = page.locator("#grid input[aria-invalid=true]")
    assert clash.evaluate_all("all => all.map(c => c.getAttribute('aria-label'))") == [
        "row 1 column 1",
        "row 1 column 2",
    ]
    page.click("#run")
    page.wait_for_selector("#message:not(:empty)")
    assert "clues clash, a digit stands twice in row 1; box 1" in page.text_content("#message")


def test_tabs_of_what_there_is_and_what_is_missing(page):
    page.focus("#tab-sudoku")
    page.keyboard.press("ArrowRight")
    assert page.get_attribute("#tab-maze", "aria-selected") == "true"
    page.click("#new")
    page.wait_for_selector("#question[aria-label='the maze, 5 by 5 cells']")
    solved(page)
    assert "shortest path" in page.text_content("#answer")
    page.keyboard.press("Escape")
    page.click("#tab-arc")
    assert page.is_visible("#missing") and page.is_disabled("#run")
    assert page.text_content("#missing").startswith("No ARC model is loaded: build data with")


def test_stopping_ends_the_work(page, server):
    page.fill("#set-rollouts", "64")
    page.fill("#set-depth", "128")
    page.click("#run")
    page.wait_for_selector("#boards:not([hidden])")
    page.click("#stop")
    shows(page, "#status", "Stopped.")
    assert server.slots["solve"].acquire(timeout=20)
    server.slots["solve"].release()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_narrow_screen_in_both_schemes(browser, server, scheme):
    page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page.goto(server.url)
    page.wait_for_selector("body[data-ready=true]")
    solved(page)
    wide = page.evaluate("document.documentElement.scrollWidth")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.close()
    assert wide == 360
    assert ground == {"light": "rgb(246, 247, 249)", "dark": "rgb(15, 19, 24)"}[scheme]
