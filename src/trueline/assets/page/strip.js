// A traced answer: its tokens, how far the method moved each, and what it chose among.
// Takes the rows of a trace (see trueline.engine.trace); writes text only through textContent.

const LEVELS = [0.05, 0.25, 1, 3]; // nats; the marks of a token follow these
const SVG = "http://www.w3.org/2000/svg";
const MOVED = [
  "hardly moved", "moved a little", "moved", "moved far", "moved very far",
];

export function make(tag, { text, ...rest } = {}, ...children) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  for (const [name, value] of Object.entries(rest)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

export function draw(tag, attributes = {}, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

export function number(value) {
  return typeof value === "number" ? value : value === "inf" ? Infinity : Number(value);
}

/** KL of what a token was drawn from, from one prompt alone; from the last where there are fewer. */
export function distance(token, against = 0) {
  return number((token.branches[against] ?? token.branches.at(-1))?.kl ?? 0);
}

export function level(token, against = 0) {
  const kl = distance(token, against);
  return LEVELS.filter((limit) => kl >= limit).length;
}

/** Whether that prompt alone, decoding greedily, would have taken another token. */
export function other(token, against = 0) {
  const branch = token.branches[against] ?? token.branches.at(-1);
  return branch !== undefined && branch.alternatives[0]?.token_id !== token.token_id;
}

const percent = (p) => (p > 0 && p < 0.001 ? "< 0.1 %" : `${(100 * p).toFixed(p < 0.1 ? 1 : 0)} %`);
const nats = (kl) => (Number.isFinite(kl) ? kl.toFixed(2) : "∞");
const visible = (text) => text.replace(/\n/g, "⏎").replace(/^ | $/g, "␣") || "∅";

/** The marks of a token in words, for those who do not see colours. */
export function describe(token, against = 0) {
  const flip = other(token, against) ? ", not what that prompt alone would say" : "";
  const shut = token.gate === 0 ? ", left alone by the gate" : "";
  return `${visible(token.token)}: ${MOVED[level(token, against)]} (${nats(distance(token, against))} nats)${flip}${shut}`;
}

export class Strip {
  /** names: what each branch is called; force(position, alternative): go on from another token. */
  constructor(root, { names = [], force = null, changed = () => {} } = {}) {
    Object.assign(this, { root, names, force, changed, tokens: [], chosen: null, wanted: null, against: 0, prefix: "" });
    this.line = make("p", { class: "tokens", "aria-label": "Tokens of the aligned answer" });
    this.chart = make("div", { class: "chart", tabindex: "0", role: "group", "aria-label": "How far each token was moved, as bars" });
    this.detail = make("div", { class: "detail", "aria-live": "polite" });
    this.select = make("select", { onchange: () => { this.compare(Number(this.select.value)); this.changed(); } });
    this.against_field = make("label", { class: "against" }, "Marks: how far each token was moved away from the prompt ", this.select);
    root.replaceChildren(this.against_field, this.line, legend(), this.chart, this.detail);
    this.line.addEventListener("keydown", (event) => this.onKey(event));
  }

  /** Name the prompts; the last one is compared with until somebody chooses. */
  name(names) {
    if (names.join() === this.names.join()) return;
    this.names = names;
    this.against = Math.max(0, names.length - 1);
    this.select.replaceChildren(...names.map((text, i) => make("option", { value: i, text: text.toLowerCase(), selected: i === this.against })));
    this.against_field.hidden = names.length < 2;
  }

  /** What is looked at: the prompt compared with, and the token that is chosen. */
  state() {
    const found = this.against === Math.max(0, this.names.length - 1) ? {} : { against: this.against };
    return this.chosen === null ? found : { ...found, token: this.chosen };
  }

  recall(state) {
    const against = Number(state.get("against") ?? this.names.length - 1);
    this.against = Math.min(Math.max(0, against), Math.max(0, this.names.length - 1));
    this.select.value = this.against;
    this.wanted = state.has("token") ? Number(state.get("token")) : null;
  }

  compare(against) {
    const tokens = this.tokens;
    this.against = against;
    this.clear(this.prefix);
    for (const token of tokens) this.add(token);
    this.finish();
  }

  clear(prefix = "") {
    this.tokens = [];
    this.chosen = null;
    this.prefix = prefix;
    this.line.replaceChildren();
    if (prefix) this.line.append(make("span", { class: "token forced", text: prefix }));
    this.detail.replaceChildren();
    this.chart.replaceChildren();
  }

  add(token) {
    const index = this.tokens.push(token) - 1;
    if (token.text === "" && token.token.startsWith("<")) return;
    const choose = () => this.choose(index);
    const about = describe(token, this.against);
    this.line.append(make("span", {
      role: "button", class: `token heat-${level(token, this.against)}${other(token, this.against) ? " other" : ""}${token.gate === 0 ? " shut" : ""}`,
      text: token.text || visible(token.token), title: about, "aria-label": about,
      "aria-pressed": "false", "data-index": index, tabindex: index ? "-1" : "0",
      onclick: choose, onmouseenter: choose, onfocus: choose,
    }));
  }

  finish() {
    this.chart.replaceChildren(this.picture());
    if (this.tokens[this.wanted]) this.choose(this.wanted);
    this.wanted = null;
  }

  onKey(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const all = [...this.line.querySelectorAll("[data-index]")];
    const next = all[all.indexOf(document.activeElement) + step];
    if (next) {
      next.focus();
      event.preventDefault();
    }
  }

  choose(index) {
    if (this.chosen === index) return;
    this.chosen = index;
    for (const button of this.line.querySelectorAll("[data-index]")) {
      const own = Number(button.dataset.index) === index;
      button.setAttribute("aria-pressed", own);
      button.tabIndex = own ? 0 : -1;
    }
    for (const bar of this.chart.querySelectorAll(".bar")) {
      bar.classList.toggle("chosen", Number(bar.dataset.index) === index);
    }
    this.detail.replaceChildren(...this.explain(index));
    clearTimeout(this.timer);
    this.timer = setTimeout(this.changed, 300); // browsers bound how often an address may change
  }

  explain(index) {
    const token = this.tokens[index];
    const lists = [
      ["Drawn from", token.alternatives, null],
      ...token.branches.map((b) => [this.names[b.branch] ?? `Prompt ${b.branch + 1}`, b.alternatives, b]),
    ];
    const tables = lists.map(([name, list, branch]) => make("div", {},
      make("h3", { text: branch ? `${name} · ${nats(number(branch.kl))} nats away` : name }),
      this.table(index, list, name)));
    const notes = [`Token ${index + 1}: ${describe(token, this.against)}.`];
    const gate = token.gate ?? null;
    if (gate !== null) notes.push(`The gate let ${percent(gate)} of the step through.`);
    const out = [...new Set(token.branches.flatMap((b) => b.alternatives).filter((a) => a.combined === 0).map((a) => visible(a.token)))];
    if (out.length) notes.push(`Left out by the mask: ${out.join("  ")}`);
    return [...notes.map((text) => make("p", { class: "note", text })), make("div", { class: "tables" }, ...tables)];
  }

  table(index, list, name) {
    const token = this.tokens[index];
    const rows = list.map((a) => {
      const chosen = a.token_id === token.token_id;
      const text = visible(a.token);
      const left = a.combined === 0 ? " (left out)" : "";
      const cell = this.force
        ? make("button", { type: "button", text, title: "Go on from this token",
          "aria-label": `Go on from ${text}`, onclick: () => this.force(index, a) })
        : make("span", { text });
      return make("tr", { class: chosen ? "chosen" : undefined },
        make("td", {}, cell, left, chosen ? " ✓" : ""),
        make("td", { class: "number", text: percent(a.probability) }));
    });
    return make("table", { "aria-label": `Likeliest tokens: ${name}` },
      make("thead", {}, make("tr", {}, make("th", { scope: "col", text: "Token" }),
        make("th", { scope: "col", text: "Probability" }))),
      make("tbody", {}, ...rows));
  }

  /** Bars of KL, one a token, with the tokens below. */
  picture() {
    const kls = this.tokens.map((t) => Math.min(distance(t, this.against), 20));
    const step = 16, width = Math.max(320, kls.length * step + 60), height = 170;
    const top = Math.max(1, ...kls);
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img",
      "font-family": "system-ui, sans-serif",
      "aria-label": `How far each of ${kls.length} tokens was moved, in nats; at most ${top.toFixed(1)}` });
    svg.append(draw("line", { class: "axis", x1: 44, x2: width, y1: 90, y2: 90, stroke: "#888" }));
    svg.append(draw("text", { x: 0, y: 18, "font-size": 12, fill: "#777" }, `${top.toFixed(1)}`));
    svg.append(draw("text", { x: 0, y: 94, "font-size": 12, fill: "#777" }, "0 nats"));
    kls.forEach((kl, i) => {
      const size = (80 * kl) / top, x = 48 + i * step, token = this.tokens[i];
      const bar = draw("rect", { class: "bar", x, y: 90 - size, width: 12,
        height: Math.max(size, 0.5), fill: "#d97706", "data-index": i });
      bar.append(draw("title", {}, describe(token, this.against)));
      bar.addEventListener("click", () => this.choose(i));
      const text = visible(token.token);
      svg.append(bar, draw("text", { x: 0, y: 0, "font-size": 11, fill: "#777",
        "font-weight": other(token, this.against) ? "bold" : "normal",
        transform: `translate(${x + 9} 98) rotate(90)` }, text.length > 11 ? `${text.slice(0, 10)}…` : text));
    });
    return svg;
  }
}

function legend() {
  const marks = MOVED.map((text, i) => make("span", { class: `token heat-${i}`, text }));
  return make("p", { class: "legend" }, ...marks,
    make("span", { class: "token other", text: "bold: that prompt alone would say something else" }),
    make("span", { class: "token shut", text: "dashed: left alone by the gate" }));
}
