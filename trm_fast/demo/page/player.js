// Frames as they come and afterwards: played, scrubbed, drawn.

import { draw, palette } from "./board.js";
import { drawCurves, lineOf } from "./chart.js";

const $ = (id) => document.getElementById(id);
const PARTS = ["player", "boards", "curve-box", "legend", "verdict", "text-box"];
const sigmoid = (q) => 1 / (1 + Math.exp(-q));
const signed = (q) => (q === null ? "none" : `${q >= 0 ? "+" : "−"}${Math.abs(q).toFixed(2)}`);

export class Player {
  /** @param told called when an answer is told, once its picture is reached */
  constructor(told) {
    this.told = told;
    this.frames = [];
    this.cards = [];
    this.at = 0;
    this.answer = null;
    this.chosen = null; // a rollout that was clicked; null follows the best
    this.timer = null;
    $("scrub").addEventListener("input", () => { this.pause(); this.show(Number($("scrub").value)); });
    $("play").addEventListener("click", () => this.toggle());
    const again = () => this.show(this.at);
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
    new ResizeObserver(again).observe($("boards"));
    this.watcher = new IntersectionObserver((seen) => {
      for (const { target, isIntersecting } of seen) {
        const card = this.cards.find((one) => one.button === target);
        if (card) { card.visible = isIntersecting; this.paint(card); }
      }
    }, { rootMargin: "600px" });
    if (window.matchMedia("(prefers-reduced-motion: reduce)").matches) $("speed").value = "0";
  }

  /** Begin with a puzzle; depth and rollouts as the server says them. */
  start(puzzle, { depth, rollouts }) {
    this.clear();
    Object.assign(this, { puzzle, depth, at: 0, chosen: null, over: false, scrolled: null });
    this.cards = Array.from({ length: rollouts }, (_, index) => this.card(index));
    $("rollouts").replaceChildren(...this.cards.map((card) => card.button));
    for (const card of this.cards) this.watcher.observe(card.button);
    $("boards").classList.toggle("single", rollouts === 1);
    $("rollouts").hidden = rollouts === 1;
    $("rollouts").classList.toggle("few", rollouts <= 4);
    $("intro").hidden = true;
    for (const id of ["player", "boards", "curve-box"]) $(id).hidden = false;
    $("rollouts").scrollTop = 0; // which what is hidden would not take
    const arc = puzzle.kind === "arc";
    $("legend").hidden = arc && !puzzle.solution;
    $("legend").classList.toggle("arc", arc);
    $("broken-words").textContent = arc ? "unlike the solution" : "breaks a rule";
    $("scrub").max = 0;
    this.play();
  }

  /** Nothing to show: as the page begins. */
  clear() {
    this.pause();
    this.watcher.disconnect();
    Object.assign(this, { frames: [], cards: [], answer: null });
    for (const id of PARTS) $(id).hidden = true;
    $("where").textContent = "";
    $("intro").hidden = false;
  }

  card(index) {
    const button = document.createElement("button");
    button.type = "button";
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [this.puzzle.window[1] * 8, this.puzzle.window[0] * 8];
    const key = document.createElement("i"); // of its line in the chart
    const said = document.createElement("span"), check = document.createElement("span");
    key.className = "key";
    said.className = "said";
    button.append(canvas, key, said, check);
    button.addEventListener("click", () => {
      this.chosen = this.chosen === index ? null : index;
      this.show(this.at);
    });
    return { button, canvas, key, said, check, visible: false, picture: null, drawn: null };
  }

  /** A frame: rollouts that did not move are null, and stay as they were. */
  add(frame) {
    const before = this.frames.at(-1)?.rollouts || [];
    frame.rollouts = frame.rollouts.map((state, index) => state || before[index] || null);
    this.frames.push(frame);
    $("scrub").max = this.last;
    this.follow();
  }

  /** No answer will come, by Stop or a fault: rest at the newest frame and say what is best in it. */
  end() {
    if (!this.frames.length) { this.clear(); return; }
    this.pause();
    this.over = true;
    this.show(this.last);
    if (this.answer) return;
    const frame = this.frames.at(-1);
    const index = this.best(frame);
    const state = frame.rollouts[index];
    if (state) this.tell(`Best so far, not final: ${this.brief(state)} (${this.place(index, state)})`, null);
  }

  /** The end: {cells, q, step, rollout, valid, words, ...}; an answer is one more frame. */
  finish(answer) {
    this.answer = answer;
    this.answered = { ...answer, sure: this.sureOf(answer) };
    $("scrub").max = this.last;
    if (this.playing && Number($("speed").value) === 0) this.show(this.last);
  }

  /** Say what the answer is, once the picture of it is reached. */
  reveal() {
    if (!$("verdict").hidden) return;
    const answer = this.answer;
    const passes = `${answer.passes} pass${answer.passes === 1 ? "" : "es"} of the network`;
    this.tell(`Answer: ${this.brief(answer)} (${this.place(answer.rollout, answer)}; ${passes})`, answer.valid);
    $("answer").textContent = `${answer.line}\n\n${answer.words}`;
    $("text-box").hidden = false;
    this.told();
  }

  tell(words, valid) {
    const verdict = $("verdict");
    verdict.hidden = false;
    verdict.textContent = words;
    verdict.className = `verdict ${valid === null ? "" : valid ? "good" : "bad"}`;
  }

  place(rollout, state) {
    const name = this.frames[0].rollouts.length > 1 ? `rollout ${rollout + 1}, ` : "";
    const sure = state.q === null ? "" : `, confidence ${sigmoid(state.q).toFixed(3)}`;
    return `${name}step ${state.step}, q ${signed(state.q)}${sure}`;
  }

  /** The answer's card is scrolled to at the end; before it the list is where it was. */
  scroll(ended) {
    const list = $("rollouts");
    if (ended && this.scrolled === null) {
      this.scrolled = list.scrollTop;
      list.scrollTop = this.cards[this.answer.rollout].button.offsetTop - list.offsetTop - 8;
    } else if (!ended && this.scrolled !== null) {
      list.scrollTop = this.scrolled;
      this.scrolled = null;
    }
  }

  /** At once: the newest picture, drawn when the browser draws next. */
  follow() {
    if (!this.playing || this.following || Number($("speed").value) !== 0) return;
    this.following = true;
    requestAnimationFrame(() => {
      if (this.following) this.show(this.last); // unless paused meanwhile
      this.following = false;
    });
  }

  /** Index of the last picture: the answer follows the frames. */
  get last() {
    return Math.max(0, this.frames.length - 1 + (this.answer ? 1 : 0));
  }

  play() {
    clearTimeout(this.timer);
    this.playing = true;
    $("play").textContent = "❚❚";
    $("play").setAttribute("aria-label", "Pause");
    const next = () => {
      const speed = Number($("speed").value);
      if (this.frames.length) {
        const begun = this.drawn ? this.at + 1 : 0;
        if (begun <= this.last) this.show(speed ? begun : this.last);
        else if (this.answer || this.over) { this.pause(); return; }
      }
      this.timer = setTimeout(next, speed ? 1000 / speed : 50);
    };
    this.drawn = false;
    next();
  }

  pause() {
    clearTimeout(this.timer);
    this.playing = false;
    this.following = false;
    $("play").textContent = "▶";
    $("play").setAttribute("aria-label", "Play");
  }

  toggle() {
    if (this.playing) { this.pause(); return; }
    if (this.at < this.last) { const at = this.at; this.play(); this.show(at); } else this.play();
  }

  /** Draw the picture at an index. */
  show(at) {
    if (!this.frames.length) return;
    this.at = at;
    this.drawn = true;
    const ended = Boolean(this.answer) && at >= this.frames.length;
    const frame = this.frames[Math.min(at, this.frames.length - 1)];
    const large = this.shown(frame, ended);
    const state = ended && large === this.answer.rollout ? this.answered : frame.rollouts[large];
    const colours = palette();
    draw($("large"), this.puzzle, state, colours);
    $("large").setAttribute("aria-label", this.spoken(state));
    $("large-caption").textContent = this.caption(large, state, ended && state.passes);
    if (frame.rollouts.length > 1) {
      frame.rollouts.forEach((one, index) => this.showCard(index, one, large, ended, colours));
    }
    $("scrub").value = at;
    $("where").textContent = ended ? "the answer" : `frame ${at + 1} of ${this.frames.length}`;
    const seen = this.frames.slice(0, at + 1);
    const now = { rollout: large, step: state ? state.step : 0 };
    drawCurves($("curve"), seen, this.depth, now, ended ? this.answer : null);
    if (ended) this.reveal();
    this.scroll(ended);
  }

  /** Which rollout is large: the chosen one, the answer's, else that of highest q. */
  shown(frame, ended) {
    if (this.chosen !== null) return this.chosen;
    return ended ? this.answer.rollout : this.best(frame);
  }

  /** The rollout of highest q. */
  best(frame) {
    const running = frame.rollouts.map((state, index) => ({ state, index })).filter((one) => one.state);
    const q = (one) => (one.state.q === null ? -Infinity : one.state.q);
    return running.reduce((best, one) => (q(one) > q(best) ? one : best), running[0] || { index: 0 }).index;
  }

  sureOf(answer) {
    const found = this.frames.map((frame) => frame.rollouts[answer.rollout])
      .find((state) => state && state.step === answer.step);
    return found ? found.sure : null;
  }

  showCard(index, state, large, ended, colours) {
    const card = this.cards[index];
    const answered = ended && index === this.answer.rollout;
    const shown = answered ? this.answered : state;
    card.picture = { shown, colours };
    this.paint(card);
    const { colour, style } = lineOf(index);
    card.key.style.borderTop = `3px ${style} ${colour}`;
    card.button.setAttribute("aria-pressed", String(index === large));
    card.button.classList.toggle("chosen", Boolean(answered));
    card.said.textContent = shown ? `${index + 1}: step ${shown.step}\nq ${signed(shown.q)}` : `${index + 1}: not begun`;
    card.check.textContent = answered ? `the answer\n${this.check(shown)}` : this.check(shown);
    card.check.className = `check ${!shown || shown.valid === null ? "" : shown.valid ? "good" : "bad"}`;
  }

  /** Draw a card's board if it can be seen and is not yet what is drawn. */
  paint(card) {
    if (!card.visible || !card.picture) return;
    const { shown, colours } = card.picture;
    const how = `${card.canvas.clientWidth} ${window.devicePixelRatio} ${colours.card}`;
    if (card.drawn && card.drawn.shown === shown && card.drawn.how === how) return;
    card.drawn = { shown, how };
    draw(card.canvas, this.puzzle, shown, colours);
  }

  check(state) {
    if (!state || state.valid === null) return "";
    if (state.valid) return this.puzzle.kind === "arc" ? "right" : "✓ keeps the rules";
    const count = state.broken.length;
    if (this.puzzle.kind === "arc" || !count) return `✗ ${this.puzzle.kind === "arc" ? "not right" : "not solved"}`;
    return `✗ ${count} cell${count === 1 ? " breaks" : "s break"} rules`;
  }

  caption(index, state, isAnswer) {
    const many = this.frames[0].rollouts.length > 1;
    const name = many ? `Rollout ${index + 1}` : "The board";
    if (!state) return `${name}: not begun`;
    const sure = state.q === null ? "" : `, confidence ${sigmoid(state.q).toFixed(3)}`;
    return `${name} ${isAnswer ? "answers with" : "at"} step ${state.step} of ${this.depth}: q ${signed(state.q)}${sure}; ${this.brief(state)}`;
  }

  /** The rule check in a few words: a Sudoku that breaks every unit would fill the page. */
  brief(state) {
    const count = state.broken.length;
    if (state.words.length < 50 || !count) return state.words;
    return `${count} cell${count === 1 ? " breaks" : "s break"} the rules`;
  }

  spoken(state) {
    if (!state) return "a board that is not begun";
    const side = this.puzzle.side;
    const [height, width] = state.window;
    const rows = [];
    for (let row = 0; row < Math.min(height, 12); row += 1) {
      const cells = state.cells.slice(row * side, row * side + width);
      rows.push(cells.map((token) => this.puzzle.kind === "sudoku" ? (token > 1 ? token - 1 : "blank")
        : this.puzzle.kind === "maze" ? ["nothing", "wall", "open", "start", "goal", "path"][token]
          : token > 1 ? token - 2 : "nothing").join(" "));
    }
    return `Board, row by row: ${rows.join("; ")}`;
  }
}
