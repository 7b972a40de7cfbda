// The page: which puzzle, how it is thought about, and what comes of it.

import * as api from "./api.js";
import { draw, palette } from "./board.js";
import { Grid } from "./grid.js";
import { Player } from "./player.js";
import { Settings } from "./settings.js";

const $ = (id) => document.getElementById(id);
const EASY = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79";
const BOXES = { 4: [2, 2], 6: [2, 3], 9: [3, 3] };
const HINTS = {
  sudoku: "One line, or one row a line; 0 . _ * are blanks, lines between boxes do not matter.",
  maze: "n lines of n characters: # wall, space or . open, S start, G goal.",
};

let known = null;
let settings = null;
let kind = "sudoku";
let working = null; // the AbortController of the puzzle that is worked on
let fetching = null; // the same of a puzzle that is fetched
const puzzles = {}; // what is asked, by kind
const player = new Player();
const grid = new Grid($("grid"), (text) => load({ text }), () => say(""));

function say(message) {
  $("message").textContent = message;
}

function model() {
  const own = known.models.findIndex((one, index) => one.kind === kind && String(index) === $("model").value);
  return own;
}

/** Show the tab of a kind of puzzle. */
function open(chosen) {
  kind = chosen;
  for (const tab of $("tabs").children) {
    const own = tab.dataset.kind === kind;
    tab.setAttribute("aria-selected", String(own));
    tab.tabIndex = own ? 0 : -1;
  }
  $("entry").setAttribute("aria-labelledby", `tab-${kind}`);
  say("");
  const missing = known.missing[kind];
  $("missing").hidden = !missing;
  $("missing").textContent = missing || "";
  $("with-model").hidden = Boolean(missing);
  $("run").disabled = Boolean(missing);
  if (missing) return;
  const options = known.models.map((one, index) => ({ one, index })).filter(({ one }) => one.kind === kind);
  $("model").replaceChildren(...options.map(({ one, index }) => {
    const option = document.createElement("option");
    option.value = String(index);
    option.textContent = `${one.name} (${one.side}×${one.side}, ${one.parameters.toLocaleString("en")} weights)`;
    option.title = one.place;
    return option;
  }));
  openModel();
}

function openModel() {
  const one = known.models[model()];
  const arc = kind === "arc";
  $("note").textContent = one.note;
  $("note").hidden = !one.note;
  $("grid").hidden = kind !== "sudoku";
  $("question").hidden = kind === "sudoku";
  $("solution-box").hidden = !arc;
  $("level-label").hidden = kind !== "sudoku";
  $("clear").hidden = kind !== "sudoku";
  $("new").hidden = arc;
  $("new").textContent = kind === "maze" ? "New maze" : "New puzzle";
  $("paste-box").hidden = arc;
  $("paste-label").textContent = kind === "maze" ? "Or paste a maze" : "Or paste a puzzle";
  $("paste-hint").textContent = HINTS[kind] || "";
  $("new-row").hidden = arc;
  $("example-label").hidden = !arc;
  $("example").replaceChildren(...one.examples.map((name, index) => {
    const option = document.createElement("option");
    option.value = String(index);
    option.textContent = `${index + 1}: ${name}`;
    return option;
  }));
  settings.open(kind, one.depth);
  const before = puzzles[kind];
  if (kind === "sudoku") grid.build(one.side, BOXES[one.side]);
  if (before && before.side === one.side) take(before);
  else if (kind === "sudoku" && one.side === 9) load({ text: EASY });
  else if (arc && one.examples.length) load({ example: 0 });
  else if (!arc) load({ seed: 1, level: "medium" });
}

/** Fetch a puzzle: {text}, {seed, level} or {example}. */
async function load(asked) {
  fetching?.abort();
  fetching = new AbortController();
  const mine = fetching;
  say("");
  try {
    const puzzle = await api.puzzle({ model: model(), ...asked }, mine.signal);
    take({ ...puzzle, asked });
  } catch (error) {
    if (error.name !== "AbortError") say(error.message);
  }
}

function take(puzzle) {
  puzzles[puzzle.kind] = puzzle;
  if (puzzle.kind !== kind) return;
  if (kind === "sudoku") grid.line = puzzle.line;
  else drawQuestion();
}

function drawQuestion() {
  const puzzle = puzzles[kind];
  if (!puzzle || kind === "sudoku") return;
  draw($("question"), puzzle, null, palette());
  if (puzzle.solution) draw($("solution"), { ...puzzle, cells: puzzle.solution }, null, palette());
  const name = kind === "maze" ? "maze" : `ARC input of ${puzzle.name}`;
  $("question").setAttribute("aria-label", `the ${name}, ${puzzle.window[0]} by ${puzzle.window[1]} cells`);
}

/** What is asked of the server for the puzzle that is shown. */
function question() {
  if (kind === "sudoku") return { text: grid.line };
  const puzzle = puzzles[kind];
  if (!puzzle) throw new Error("choose a puzzle first");
  if (kind === "arc") return { example: puzzle.asked.example };
  const rows = [];
  for (let at = 0; at < puzzle.line.length; at += puzzle.side) rows.push(puzzle.line.slice(at, at + puzzle.side));
  return { text: rows.join("\n") };
}

async function run() {
  stop();
  say("");
  working = new AbortController();
  const mine = working;
  busy(true);
  try {
    const asked = { model: model(), ...question() };
    const values = settings.values();
    const puzzle = await api.puzzle(asked, mine.signal);
    let ended = false;
    for await (const line of api.solve({ ...asked, settings: values }, mine.signal)) {
      if (line.start) begun(puzzle, line.start);
      else if (line.frame) player.add(line.frame);
      else if (line.answer) { player.finish(line.answer); ended = true; }
      else if (line.error) throw new Error(line.error);
      if (line.frame) $("status").textContent = "Thinking…";
    }
    if (!ended) throw new Error("the server stopped before the answer");
    $("status").textContent = `Done: ${player.brief(player.answer)}.`;
  } catch (error) {
    if (error.name === "AbortError") $("status").textContent = "Stopped.";
    else { say(error.message); $("status").textContent = "No answer."; }
  } finally {
    if (working === mine) busy(false);
  }
}

function begun(puzzle, start) {
  player.start(puzzle, start);
  const below = $("boards").getBoundingClientRect().top > window.innerHeight - 120;
  if (below) $("stage-title").scrollIntoView();
}

function busy(is) {
  if (!is) working = null;
  $("stop").disabled = !is;
  $("run").textContent = is ? "Solve it again" : "Solve it";
  document.body.dataset.busy = String(is);
}

function stop() {
  working?.abort();
}

function wire() {
  $("ask").addEventListener("submit", (event) => { event.preventDefault(); run(); });
  $("stop").addEventListener("click", stop);
  $("model").addEventListener("change", openModel);
  $("new").addEventListener("click", () => load({ seed: Math.floor(Math.random() * 2 ** 31), level: $("level").value }));
  $("clear").addEventListener("click", () => { grid.line = ""; say(""); grid.go(0); });
  $("load").addEventListener("click", () => load({ text: $("paste").value }));
  $("solution-box").addEventListener("toggle", drawQuestion);
  $("example").addEventListener("change", () => load({ example: Number($("example").value) }));
  $("tabs").addEventListener("click", (event) => {
    if (event.target.dataset.kind) open(event.target.dataset.kind);
  });
  $("tabs").addEventListener("keydown", (event) => {
    const tabs = [...$("tabs").children];
    const at = tabs.indexOf(document.activeElement);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (at < 0 || !step) return;
    event.preventDefault();
    const next = tabs[(at + step + tabs.length) % tabs.length];
    next.focus();
    open(next.dataset.kind);
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawQuestion);
  window.addEventListener("resize", drawQuestion);
}

async function begin() {
  try {
    known = await api.models();
  } catch (error) {
    say(error.message);
    return;
  }
  settings = new Settings(known, $("settings"), $("more"));
  wire();
  const kinds = known.models.map((one) => one.kind);
  open(kinds.includes("sudoku") ? "sudoku" : kinds[0] || "sudoku");
  const wanted = new URLSearchParams(location.hash.slice(1)).get("solve"); // .../#solve=53..7....
  if (wanted && !known.missing[kind]) {
    await load({ text: wanted });
    if (!$("message").textContent) run();
  }
  document.body.dataset.ready = "true";
}

begin();
