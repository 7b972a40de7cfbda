// q over the steps: a line per rollout, where we are now, and the answer.

const SPACE = "http://www.w3.org/2000/svg";
const LINES = {
  light: ["#116329", "#0b63ce", "#b54708", "#7a2fe0", "#b0246d", "#0f766e", "#6b5900", "#57606a"],
  dark: ["#6fdc8c", "#6cb2ff", "#ffb066", "#c4a1ff", "#ff8ec7", "#5eead4", "#e3c94d", "#a3adb8"],
};
const DASHES = { solid: "none", dashed: "7 4", dotted: "2 3" };
const BOX = { left: 44, right: 14, top: 10, bottom: 24, height: 170 };

function shape(name, attributes, text) {
  const element = document.createElementNS(SPACE, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** How a rollout's line is drawn: {colour, style}, after eight colours the dashes differ. */
export function lineOf(index) {
  const dark = window.matchMedia("(prefers-color-scheme: dark)").matches;
  const colours = LINES[dark ? "dark" : "light"];
  const round = Math.floor(index / colours.length);
  return { colour: colours[index % colours.length], style: ["solid", "dashed", "dotted"][round % 3] };
}

/** Per rollout [[step, q], ...] of the frames; steps without a number are left out. */
export function curvesOf(frames) {
  const curves = [];
  for (const frame of frames) {
    frame.rollouts.forEach((state, index) => {
      curves[index] = curves[index] || new Map();
      if (state && state.q !== null && !curves[index].has(state.step)) {
        curves[index].set(state.step, state.q);
      }
    });
  }
  return curves.map((curve) => [...curve].sort((a, b) => a[0] - b[0]));
}

/**
 * Draw the curves.
 * @param now {rollout, step} of the board that is shown large
 * @param answer {step, q} or null
 */
export function drawCurves(svg, frames, depth, now, answer) {
  const width = svg.clientWidth || 600;
  svg.setAttribute("viewBox", `0 0 ${width} ${BOX.height}`);
  const curves = curvesOf(frames);
  const values = curves.flat().map((point) => point[1]);
  const low = Math.min(0, ...values), high = Math.max(0.5, ...values);
  const x = (step) => BOX.left + (depth > 1 ? (step - 1) / (depth - 1) : 0.5)
    * (width - BOX.left - BOX.right);
  const y = (q) => BOX.height - BOX.bottom - (q - low) / (high - low)
    * (BOX.height - BOX.top - BOX.bottom);
  const parts = [];
  for (const q of new Set([low, 0, high])) {
    const at = y(q);
    parts.push(shape("line", { x1: BOX.left, x2: width - BOX.right, y1: at, y2: at, class: q === 0 ? "zero" : "axis" }));
    const near = q !== 0 && Math.abs(at - y(0)) < 12;
    if (!near) parts.push(shape("text", { x: BOX.left - 10, y: at + 4, "text-anchor": "end" }, q.toFixed(q ? 1 : 0)));
  }
  parts.push(shape("text", { x: BOX.left, y: BOX.height - 6 }, "step 1"));
  parts.push(shape("text", { x: width - BOX.right, y: BOX.height - 6, "text-anchor": "end" }, `step ${depth}`));
  const order = curves.map((_, index) => index).filter((index) => index !== now.rollout);
  for (const index of [...order, now.rollout]) {
    const curve = curves[index] || [];
    const own = index === now.rollout;
    const points = curve.map(([step, q]) => `${x(step)},${y(q)}`).join(" ");
    const { colour, style } = lineOf(index);
    if (curve.length === 1) {
      parts.push(shape("circle", { cx: x(curve[0][0]), cy: y(curve[0][1]), r: own ? 3.5 : 2, fill: colour }));
    } else if (curve.length) {
      parts.push(shape("polyline", { points, fill: "none", stroke: colour, "stroke-width": own ? 3 : 1.4, "stroke-opacity": own ? 1 : 0.65, "stroke-dasharray": DASHES[style] }));
    }
  }
  if (now.step) {
    parts.push(shape("line", { x1: x(now.step), x2: x(now.step), y1: BOX.top, y2: BOX.height - BOX.bottom, class: "cursor" }));
  }
  if (answer && answer.q !== null) {
    parts.push(shape("circle", { cx: x(answer.step), cy: y(Math.min(high, Math.max(low, answer.q))), r: 5, class: "dot" }));
  }
  svg.replaceChildren(...parts);
  const last = values.length ? `q from ${low.toFixed(1)} to ${high.toFixed(1)}` : "no step yet";
  svg.setAttribute("aria-label", `q over ${depth} steps of ${curves.length} rollouts: ${last}`);
}
