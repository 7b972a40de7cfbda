// The fields that say how the model thinks: made from a table, read as the server wants them.

const CHOICES = {
  by: [["", "by itself"], ["symmetry", "symmetry"], ["noise", "noise"], ["init", "random start"]],
  noise_on: [["z_L", "latent state"], ["z_H", "answer state"], ["both", "both"]],
  init: [["fixed", "fixed"], ["random", "random"]],
  entry: [["best-q", "its best step"], ["last", "its last step"]],
  select: [["q", "highest q"], ["mode", "most frequent"], ["residual", "most settled"],
    ["last", "first rollout, last step"], ["first-q", "first above threshold"],
    ["valid", "first that keeps the rules"]],
  halt: [["never", "never"], ["q", "on high q"], ["fixed-point", "once settled"]],
  schedule: [["parallel", "all at once"], ["sequential", "in turn"]],
};
const FIELDS = [
  ["depth", "Depth (steps)", { min: 1, step: 1 }],
  ["rollouts", "Rollouts", { min: 1, step: 1 }],
  ["noise", "Noise", { min: 0, step: 0.05 }],
  ["schedule", "Schedule"],
  ["select", "Answer taken", {}, "both"],
];
const MORE = [
  ["by", "Rollouts differ by"], ["noise_on", "Noise on"], ["init", "Start"],
  ["entry", "Stands for a rollout"], ["halt", "A rollout halts"],
  ["threshold", "q threshold", { step: 0.5, placeholder: "of the model" }],
  ["tolerance", "Settled below", { min: 0, step: 0.005 }],
  ["seed", "Seed", { min: 0, step: 1 }],
];
const HINTS = {
  rollouts: "the same puzzle several times, each seen or begun differently",
  noise: "standard deviation of what is added to the state before every step",
  schedule: "in turn, one after another, needs an answer that is the first good one",
};

function option(value, text) {
  const element = document.createElement("option");
  element.value = value;
  element.textContent = text;
  return element;
}

export class Settings {
  /** @param known what /api/models said */
  constructor(known, fields, more) {
    this.known = known;
    this.inputs = {};
    this.kept = {}; // what is set, by kind of puzzle
    this.preset = document.createElement("select");
    this.preset.id = "preset";
    const label = document.createElement("label");
    label.className = "both";
    label.append("Preset ", this.preset);
    fields.replaceChildren(label, ...FIELDS.map((row) => this.field(...row)));
    more.replaceChildren(...MORE.map((row) => this.field(...row)));
    this.preset.addEventListener("change", () => this.fill(this.base()));
  }

  field(name, words, attributes = {}, place = "") {
    const choices = CHOICES[name];
    const input = document.createElement(choices ? "select" : "input");
    input.id = `set-${name}`;
    if (choices) input.replaceChildren(...choices.map(([value, text]) => option(value, text)));
    else Object.assign(input, { type: "number", ...attributes, step: attributes.step });
    if (this.known.limits[name]) input.max = this.known.limits[name];
    if (HINTS[name]) input.title = HINTS[name];
    this.inputs[name] = input;
    const label = document.createElement("label");
    label.className = place;
    label.append(`${words} `, input);
    return label;
  }

  /** Show what there is for a kind of puzzle, with the depth of its model, as it was left. */
  open(kind, depth) {
    if (this.kind) {
      const fields = Object.entries(this.inputs).map(([name, input]) => [name, input.value]);
      this.kept[this.kind] = { preset: this.preset.value, depth: this.depth, fields };
    }
    const before = this.kept[kind];
    this.kind = kind;
    this.depth = depth;
    const names = Object.keys(this.known.presets).filter((name) => kind in this.known.presets[name]);
    this.preset.replaceChildren(option("", "none"), ...names.map((name) => option(name, name)));
    if (!before) { this.fill(this.base()); return; }
    this.preset.value = before.preset;
    for (const [name, value] of before.fields) {
      const own = name === "depth" && value === String(before.depth); // that of the model before
      this.inputs[name].value = own ? String(depth) : value;
    }
  }

  base() {
    const own = { ...this.known.defaults, rollouts: this.kind === "arc" ? 1 : 4 };
    const chosen = this.known.presets[this.preset.value];
    return chosen ? chosen[this.kind] : own;
  }

  fill(values) {
    for (const [name, input] of Object.entries(this.inputs)) {
      const value = name === "depth" ? values.depth ?? this.depth : values[name];
      input.value = value === null || value === undefined ? "" : String(value);
    }
  }

  /** What is sent: numbers as numbers, what is left empty as the model's own. */
  values() {
    const read = {};
    for (const [name, input] of Object.entries(this.inputs)) {
      const number = !CHOICES[name];
      if (input.value === "") {
        if (number && input.validity.badInput) throw new Error(`${name} is no number`);
        if (name === "by" || name === "threshold" || name === "depth") read[name] = null;
      } else {
        read[name] = number ? Number(input.value) : input.value;
      }
    }
    return read;
  }
}
