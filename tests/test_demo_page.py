"""The demo's page in a headless Chromium: a puzzle pasted, solved and seen, and what goes wrong."""

import json
import re
import threading
from itertools import repeat

import pytest
import torch
from answering import tiny_model
from demo_browser import (
    BOARD,
    CELLS,
    EASY,
    RECORD,
    SAID,
    SOLVED,
    browser,
    expects,
    has,
    models,
    page,
    server,
    shows,
    solved,
)
from test_demo_work import ARC, arc_data, loaded

from trm_fast.demo.server import DemoServer
from trm_fast.demo.work import Demo
from trm_fast.inference import predict

__all__ = ["browser", "models", "page", "server"]  # fixtures


def test_a_pasted_puzzle_is_solved_step_by_step(page, models):
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
    keys = cards.locator(".key").evaluate_all("all => all.map(k => k.style.borderTopColor)")
    lines = page.locator("#curve polyline").evaluate_all(
        "all => all.map(l => getComputedStyle(l).stroke)"
    )
    assert len(set(keys)) == 4 and set(keys) == set(lines)
    large = page.evaluate(CELLS, ["large", 9, 9])
    assert all(cell["inked"] > 20 for cell in large)
    card = page.locator("#rollouts canvas").nth(int(want.rollout))
    card.evaluate("canvas => { canvas.id = 'answering'; }")
    small = page.evaluate(CELLS, ["answering", 9, 9])
    for cells in (large, small):
        given = {cell["ground"] for cell, c in zip(cells, BOARD, strict=True) if c != "."}
        told = {cell["ground"] for cell, c in zip(cells, BOARD, strict=True) if c == "."}
        assert given == {"228,231,235"} and not given & told


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


@pytest.fixture
def endless(server, monkeypatch):
    """Every answer then takes minutes: its third frame comes again and again."""
    ended = threading.Event()
    frames = server.demo.frames

    def again(asked):
        lines = frames(asked)
        start, first, second, third = (next(lines) for _ in range(4))
        yield from (start, first, second)
        for line in repeat(third, 6000):
            yield line
            if ended.wait(0.05):
                return

    monkeypatch.setattr(server.demo, "frames", again)
    yield
    ended.set()


def begins(page, speed=0):
    """Press the button and wait for a frame."""
    page.evaluate("speed => { document.getElementById('speed').value = speed; }", str(speed))
    page.click("#run")
    expects(page.locator("#where")).to_contain_text("frame")


def works(server):
    """Whether the server still does, 2 seconds from now at the latest."""
    free = server.slots["solve"].acquire(timeout=2)
    if free:
        server.slots["solve"].release()
    return not free


@pytest.mark.parametrize("speed", [0, 2])
def test_stopping_ends_the_work_and_the_playing(page, server, endless, speed):
    begins(page, speed)
    shows(page, "#status", "Thinking…")
    assert not server.slots["solve"].acquire(blocking=False)
    expects(page.locator("#scrub")).not_to_have_attribute("max", re.compile("^[0-9]$"))
    page.click("#stop")
    shows(page, "#status", "Stopped.")
    assert page.get_attribute("#play", "aria-label") == "Play"
    where = page.text_content("#where")
    at, frames = map(int, re.fullmatch(r"frame (\d+) of (\d+)", where).groups())
    assert at == frames > 10, "it rests at the newest"
    best = page.text_content("#verdict")
    assert re.match(r"Best so far, not final: .* \(rollout \d, step 3, q .*, confidence ", best)
    assert page.get_attribute("#verdict", "class").split() == ["verdict"] and not works(server)
    page.wait_for_timeout(700)
    assert page.text_content("#where") == where


@pytest.mark.parametrize("tab", ["maze", "arc"])
def test_another_tab_ends_the_work_and_the_playing(page, server, endless, tab):
    """With a model of its kind and without: what was shown is of the tab that was left."""
    invitation = page.text_content("#status")
    begins(page, 2)
    page.click(f"#tab-{tab}")
    shows(page, "#status", invitation)
    stage = "#player, #boards, #curve-box, #legend, #verdict, #text-box"
    assert page.locator(stage).evaluate_all("all => all.map(e => e.hidden)") == [True] * 6
    assert page.is_visible("#intro") and page.is_disabled("#stop") and not works(server)
    page.wait_for_timeout(700)
    assert page.is_hidden("#player") and page.text_content("#status") == invitation
    page.click("#tab-sudoku")
    begins(page)
    assert page.is_visible("#boards") and page.is_hidden("#intro")


def test_a_pause_holds_while_frames_come(page, endless):
    begins(page)
    page.click("#play")
    where = page.text_content("#where").split(" of ")[0]
    page.wait_for_timeout(300)
    assert page.text_content("#where").split(" of ")[0] == where
    assert page.get_attribute("body", "data-busy") == "true"


def test_a_refused_run_leaves_nothing_of_the_one_before(page):
    begins(page, 2)
    shows(page, "#status", "Done: showing steps.")
    page.fill("#set-rollouts", "500")
    page.click("#run")
    shows(page, "#message", "rollouts is 500; at most 128 are allowed here")
    shows(page, "#status", "No answer.")
    for tab in ("sudoku", "maze"):
        page.click(f"#tab-{tab}")
        assert page.is_hidden("#player") and page.is_hidden("#boards") and page.is_visible("#intro")
    page.wait_for_timeout(700)
    assert page.is_hidden("#player")


def test_stop_is_in_sight_on_a_narrow_screen(page, endless):
    page.set_viewport_size({"width": 400, "height": 700})
    begins(page)
    page.locator("#curve").scroll_into_view_if_needed()
    box = page.locator("#stop").bounding_box()
    assert box["y"] >= 0 and box["y"] + box["height"] <= 700
    page.click("#stop")
    shows(page, "#status", "Stopped.")


def test_a_run_begun_over_another_keeps_the_page(page, endless):
    begins(page)
    page.evaluate(SAID, "status")
    page.click("#run")
    page.wait_for_timeout(500)
    assert set(page.evaluate("window.said")) == {"Thinking…"}
    assert page.get_attribute("body", "data-busy") == "true" and page.is_enabled("#stop")
    page.click("#stop")
    shows(page, "#status", "Stopped.")


def test_a_fault_midway_ends_the_playing(page):
    state = {"cells": [1] * 81, "sure": [0] * 81, "broken": [], "window": [9, 9], "q": 0}
    told = [state | {"step": step, "valid": False, "words": ""} for step in (1, 2, 3)]
    lines = [{"start": {"rollouts": 1, "depth": 3}}, *({"frame": {"rollouts": [s]}} for s in told)]
    body = "\n".join(json.dumps(line) for line in [*lines, {"error": "it broke"}, {}])
    page.route("**/api/solve", lambda route: route.fulfill(body=body))
    page.click("#run")
    shows(page, "#message", "it broke")
    shows(page, "#status", "No answer.")
    assert page.get_attribute("#play", "aria-label") == "Play"
    assert page.text_content("#where") == "frame 3 of 3"


def test_the_end_is_not_told_before_it_is_shown(page):
    solved_at = page.locator("#verdict")
    page.evaluate("document.getElementById('speed').value = '2'")
    page.click("#run")
    shown_yet = "Done: showing steps."
    shows(page, "#status", shown_yet)
    page.click("#play")
    assert page.get_attribute("#play", "aria-label") == "Play"
    assert solved_at.is_hidden() and page.is_hidden("#text-box")
    assert page.text_content("#status") == shown_yet
    page.focus("#scrub")
    page.keyboard.press("End")
    shows(page, "#where", "the answer")
    assert solved_at.inner_text().startswith("Answer: valid") and page.is_visible("#text-box")
    assert page.text_content("#status") == "Done."


def test_grounds_and_marks_of_cells(page):
    """Given, sure, unsure and broken cells; of ARC a mark where the answer is wrong."""
    draws = """async ([puzzle, state]) => {
        const { draw, palette } = await import("/board.js");
        const canvas = document.createElement("canvas");
        canvas.id = "drawn";
        document.body.append(canvas);
        draw(canvas, puzzle, state, palette());
    }"""
    cells = [2, 1, 1, 1] + [1] * 12
    puzzle = {"kind": "sudoku", "side": 4, "box": [2, 2], "window": [4, 4], "cells": cells}
    state = {"cells": [2, 3, 4, 5] + [1] * 12, "sure": [100, 100, 0, 50] + [0] * 12}
    page.evaluate(draws, [puzzle, {**state, "broken": [3], "window": [4, 4]}])
    given, sure, unsure, broken = page.evaluate(CELLS, ["drawn", 1, 4])
    assert given["ground"] == "228,231,235" and sure["ground"] == "147,214,160"
    assert unsure["ground"] == "247,220,154" and broken["ground"] == "246,193,186"
    assert all(cell["inked"] > 20 for cell in (given, sure, unsure, broken))
    assert broken["top"] == "180,35,24" and unsure["top"] == unsure["ground"]
    page.evaluate("document.getElementById('drawn').remove()")
    puzzle = {"kind": "arc", "side": 30, "box": [0, 0], "window": [1, 2], "cells": [3] * 900}
    page.evaluate(draws, [puzzle, {"cells": [3] * 900, "broken": [2], "window": [1, 3]}])
    right, _, wrong = page.evaluate(CELLS, ["drawn", 1, 3])
    assert right["ground"] == wrong["ground"] == right["top"] == "30,147,255"
    assert wrong["top"] == "255,255,255"


def test_tabs_keep_what_is_typed_and_set(page):
    page.click("#clear")
    page.keyboard.type("12")
    page.fill("#set-rollouts", "7")
    page.select_option("#preset", "ptrm")
    page.fill("#set-depth", "5")
    page.fill("#paste", "not yet")
    kept = {name: page.input_value(f"#set-{name}") for name in ("rollouts", "noise", "select")}
    page.click("#tab-sudoku")
    assert page.input_value("#grid input >> nth=1") == "2"
    page.click("#tab-maze")
    assert (page.input_value("#set-depth"), page.input_value("#paste")) == ("3", "")
    page.focus("#tab-maze")
    page.keyboard.press("End")
    assert page.get_attribute("#tab-arc", "aria-selected") == "true"
    page.keyboard.press("Home")
    assert page.get_attribute("#tab-sudoku", "aria-selected") == "true"
    values = page.locator("#grid input").evaluate_all("all => all.map(c => c.value)")
    assert values == ["1", "2"] + [""] * 79
    assert (page.input_value("#set-depth"), page.input_value("#preset")) == ("5", "ptrm")
    assert {name: page.input_value(f"#set-{name}") for name in kept} == kept
    assert page.input_value("#paste") == "not yet"


@pytest.mark.parametrize("how", ["clear", "type"])
def test_a_puzzle_that_comes_late_overwrites_nothing(page, how):
    waiting = []
    page.route("**/api/puzzle", lambda route: waiting.append(route))
    page.fill("#paste", BOARD)
    with page.expect_request("**/api/puzzle"):
        page.click("#load")
    if how == "clear":
        page.click("#clear")
    else:
        page.locator("#grid input").nth(80).fill("1")
    before = page.locator("#grid input").evaluate_all("all => all.map(c => c.value)")
    for route in waiting:
        route.continue_()
    page.wait_for_timeout(300)
    assert page.locator("#grid input").evaluate_all("all => all.map(c => c.value)") == before
    assert before[80] == ("" if how == "clear" else "1")


@pytest.mark.parametrize("referer", [None, "http://elsewhere.example/"])
def test_a_link_fills_in_its_puzzle_and_waits_for_a_click(browser, server, referer):
    """Whoever it is from: another site can hide itself."""
    page = browser.new_page()
    page.goto(f"{server.url}#solve={BOARD}", referer=referer)
    page.wait_for_selector("body[data-ready=true]")
    has(page, "#grid input >> nth=1", BOARD[1])
    said = "The link filled in this puzzle: press “Solve it” to have it solved."
    shows(page, "#status", said)
    assert page.get_attribute("body", "data-busy") is None and page.is_hidden("#player")
    page.click("#tab-maze")
    page.evaluate(f"location.hash = 'solve={EASY}'")  # another one, in the same tab
    has(page, "#grid input >> nth=1", EASY[1])
    assert page.get_attribute("#tab-sudoku", "aria-selected") == "true"
    assert page.get_attribute("body", "data-busy") is None and page.is_hidden("#player")
    solved(page)
    assert page.text_content("#answer").startswith("534678912")
    page.close()


def test_a_link_too_short_is_kept_to_be_mended(browser, server):
    page = browser.new_page()
    page.goto(f"{server.url}#solve=53..7....6......8.........")
    shows(page, "#message", "26 characters: a board has 81")
    assert page.input_value("#paste") == "53..7....6......8........."
    assert page.get_attribute("body", "data-busy") is None
    page.close()


def test_the_arc_example_that_is_chosen_is_the_one_solved(browser, tmp_path):
    data = {"data_paths": [str(arc_data(tmp_path / "arc"))]}
    arc = loaded(tiny_model(5, **ARC, puzzle_emb_len=1), data=data)
    with DemoServer(Demo([arc, loaded(tiny_model(4, seq_len=25, vocab_size=6))]), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        page = browser.new_page()
        page.goto(server.url)
        page.click("#tab-arc")
        page.wait_for_selector("#question[aria-label='the ARC input of two, 2 by 3 cells']")
        page.select_option("#example", "1")
        page.click("#tab-maze")
        page.click("#tab-arc")
        has(page, "#example", "1")
        with page.expect_request("**/api/solve") as asked:
            solved(page)
        assert asked.value.post_data_json["example"] == 1
        rows, columns = map(
            int, re.match(r"Answer: a grid of (\d+) x (\d+),", page.inner_text("#verdict")).groups()
        )
        assert (rows, columns) != (2, 3)
        width, height = page.evaluate("[large.width - 4, large.height - 4]")
        assert height == round(width * max(rows, 2) / max(columns, 3))
        marks = page.evaluate(CELLS, ["large", rows, max(columns, 3)])
        assert marks[-1]["top"] == "255,255,255"
        shows(page, "#legend li:visible", "unlike the solution (marked corner)")
        page.close()
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("width", "scale"), [(1280, 1), (1283, 1), (1000, 1.25), (390, 3)])
def test_boards_are_drawn_pixel_for_pixel(browser, server, width, scale):
    """The bitmap is as large as what the screen shows of it, or it is blurred."""
    page = browser.new_page(viewport={"width": width, "height": 800}, device_scale_factor=scale)
    page.goto(server.url)
    page.wait_for_selector("body[data-ready=true]")
    solved(page)
    sizes = page.locator("#large, #rollouts canvas").evaluate_all(
        """all => all.map((canvas) => {
            const box = canvas.getBoundingClientRect();
            return [canvas.width, canvas.height, box.width, box.height];
        })"""
    )
    grid = page.locator("#boards > *").evaluate_all(
        "a => a.map(x => x.getBoundingClientRect().width)"
    )
    page.close()
    assert len(sizes) == 5
    for columns, rows, wide, high in sizes:
        assert abs(columns - wide * scale) <= 0.5 and abs(rows - high * scale) <= 1
        assert columns == rows
    assert sizes[1][2] > 90, "a card's board can be read at any width"
    assert width < 900 or grid[0] == pytest.approx(grid[1], abs=0.1)


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
