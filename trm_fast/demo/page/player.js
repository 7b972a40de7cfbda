// Frames as they come and afterwards: played, scrubbed, drawn.

import { draw, palette } from "./board.js";
import { drawCurves, lineOf } from "./chart.js";

const $ = (id) => document.getElementById(id);
const sigmoid = (q) => 1 / (1 + Math.exp(-q));
const signed = (q) => (q === null ? "none" : `${q >= 0 ? "+" : "−"}${Math.abs(q).toFixed(2)}`);

export class Player {
  constructor() {
    this.frames = [];
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
    this.pause();
    Object.assign(this, { puzzle, depth, frames: [], at: 0, answer: null, chosen: null, over: false, scrolled: null });
    this.watcher.disconnect();
    this.cards = Array.from({ length: rollouts }, (_, index) => this.card(index));
    $("rollouts").replaceChildren(...this.cards.map((card) => card.button));
    $("rollouts").scrollTop = 0;
    for (const card of this.cards) this.watcher.observe(card.button);
    $("boards").classList.toggle("single", rollouts === 1);
    $("rollouts").hidden = rollouts === 1;
    $("rollouts").classList.toggle("few", rollouts <= 4);
    $("intro").hidden = true;
    for (const id of ["player", "boards", "curve-box"]) $(id).hidden = false;
    const arc = puzzle.kind === "arc";
    $("legend").hidden = arc && !puzzle.solution;
    $("legend").classList.toggle("arc", arc);
    $("broken-words").textContent = arc ? "unlike the solution" : "breaks a rule";
    $("verdict").hidden = true;
    $("text-box").hidden = true;
    $("scrub").max = 0;
    this.play();
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

  /** No more frames and no answer will come: stopped, or a fault. */
  end() {
    this.over = true;
    if (this.at >= this.last) this.pause();
  }

  /** The end: {cells, q, step, rollout, valid, words, ...}; an answer is one more frame. */
  finish(answer) {
    this.answer = answer;
    this.answered = { ...answer, sure: this.sureOf(answer) };
    $("scrub").max = this.last;
    this.follow();
  }

  /** Say what the answer is, once the picture of it is reached. */
  reveal() {
    if (!$("verdict").hidden) return;
    const answer = this.answer;
    const rollout = this.frames[0].rollouts.length > 1 ? `rollout ${answer.rollout + 1}, ` : "";
    const sure = answer.q === null ? "" : `, confidence ${sigmoid(answer.q).toFixed(3)}`;
    const passes = `${answer.passes} pass${answer.passes === 1 ? "" : "es"} of the network`;
    const verdict = $("verdict");
    verdict.hidden = false;
    verdict.textContent = `Answer: ${this.brief(answer)} (${rollout}step ${answer.step}, q ${signed(answer.q)}${sure}; ${passes})`;
    verdict.className = `verdict ${answer.valid === null ? "" : answer.valid ? "good" : "bad"}`;
    $("answer").textContent = `${answer.line}\n\n${answer.words}`;
    $("text-box").hidden = false;
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
    if (this.following || Number($("speed").value) !== 0) return;
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
    if (ended) return this.answer.rollout;
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
