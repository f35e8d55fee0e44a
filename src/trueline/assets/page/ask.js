// Asking: what the form holds, three answers side by side, and the aligned one token by token.

import { chat, get } from "./api.js";
import { Strip, make, other } from "./strip.js";

const el = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "seed", "max_tokens"];
const TEXTS = ["message", "principle", "system", "model", "method"];
const PAUSE = 250; // ms from the last touch of a slider to asking again

export class Asking {
  /** about: what page/methods.json says; remember(): called when the address is to hold the state. */
  constructor(about, remember) {
    this.about = about;
    this.remember = remember;
    this.turns = []; // earlier messages of the chat
    this.forced = ""; // how the answer begins, if a token was forced
    this.running = null; // AbortController of what is under way
    this.strip = new Strip(el("strip"), {
      force: (index, alternative) => this.force(index, alternative), changed: remember,
    });
    el("method").replaceChildren(...about.methods.map((m) => make("option", { value: m.name, text: m.name })));
    el("method").value = about.default;
    this.limit();
    el("form").addEventListener("submit", (event) => { event.preventDefault(); this.forced = ""; this.ask(); });
    el("message").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) el("form").requestSubmit();
    });
    el("method").addEventListener("change", () => { this.showFields(); this.soon(); });
    el("model").addEventListener("change", () => this.soon());
    el("key").addEventListener("change", () => this.fillModels().catch(showError));
    el("stop").addEventListener("click", () => this.running?.abort());
    el("again").addEventListener("click", () => this.goOn());
    el("fresh").addEventListener("click", () => {
      Object.assign(this, { turns: [], forced: "" });
      this.showTurns();
      remember();
    });
  }

  get method() { return this.about.methods.find((m) => m.name === el("method").value); }

  /** What clients may choose: anything, settings, presets or nothing. */
  get free() { return this.about.allowed === "anything"; }

  limit() {
    for (const node of document.querySelectorAll(".alone")) node.hidden = !this.free;
    el("method").disabled = !this.free;
    el("fixed").hidden = this.free;
    el("fixed").textContent = `This server's method is fixed: ${this.about.default}.` +
      (this.about.allowed === "settings" ? " Its settings may be changed." : "");
  }

  async fillModels() {
    const { data } = await get("v1/models", el("key").value);
    const chosen = el("model").value;
    el("model").replaceChildren(...data.map((m) => make("option", { value: m.id, text: m.id, selected: m.id === chosen })));
  }

  fields() {
    const values = { method: this.method.name };
    for (const field of this.method.fields) {
      const input = el(field.name === "principle" ? "principle" : `field-${field.name}`);
      const value = input?.value.trim();
      if (value) values[field.name] = field.kind === "text" ? input.value : Number(value);
    }
    return values;
  }

  /** The alignment of a request; none where the model is a preset, or the server says what it is. */
  alignment() {
    const preset = el("model").value.includes(":");
    return preset || !["anything", "settings"].includes(this.about.allowed) ? undefined : this.fields();
  }

  body(alignment, trace = false, begun = "") {
    const numbers = Object.fromEntries(NUMBERS.map((name) => [name, Number(el(name).value)]));
    const system = el("system").value.trim();
    const messages = [
      ...(system ? [{ role: "system", content: system }] : []),
      ...this.turns,
      { role: "user", content: el("message").value },
      ...(begun ? [{ role: "assistant", content: begun }] : []),
    ];
    return { model: el("model").value, messages, ...numbers, alignment, trace };
  }

  async ask() {
    this.running?.abort();
    const own = this.running = new AbortController();
    const about = this.method;
    el("error").hidden = true;
    el("stop").disabled = false;
    el("status").textContent = "Answering …";
    for (const id of ["plain", "prompt"]) el(id).textContent = "";
    this.strip.name(about.branches);
    this.strip.clear(this.forced);
    this.remember();
    const into = (id) => (choice) => { el(id).textContent += choice.delta.content ?? ""; };
    const settings = this.fields();
    const text = settings.principle ?? Object.entries(settings).find(([name]) => name.endsWith("prompt"))?.[1];
    const asked = [stream(this.body(this.alignment(), true, this.forced), (choice) => {
      for (const token of choice.trace ?? []) this.strip.add(token);
    }, own.signal)];
    if (this.free) asked.push(stream(this.body({ method: "plain" }), into("plain"), own.signal));
    if (this.free && text) asked.push(stream(this.body({ method: "plain", principle: text }), into("prompt"), own.signal));
    const ended = await Promise.allSettled(asked);
    if (this.running !== own) return;
    this.running = null;
    this.strip.finish();
    el("stop").disabled = true;
    el("status").textContent = summary(this.strip);
    const wrong = ended.map((e) => e.reason).find((e) => e && e.name !== "AbortError");
    if (wrong) showError(wrong);
  }

  /** Go on from another token: what came before it, and it, begin the answer. */
  force(index, alternative) {
    const before = this.strip.tokens.slice(0, index).map((t) => t.text).join("");
    this.forced += before + alternative.token;
    this.strip.chosen = null;
    this.ask();
  }

  soon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.ask(), PAUSE);
  }

  showFields(values = {}) {
    const own = this.method;
    const inputs = own.fields.filter((f) => f.name !== "principle").map((field) => this.input(field, values));
    el("settings").replaceChildren(...inputs);
    el("settings").hidden = !["anything", "settings"].includes(this.about.allowed);
    el("principle-field").hidden = el("settings").hidden || !own.fields.some((f) => f.name === "principle");
    el("what").textContent = own.about;
  }

  input(field, values) {
    const id = `field-${field.name}`, name = field.name.replaceAll("_", " ");
    const value = values[field.name] ?? field.default ?? "";
    if (field.kind === "text") {
      const area = make("textarea", { id, rows: 2, text: value, onchange: () => this.soon() });
      return make("label", { class: "wide", title: field.doc }, name, area);
    }
    const shared = { id, min: field.low, max: field.high, step: field.step, value, title: field.doc };
    if (field.kind === "number") {
      const box = make("input", { ...shared, type: "number", max: undefined, placeholder: "none", onchange: () => this.soon() });
      return make("label", { title: field.doc }, name, box);
    }
    const output = make("output", { text: String(value), for: id });
    const slider = make("input", { ...shared, type: "range",
      oninput: () => { output.textContent = slider.value; this.soon(); } });
    return make("label", { title: field.doc }, make("span", {}, `${name} `, output), slider);
  }

  /** Everything that repeats what is shown, as text by name. */
  state() {
    const found = {};
    for (const id of [...TEXTS, ...NUMBERS]) if (el(id).value !== "") found[id] = el(id).value;
    for (const input of el("settings").querySelectorAll("input, textarea")) found[input.id] = input.value;
    if (this.forced) found.forced = this.forced;
    if (this.turns.length) found.turns = JSON.stringify(this.turns);
    return { ...found, ...this.strip.state() };
  }

  /** Take up a state; whether there was a message in it. */
  recall(state) {
    for (const id of [...TEXTS, ...NUMBERS]) if (state.has(id)) el(id).value = state.get(id);
    if (!this.method || !this.free) el("method").value = this.about.default;
    if (!el("model").value) el("model").selectedIndex = 0;
    const values = {};
    for (const [name, value] of state) if (name.startsWith("field-")) values[name.slice(6)] = value;
    this.showFields(values);
    this.forced = state.get("forced") ?? "";
    try {
      const found = JSON.parse(state.get("turns") ?? "[]");
      this.turns = Array.isArray(found) ? found.filter((m) => typeof m?.content === "string") : [];
    } catch { this.turns = []; }
    this.showTurns();
    this.strip.name(this.method.branches);
    this.strip.recall(state);
    return state.has("message");
  }

  showTurns() {
    el("history").hidden = !this.turns.length;
    el("history").replaceChildren(...this.turns.map((m) => make("li", { text: `${m.role}: ${m.content}` })));
  }

  answer() { return this.forced + this.strip.tokens.map((t) => t.text).join(""); }

  goOn() {
    if (!this.strip.tokens.length) return;
    this.turns = [...this.turns, { role: "user", content: el("message").value }, { role: "assistant", content: this.answer() }];
    this.forced = "";
    this.showTurns();
    el("message").value = "";
    el("message").focus();
  }

  trace() {
    return { asked: this.body(this.alignment()), answer: this.answer(), tokens: this.strip.tokens };
  }
}

async function stream(request, onChunk, signal) {
  for await (const chunk of chat(request, el("key").value, signal)) {
    if (chunk.choices.length) onChunk(chunk.choices[0]);
  }
}

/** What the method changed, in one line. */
export function summary(strip) {
  const counts = strip.names.map((name, i) =>
    `${strip.tokens.filter((t) => other(t, i)).length} unlike ${name.toLowerCase()}`);
  const shut = strip.tokens.filter((t) => t.gate === 0).length;
  if (shut) counts.push(`${shut} left alone by the gate`);
  return `${strip.tokens.length} tokens: ${counts.join(", ") || "one prompt alone"}`;
}

export function showError(error) {
  if (error.status === 401) el("key-field").hidden = false;
  el("error").textContent = error.message;
  el("error").hidden = false;
  el("status").textContent = "";
}
