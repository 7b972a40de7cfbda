"""The demo's page in a headless Chromium: its list of rollouts, and what it tells.

The frames are of our making: every board, every q, and which rollout answers.
"""

import json
import time

from demo_browser import CELLS, SAID, browser, models, page, server, shows

__all__ = ["browser", "models", "page", "server"]  # fixtures

DEPTH = 4
# A corner of a card's board is painted over; what is drawn anew has lost that.
MARK = """() => document.querySelectorAll("#rollouts canvas").forEach((canvas) => {
    const pen = canvas.getContext("2d");
    pen.fillStyle = "rgb(255, 0, 255)";
    pen.fillRect(0, 0, 9, 9);
})"""
MARKED = """() => [...document.querySelectorAll("#rollouts canvas")].map((canvas) => {
    const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    pen.drawImage(canvas, 0, 0);
    return pen.getImageData(4, 4, 1, 1).data.slice(0, 3).join() === "255,0,255";
})"""
# Whether a card lies within the part of the list that is seen.
IN_SIGHT = """(index) => {
    const list = document.getElementById("rollouts").getBoundingClientRect();
    const card = document.querySelectorAll("#rollouts button")[index].getBoundingClientRect();
    return card.top >= list.top && card.bottom <= list.bottom;
}"""
TOP = "document.getElementById('rollouts').scrollTop"


def state(step, digit=1, q=0.0):
    """A rollout's board, of one digit everywhere."""
    told = {"cells": [digit + 1] * 81, "sure": [50] * 81, "broken": [], "window": [9, 9]}
    return {**told, "q": q, "step": step, "valid": None, "words": "said"}


def answers_with(page, rollouts, frames, answer=None):
    """What the server then says to any question: frames of states, None where one did not move."""
    lines = [{"start": {"rollouts": rollouts, "depth": DEPTH}}]
    lines += [{"frame": {"number": n, "rollouts": rows}} for n, rows in enumerate(frames, 1)]
    if answer is not None:
        told = {"line": "the answer", "rollout": answer, "passes": rollouts * len(frames)}
        lines.append({"answer": {**state(len(frames), 9), **told, "valid": True, "words": "valid"}})
    body = "\n".join(map(json.dumps, lines)) + "\n"
    page.route("**/api/solve", lambda route: route.fulfill(body=body))


def moving(rollouts, steps=DEPTH):
    return [[state(step, step) for _ in range(rollouts)] for step in range(1, steps + 1)]


def at_once(page):
    page.evaluate("document.getElementById('speed').value = '0'")
    page.click("#run")
    shows(page, "#where", "the answer")


def goes_to(page, key, where):
    page.focus("#scrub")
    page.keyboard.press(key)
    shows(page, "#where", where)


def becomes(page, script, want):
    until = time.monotonic() + 10
    while page.evaluate(script) != want:
        assert time.monotonic() < until, page.evaluate(script)
        page.wait_for_timeout(20)


def test_the_list_goes_to_the_answer_and_back_to_where_it_was(page):
    answers_with(page, 60, moving(60), answer=45)
    at_once(page)
    assert page.evaluate(IN_SIGHT, 45) and not page.evaluate(IN_SIGHT, 0)
    goes_to(page, "Home", f"frame 1 of {DEPTH}")
    assert page.evaluate(TOP) == 0 and page.evaluate(IN_SIGHT, 0)
    page.evaluate(f"{TOP} = 321")
    for number in range(2, DEPTH + 1):
        goes_to(page, "ArrowRight", f"frame {number} of {DEPTH}")
        assert page.evaluate(TOP) == 321
    goes_to(page, "End", "the answer")
    assert page.evaluate(IN_SIGHT, 45)
    goes_to(page, "ArrowLeft", f"frame {DEPTH} of {DEPTH}")
    assert page.evaluate(TOP) == 321


def test_the_list_stays_where_it_is_put_after_the_end(page):
    """Only the way to the answer moves it: what is clicked in it stays under the mouse."""
    answers_with(page, 60, moving(60), answer=45)
    at_once(page)
    page.evaluate(f"{TOP} = 123")
    page.locator("#rollouts button").nth(4).evaluate("card => card.click()")  # no scrolling to it
    shows(page, "#where", "the answer")
    assert page.evaluate(TOP) == 123
    assert page.text_content("#large-caption").startswith("Rollout 5 at step")


def test_another_run_begins_at_the_top(page):
    answers_with(page, 60, moving(60), answer=45)
    at_once(page)
    assert page.evaluate(TOP) > 0
    page.unroute("**/api/solve")
    answers_with(page, 60, moving(60))
    page.click("#run")
    shows(page, "#status", "No answer.")
    assert page.evaluate(TOP) == 0


def test_a_card_is_drawn_anew_when_its_board_changes_and_only_then(page):
    frames = [[state(1, 3), state(1, 5)], [state(2, 4), None], [state(3, 4), state(2, 6)]]
    answers_with(page, 2, frames, answer=0)
    at_once(page)
    goes_to(page, "Home", "frame 1 of 3")
    page.evaluate(MARK)
    goes_to(page, "ArrowRight", "frame 2 of 3")
    assert page.evaluate(MARKED) == [False, True], "the second did not move"
    page.evaluate(MARK)
    goes_to(page, "ArrowRight", "frame 3 of 3")
    assert page.evaluate(MARKED) == [False, False]
    page.evaluate(MARK)
    goes_to(page, "End", "the answer")
    assert page.evaluate(MARKED) == [False, True], "the first is the answer now"
    page.evaluate(MARK)
    page.emulate_media(color_scheme="dark")
    becomes(page, MARKED, [False, False])


def test_a_card_out_of_sight_is_drawn_when_it_is_scrolled_to(page):
    answers_with(page, 60, moving(60), answer=0)
    at_once(page)
    widths = "() => [...document.querySelectorAll('#rollouts canvas')].map((c) => c.width > 72)"
    drawn = page.evaluate(widths)
    assert drawn[0] and not drawn[59]
    page.evaluate(f"{TOP} = 100000")
    becomes(page, f"() => ({widths})()[59]", True)
    page.locator("#rollouts canvas").nth(59).evaluate("canvas => { canvas.id = 'last'; }")
    cells = page.evaluate(CELLS, ["last", 9, 9])
    assert all(cell["inked"] > 5 for cell in cells)


def test_what_happened_is_said_to_those_who_listen(page):
    for selector, role in (("#status", "status"), ("#message", "alert")):
        assert page.get_attribute(selector, "role") == role
    region = page.locator("[aria-live=polite]")
    assert region.count() == 1 and region.is_visible() is False and region.inner_text() == ""
    shown = region.evaluate("region => getComputedStyle(region).display")
    assert shown == "block", "a region is listened to that is there before its text is"
    page.evaluate(SAID, "status")
    answers_with(page, 2, moving(2), answer=1)
    at_once(page)
    assert page.evaluate("window.said") == ["Thinking…", "Done."]
    words = "Answer: valid (rollout 2, step 4, q +0.00, confidence 0.500; 8 passes of the network)"
    assert region.inner_text() == words
    assert page.get_attribute("#where", "aria-live") == "off", "frames are too many to be told"
    assert page.get_attribute("#large", "aria-label").startswith("Board, row by row: 9 9 9 9 9")
    page.evaluate(SAID, "verdict")
    goes_to(page, "Home", "frame 1 of 4")
    assert page.get_attribute("#large", "aria-label").startswith("Board, row by row: 1 1 1 1 1")
    goes_to(page, "End", "the answer")
    assert page.evaluate("window.said") == [], "the answer is told once"


def test_without_an_answer_the_best_so_far_is_named(page):
    """Of the newest frame, the rollout of highest q, whichever is shown large."""
    frames = [[state(1, 3, 9.0), state(1, 4, 0.5)], [state(2, 3, -1.0), state(2, 4, 1.5)]]
    answers_with(page, 2, frames)
    page.evaluate("document.getElementById('speed').value = '2'")
    page.click("#run")
    shows(page, "#status", "No answer.")
    shows(page, "#message", "the server stopped before the answer")
    want = "Best so far, not final: said (rollout 2, step 2, q +1.50, confidence 0.818)"
    shows(page, "#verdict", want)
    assert page.text_content("#where") == "frame 2 of 2" and page.is_hidden("#text-box")
    assert page.text_content("#large-caption").startswith("Rollout 2 at step 2 of 4")
    goes_to(page, "Home", "frame 1 of 2")
    assert page.text_content("#verdict") == want


def test_a_fault_is_said_and_unsaid(page):
    page.route("**/api/solve", lambda route: route.fulfill(status=503, body="busy: try again\n"))
    page.click("#run")
    shows(page, "#message", "busy: try again")
    shows(page, "#status", "No answer.")
    page.unroute("**/api/solve")
    answers_with(page, 1, moving(1), answer=0)
    at_once(page)
    assert page.text_content("#message") == "" and page.text_content("#status") == "Done."
