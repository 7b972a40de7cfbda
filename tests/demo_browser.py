"""The demo's page in a headless Chromium, for the tests of it: a browser, a server, what is seen.

Skipped where there is no Chromium or no Playwright; TRM_FAST_BROWSER=require, as in CI, fails
instead. Playwright drives the browser that is installed and downloads none.
"""

import os
import shutil
import threading

import pytest
from answering import tiny_model
from test_demo_work import loaded

from trm_fast.demo.server import DemoServer
from trm_fast.demo.work import Demo
from trm_fast.loading import load

# Not the board that the page begins with, but its image in the diagonal.
BOARD = "56.847...3.9...6....8.......1..8..4.79.6.2.18.5..3..9.......2....6...8.7...316.59"
SOLVED = "561847923379521684428963175613789542794652318852134796935478261146295837287316459"
EASY = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
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


# Of every cell of a board: its ground, near the lower right corner, and how much is inked over it.
CELLS = """([id, rows, columns]) => {
    const canvas = document.getElementById(id);
    const copy = Object.assign(document.createElement("canvas"),
        { width: canvas.width, height: canvas.height });
    const pen = copy.getContext("2d", { willReadFrequently: true });
    pen.drawImage(canvas, 0, 0);
    const colour = (x, y) => [...pen.getImageData(x, y, 1, 1).data.slice(0, 3)];
    const cell = (canvas.width - 4) / columns;
    const found = [];
    for (let row = 0; row < rows; row += 1) {
        for (let column = 0; column < columns; column += 1) {
            const [x, y] = [2 + column * cell, 2 + row * cell];
            const ground = colour(x + cell * 0.86, y + cell * 0.86);
            const inner = pen.getImageData(x + cell * 0.2, y + cell * 0.2, cell * 0.6, cell * 0.6);
            let inked = 0;
            for (let at = 0; at < inner.data.length; at += 4) {
                const far = (i) => Math.abs(inner.data[at + i] - ground[i]);
                if (far(0) + far(1) + far(2) > 120) inked += 1;
            }
            const top = colour(x + cell * 0.08, y + cell * 0.08);
            found.push({ ground: ground.join(), inked, top: top.join() });
        }
    }
    return found;
}"""
# What a text said, one after another.
SAID = """id => {
    window.said = [];
    const element = document.getElementById(id);
    new MutationObserver(() => window.said.push(element.textContent))
        .observe(element, { childList: true });
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
    refused = [text for text in said if "a status of" not in text]  # the browser's own words
    assert refused == []
    assert asked and all(url.startswith(server.url) for url in asked), asked


def expects(located):
    """What is waited for of an element (functions to wait for are what the page forbids: eval)."""
    from playwright.sync_api import expect

    return expect(located)


def shows(page, selector, text):
    """Wait until an element has a text."""
    expects(page.locator(selector)).to_have_text(text, timeout=20_000)


def has(page, selector, value):
    """The same of a field's value."""
    expects(page.locator(selector)).to_have_value(value, timeout=20_000)


def solved(page):
    """Press the button and wait for the answer, which is shown at once."""
    page.evaluate("document.getElementById('speed').value = '0'")
    page.click("#run")
    page.wait_for_selector("#verdict:not([hidden])")
    page.wait_for_selector("body[data-busy=false]")
