// Boards on a canvas: cells, how sure the model is of each, and those that break a rule.

const ARC = ["#000000", "#1e93ff", "#f93c31", "#4fcc30", "#ffdc00", "#999999", "#e53aa3",
  "#ff851b", "#87d8f1", "#921231"];
const WALL = 1, OPEN = 2, START = 3, GOAL = 4, PATH = 5;

/** The colours of the page as it is now, light or dark. */
export function palette() {
  const style = getComputedStyle(document.documentElement);
  const name = (key) => style.getPropertyValue(`--${key}`).trim();
  return Object.fromEntries(["card", "ink", "faint", "rule", "box", "given", "unsure", "sure",
    "broken", "broken-ink", "mark", "wall", "path"].map((key) => [key, name(key)]));
}

function channels(colour) {
  return [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
}

function mixed(from, to, share) {
  const [a, b] = [channels(from), channels(to)];
  return `rgb(${a.map((value, i) => Math.round(value + (b[i] - value) * share)).join(",")})`;
}

/** Whether a cell is the puzzle's own. */
export function isGiven(puzzle, index) {
  const token = puzzle.cells[index];
  if (puzzle.kind === "sudoku") return token > 1;
  return puzzle.kind === "maze" && token !== OPEN;
}

/**
 * Draw a board.
 * @param canvas its width in CSS pixels decides the size of a cell
 * @param puzzle what /api/puzzle said
 * @param state {cells, sure, broken, window}, or null for the puzzle as it is asked
 */
export function draw(canvas, puzzle, state, colours) {
  const [rows, columns] = (state || puzzle).window;
  const scale = window.devicePixelRatio || 1;
  // As many pixels as there are on the screen: a picture that is scaled is blurred.
  const width = Math.round((canvas.getBoundingClientRect().width || 300) * scale);
  const cell = Math.max(1, (width - 4) / columns);
  const edge = (number) => 2 + Math.round(number * cell);
  const size = [edge(columns) + 2, edge(rows) + 2];
  if (canvas.width !== size[0]) canvas.width = size[0]; // even the same width is a new layout
  if (canvas.height !== size[1]) canvas.height = size[1];
  const pen = canvas.getContext("2d");
  pen.fillStyle = colours.card;
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  const broken = new Set(state ? state.broken : []);
  for (let row = 0; row < rows; row += 1) {
    for (let column = 0; column < columns; column += 1) {
      const index = row * puzzle.side + column;
      const one = {
        token: (state || puzzle).cells[index],
        sure: state && state.sure ? state.sure[index] / 100 : 1,
        given: isGiven(puzzle, index),
        broken: broken.has(index),
        told: Boolean(state),
      };
      const [x, y] = [edge(column), edge(row)];
      drawCell(pen, puzzle.kind, one, { x, y, width: edge(column + 1) - x, height: edge(row + 1) - y }, colours);
    }
  }
  if (puzzle.kind === "sudoku") drawLines(pen, puzzle, edge, colours, scale);
  pen.strokeStyle = colours.box;
  pen.lineWidth = 2;
  pen.strokeRect(1, 1, canvas.width - 2, canvas.height - 2);
}

function drawCell(pen, kind, one, place, colours) {
  const { x, y, width, height } = place;
  pen.fillStyle = ground(kind, one, colours);
  pen.fillRect(x, y, width, height);
  const ink = one.broken ? colours["broken-ink"] : colours.ink;
  if (kind === "sudoku" && one.token > 1) {
    letter(pen, String(one.token - 1), place, ink, one.given);
  } else if (kind === "maze" && (one.token === START || one.token === GOAL)) {
    letter(pen, one.token === START ? "S" : "G", place, ink, true);
  } else if (kind === "maze" && one.token === PATH) {
    pen.fillStyle = one.broken ? colours.mark : colours.path;
    pen.beginPath();
    pen.arc(x + width / 2, y + height / 2, width * 0.24, 0, 2 * Math.PI);
    pen.fill();
  } else if (kind === "arc") {
    pen.strokeStyle = colours.rule;
    pen.lineWidth = 1;
    if (width >= 5 && one.token > 1) pen.strokeRect(x + 0.5, y + 0.5, width, height);
  }
  if (one.broken && (width >= 10 || kind === "arc")) corner(pen, kind, x, y, width, colours);
}

/** The mark of a wrong cell. The ground of ARC is of any colour: there it has a rim. */
function corner(pen, kind, x, y, cell, colours) {
  const length = cell * (kind === "arc" ? 0.5 : 0.3);
  pen.fillStyle = kind === "arc" ? "#ffffff" : colours.mark;
  pen.beginPath();
  pen.moveTo(x, y);
  pen.lineTo(x + length, y);
  pen.lineTo(x, y + length);
  pen.closePath();
  pen.fill();
  if (kind !== "arc" || cell < 6) return;
  pen.strokeStyle = "#b42318";
  pen.lineWidth = Math.max(1, cell / 14);
  pen.stroke();
}

function ground(kind, one, colours) {
  if (kind === "arc") return ARC[one.token - 2] || colours.card;
  if (one.broken) return colours.broken;
  if (kind === "maze" && one.token === WALL) return colours.wall;
  if (one.given) return colours.given;
  const told = one.told && (kind === "sudoku" || one.token === PATH);
  return told ? mixed(colours.unsure, colours.sure, Math.min(1, Math.max(0, one.sure))) : colours.card;
}

function letter(pen, text, { x, y, width, height }, ink, bold) {
  pen.fillStyle = ink;
  pen.font = `${bold ? "700 " : ""}${Math.round(height * 0.62)}px system-ui, sans-serif`;
  pen.fillText(text, x + width / 2, y + height * 0.54);
}

function drawLines(pen, puzzle, edge, colours, scale) {
  const [boxRows, boxColumns] = puzzle.box;
  const end = edge(puzzle.side);
  for (const heavy of [false, true]) {
    pen.strokeStyle = heavy ? colours.box : colours.rule;
    pen.lineWidth = heavy ? Math.round(1.5 * scale) : 1;
    const middle = (pen.lineWidth % 2) / 2; // whole pixels, none of them half covered
    pen.beginPath();
    for (let number = 1; number < puzzle.side; number += 1) {
      const at = edge(number) + middle;
      if ((number % boxColumns === 0) === heavy) { pen.moveTo(at, 2); pen.lineTo(at, end); }
      if ((number % boxRows === 0) === heavy) { pen.moveTo(2, at); pen.lineTo(end, at); }
    }
    pen.stroke();
  }
}
