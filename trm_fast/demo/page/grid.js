// The grid one types a Sudoku into: one tab stop, arrow keys between cells.

export class Grid {
  /** @param pasted called with a text of more than a cell that was pasted into one */
  constructor(element, pasted, changed) {
    this.element = element;
    this.pasted = pasted;
    this.changed = changed;
    this.side = 0;
    this.cells = [];
    element.addEventListener("keydown", (event) => this.key(event));
    element.addEventListener("input", (event) => this.typed(event.target));
    element.addEventListener("focusin", (event) => this.entered(event.target));
    element.addEventListener("paste", (event) => this.paste(event));
  }

  /** Make it of side x side cells with boxes of [rows, columns]. */
  build(side, box) {
    if (this.side === side) return;
    this.side = side;
    this.box = box;
    this.element.style.gridTemplateColumns = `repeat(${side}, 1fr)`;
    this.cells = Array.from({ length: side * side }, (_, index) => {
      const input = document.createElement("input");
      const row = Math.floor(index / side), column = index % side;
      input.inputMode = "numeric";
      input.autocomplete = "off";
      input.maxLength = 2;
      input.tabIndex = index ? -1 : 0;
      input.setAttribute("aria-label", `row ${row + 1} column ${column + 1}`);
      input.classList.toggle("box-right", (column + 1) % box[1] === 0);
      input.classList.toggle("box-below", (row + 1) % box[0] === 0);
      input.classList.toggle("last-column", column === side - 1);
      input.classList.toggle("last-row", row === side - 1);
      return input;
    });
    this.element.replaceChildren(...this.cells);
  }

  /** The board on one line, blanks as dots. */
  get line() {
    return this.cells.map((cell) => cell.value || ".").join("");
  }

  set line(text) {
    this.cells.forEach((cell, index) => {
      cell.value = /[1-9]/.test(text[index] || "") ? text[index] : "";
    });
    this.show();
  }

  /** Colour what is filled, and mark digits that stand twice. */
  show() {
    const seen = new Map();
    this.cells.forEach((cell, index) => {
      if (!cell.value) return;
      const row = Math.floor(index / this.side), column = index % this.side;
      const box = `${Math.floor(row / this.box[0])}/${Math.floor(column / this.box[1])}`;
      for (const unit of [`r${row}`, `c${column}`, `b${box}`]) {
        const key = `${unit}:${cell.value}`;
        seen.set(key, [...(seen.get(key) || []), index]);
      }
    });
    const clashing = new Set([...seen.values()].filter((cells) => cells.length > 1).flat());
    this.cells.forEach((cell, index) => {
      cell.classList.toggle("filled", cell.value !== "");
      cell.classList.toggle("clash", clashing.has(index));
      cell.setAttribute("aria-invalid", String(clashing.has(index)));
    });
  }

  go(index) {
    const cell = this.cells[Math.max(0, Math.min(this.cells.length - 1, index))];
    cell.focus();
    cell.select();
  }

  entered(target) {
    for (const cell of this.cells) cell.tabIndex = cell === target ? 0 : -1;
  }

  key(event) {
    const index = this.cells.indexOf(event.target);
    if (index < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const row = Math.floor(index / this.side);
    const steps = {
      ArrowLeft: index - 1, ArrowRight: index + 1, ArrowUp: index - this.side,
      ArrowDown: index + this.side, Home: row * this.side, End: (row + 1) * this.side - 1,
    };
    if (event.key in steps) {
      event.preventDefault();
      if (steps[event.key] >= 0 && steps[event.key] < this.cells.length) this.go(steps[event.key]);
    } else if (event.key === "Backspace" && !event.target.value) {
      event.preventDefault();
      this.go(index - 1);
    } else if ([" ", "0", "."].includes(event.key)) {
      event.preventDefault();
      event.target.value = "";
      this.show();
      this.changed();
      this.go(index + 1);
    }
  }

  typed(cell) {
    const digit = cell.value.slice(-1);
    const allowed = /^[1-9]$/.test(digit) && Number(digit) <= this.side;
    cell.value = allowed ? digit : "";
    this.show();
    this.changed();
    if (allowed) this.go(this.cells.indexOf(cell) + 1);
  }

  paste(event) {
    const text = event.clipboardData.getData("text");
    if (text.trim().length > 1) {
      event.preventDefault();
      this.pasted(text);
    }
  }
}
