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

const INVITATION = $("status").textContent;

let known = null;
let settings = null;
let kind = null; // of the tab that is open
let working = null; // the AbortController of the puzzle that is worked on
const fetching = {}; // the same of a puzzle that is fetched, by `place`
let pending = null; // ends when that puzzle is there, or is not to be had
const chosen = {}; // by kind: which model, and what stands in the box to paste into
const puzzles = {}; // what is asked, by `place`
const player = new Player(() => { $("status").textContent = "Done."; });
const grid = new Grid($("grid"), (text) => load({ text }), edited);

function say(message) {
  $("message").textContent = message;
}

function model() {
  return known.models.findIndex((one, index) => one.kind === kind && String(index) === $("model").value);
}

/** Where a model's puzzle is kept: models of boards of the same size share it, data sets differ. */
function place(index) {
  const one = known.models[index];
  return one.kind === "arc" ? `arc ${index}` : `${one.kind} ${one.side}`;
}

/** What is typed counts: it is kept, and no puzzle that comes later writes over it. */
function edited() {
  fetching[place(model())]?.abort();
  say("");
  const one = known.models[model()];
  puzzles[place(model())] = { kind: "sudoku", side: one.side, line: grid.line };
}

/** Show the tab of a kind of puzzle. */
function open(tabbed) {
  if (tabbed === kind) return;
  if (kind) {
    chosen[kind] = { model: $("model").value, paste: $("paste").value };
    leave();
  }
  kind = tabbed;
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
  if (chosen[kind]) $("model").value = chosen[kind].model;
  $("paste").value = chosen[kind]?.paste || "";
  openModel();
}

/** What is worked on and what is shown belong to the tab that is left. */
function leave() {
  stop();
  if (working) busy(false);
  player.clear();
  $("status").textContent = INVITATION;
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
  const before = puzzles[place(model())];
  if (kind === "sudoku") grid.build(one.side, BOXES[one.side]);
  if (before) show(before);
  else if (kind === "sudoku" && one.side === 9) load({ text: EASY });
  else if (arc && one.examples.length) load({ example: 0 });
  else if (!arc) load({ seed: 1, level: "medium" });
}

/** Fetch a puzzle: {text}, {seed, level} or {example}; true when it is there. */
function load(asked) {
  pending = fetched(asked);
  return pending;
}

async function fetched(asked) {
  const index = model();
  const key = place(index);
  fetching[key]?.abort();
  const mine = new AbortController();
  fetching[key] = mine;
  say("");
  try {
    const puzzle = { ...(await api.puzzle({ model: index, ...asked }, mine.signal)), asked };
    puzzles[key] = puzzle;
    if (index === model()) show(puzzle);
    return true;
  } catch (error) {
    if (error.name === "AbortError" || fetching[key] !== mine || index !== model()) return false;
    if (asked.text) $("paste").value = asked.text; // to be mended there
    say(error.message);
    return false;
  }
}

function show(puzzle) {
  if (kind === "arc") $("example").value = String(puzzle.asked.example);
  if (kind === "sudoku") grid.line = puzzle.line;
  else drawQuestion();
}

function drawQuestion() {
  if (kind === "sudoku" || model() < 0) return;
  const puzzle = puzzles[place(model())];
  if (!puzzle) return;
  draw($("question"), puzzle, null, palette());
  if (puzzle.solution) draw($("solution"), { ...puzzle, cells: puzzle.solution }, null, palette());
  const name = kind === "maze" ? "maze" : `ARC input of ${puzzle.name}`;
  $("question").setAttribute("aria-label", `the ${name}, ${puzzle.window[0]} by ${puzzle.window[1]} cells`);
}

/** What is asked of the server for the puzzle that is shown. */
function question() {
  if (kind === "sudoku") return { text: grid.line };
  const puzzle = puzzles[place(model())];
  if (!puzzle) throw new Error("choose a puzzle first");
  if (kind === "arc") return { example: Number($("example").value) };
  const rows = [];
  for (let at = 0; at < puzzle.line.length; at += puzzle.side) rows.push(puzzle.line.slice(at, at + puzzle.side));
  return { text: rows.join("\n") };
}

async function run() {
  stop();
  player.clear();
  say("");
  working = new AbortController();
  const mine = working;
  busy(true);
  $("status").textContent = "Thinking…";
  try {
    await pending;
    if (working !== mine) return;
    const asked = { model: model(), ...question() };
    const values = settings.values();
    const puzzle = await api.puzzle(asked, mine.signal);
    if (working !== mine) return;
    let ended = false;
    for await (const line of api.solve({ ...asked, settings: values }, mine.signal)) {
      if (working !== mine) return;
      if (line.start) begun(puzzle, line.start);
      else if (line.frame) player.add(line.frame);
      else if (line.answer) {
        ended = true;
        $("status").textContent = "Done: showing steps.";
        player.finish(line.answer);
      }
      else if (line.error) throw new Error(line.error);
    }
    if (working !== mine) return;
    if (!ended) throw new Error("the server stopped before the answer");
  } catch (error) {
    if (working !== mine) return; // another run has taken over the page
    player.end();
    if (error.name === "AbortError") $("status").textContent = "Stopped.";
    else { say(error.message); $("status").textContent = "No answer."; }
  } finally {
    if (working === mine) busy(false);
  }
}

function begun(puzzle, start) {
  player.start(puzzle, start);
  const below = $("boards").getBoundingClientRect().top > window.innerHeight - 120;
  if (below) document.querySelector(".stage").scrollIntoView();
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
  $("clear").addEventListener("click", () => { grid.line = ""; edited(); grid.go(0); });
  $("load").addEventListener("click", () => load({ text: $("paste").value }));
  $("solution-box").addEventListener("toggle", drawQuestion);
  $("example").addEventListener("change", () => load({ example: Number($("example").value) }));
  $("tabs").addEventListener("click", (event) => {
    if (event.target.dataset.kind) open(event.target.dataset.kind);
  });
  $("tabs").addEventListener("keydown", (event) => {
    const tabs = [...$("tabs").children];
    const at = tabs.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    const next = tabs[(to + tabs.length) % tabs.length];
    next.focus();
    open(next.dataset.kind);
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawQuestion);
  window.addEventListener("resize", drawQuestion);
  window.addEventListener("hashchange", linked);
}

/** The tab that the page begins with. */
function home() {
  const kinds = known.models.map((one) => one.kind);
  return kinds.includes("sudoku") ? "sudoku" : kinds[0] || "sudoku";
}

/** A puzzle in the address, .../#solve=53..7....: filled in only, since any site can link to us. */
async function linked() {
  const wanted = new URLSearchParams(location.hash.slice(1)).get("solve");
  if (!wanted || known.missing[home()]) return;
  open(home());
  if (await load({ text: wanted }) && !working) {
    $("status").textContent = "The link filled in this puzzle: press “Solve it” to have it solved.";
  }
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
  open(home());
  await linked();
  document.body.dataset.ready = "true";
}

begin();
