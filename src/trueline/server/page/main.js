// The page: what is asked, three answers side by side, and the aligned one token by token.

import { chat, get } from "./api.js";
import { Strip, make, other } from "./strip.js";
import { showRuns } from "./runs.js";

const el = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "seed", "max_tokens"];
const TEXTS = ["message", "principle", "system", "model", "method"];
const PAUSE = 250; // ms from the last touch of a slider to asking again

let methods = []; // [{name, about, branches, fields: [{name, kind, default, doc, low, high, step}]}]
let turns = []; // earlier messages of the chat
let forced = ""; // how the answer begins, if a token was forced
let running = null; // AbortController of what is under way
let timer = null;

const strip = new Strip(el("strip"), { force: (index, alternative) => force(index, alternative) });

const method = () => methods.find((m) => m.name === el("method").value);

function fields() {
  const own = method();
  const values = { method: own.name };
  for (const field of own.fields) {
    const input = el(`field-${field.name}`);
    if (field.name === "principle") {
      if (el("principle").value.trim()) values.principle = el("principle").value;
    } else if (input && input.value !== "") values[field.name] = Number(input.value);
  }
  return values;
}

function messages(more = "") {
  const system = el("system").value.trim();
  return [
    ...(system ? [{ role: "system", content: system }] : []),
    ...turns,
    { role: "user", content: el("message").value },
    ...(more ? [{ role: "assistant", content: more }] : []),
  ];
}

function body(alignment, trace = false, begun = "") {
  const numbers = Object.fromEntries(NUMBERS.map((name) => [name, Number(el(name).value)]));
  return { model: el("model").value, messages: messages(begun), ...numbers, alignment, trace };
}

async function stream(request, onChunk, signal) {
  for await (const chunk of chat(request, el("key").value, signal)) {
    if (chunk.choices.length) onChunk(chunk.choices[0]);
  }
}

async function ask() {
  running?.abort();
  const own = running = new AbortController();
  const settings = fields();
  const preset = el("model").value.includes(":");
  remember();
  el("error").hidden = true;
  el("stop").disabled = false;
  el("status").textContent = "Answering …";
  for (const id of ["plain", "prompt"]) el(id).textContent = "";
  const about = method();
  strip.name(about.branches);
  strip.clear(forced);
  const into = (id) => (choice) => { el(id).textContent += choice.delta.content ?? ""; };
  const system = settings.principle ?? settings.safety_prompt ?? about.prompt;
  const asked = [
    stream(body({ method: "plain" }), into("plain"), own.signal),
    system ? stream(body({ method: "plain", principle: system }), into("prompt"), own.signal) : null,
    stream(body(preset ? undefined : settings, true, forced), (choice) => {
      for (const token of choice.trace ?? []) strip.add(token);
    }, own.signal),
  ];
  const ended = await Promise.allSettled(asked);
  if (running !== own) return;
  running = null;
  strip.finish();
  el("stop").disabled = true;
  const wrong = ended.map((e) => e.reason).find((e) => e && e.name !== "AbortError");
  const counts = about.branches.map((name, i) => `${strip.tokens.filter((t) => other(t, i)).length} unlike ${name.toLowerCase()}`);
  el("status").textContent = `${strip.tokens.length} tokens: ${counts.join(", ") || "one prompt alone"}`;
  if (wrong) showError(wrong);
}

function showError(error) {
  if (error.status === 401) el("key-field").hidden = false;
  el("error").textContent = error.message;
  el("error").hidden = false;
  el("status").textContent = "";
}

function force(index, alternative) {
  const before = strip.tokens.slice(0, index).map((t) => t.text).join("");
  forced = forced + before + alternative.token;
  ask();
}

function soon() {
  clearTimeout(timer);
  timer = setTimeout(ask, PAUSE);
}

function showFields(values = {}) {
  const own = method();
  const sliders = own.fields.filter((f) => f.kind === "number").map((field) => {
    const value = values[field.name] ?? field.default ?? "";
    const output = make("output", { text: value === "" ? "none" : String(value), for: `field-${field.name}` });
    const input = make("input", {
      type: "range", id: `field-${field.name}`, min: field.low, max: field.high, step: field.step,
      value, title: field.doc,
      oninput: (event) => { output.textContent = event.target.value; soon(); },
    });
    return make("label", { title: field.doc }, make("span", {}, `${field.name.replaceAll("_", " ")} `, output), input);
  });
  el("settings").replaceChildren(...sliders);
  el("principle-field").hidden = !own.fields.some((f) => f.name === "principle");
  document.querySelector(".main .what").textContent = own.about;
}

function remember() {
  const state = new URLSearchParams();
  for (const id of [...TEXTS, ...NUMBERS]) if (el(id).value !== "") state.set(id, el(id).value);
  for (const input of el("settings").querySelectorAll("input")) state.set(input.id, input.value);
  if (forced) state.set("forced", forced);
  if (turns.length) state.set("turns", JSON.stringify(turns));
  history.replaceState(null, "", `#${state}`);
}

function recall() {
  const state = new URLSearchParams(location.hash.slice(1));
  for (const id of [...TEXTS, ...NUMBERS]) {
    if (state.has(id)) el(id).value = state.get(id);
  }
  if (!method()) el("method").value = methods[0].name;
  if (!el("model").value) el("model").selectedIndex = 0;
  const values = {};
  for (const [name, value] of state) if (name.startsWith("field-")) values[name.slice(6)] = value;
  showFields(values);
  forced = state.get("forced") ?? "";
  try {
    const found = JSON.parse(state.get("turns") ?? "[]");
    turns = Array.isArray(found) ? found.filter((m) => typeof m?.content === "string") : [];
  } catch { turns = []; }
  showTurns();
  return state.has("message");
}

function showTurns() {
  el("history").hidden = !turns.length;
  el("history").replaceChildren(...turns.map((m) => make("li", { text: `${m.role}: ${m.content}` })));
}

function answerSoFar() {
  return forced + strip.tokens.map((t) => t.text).join("");
}

function goOn() {
  if (!strip.tokens.length) return;
  turns = [...turns, { role: "user", content: el("message").value }, { role: "assistant", content: answerSoFar() }];
  forced = "";
  showTurns();
  el("message").value = "";
  el("message").focus();
}

function save(name, content, kind) {
  const link = make("a", { download: name, href: URL.createObjectURL(new Blob([content], { type: kind })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function picture() {
  const svg = strip.picture();
  svg.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  return new XMLSerializer().serializeToString(svg);
}

async function savePng() {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(picture())}`;
  await image.decode();
  const canvas = make("canvas", { width: 2 * image.width, height: 2 * image.height });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  canvas.toBlob((blob) => save("trace.png", blob, "image/png"));
}

async function view(name) {
  for (const other of ["ask", "runs"]) {
    el(other).hidden = other !== name;
    el(`view-${other}`).setAttribute("aria-pressed", other === name);
  }
  if (name === "runs") await showRuns(el("runs"), el("key").value).catch(showError);
}

async function fillModels() {
  const { data } = await get("v1/models", el("key").value);
  el("model").replaceChildren(...data.map((m) => make("option", { value: m.id, text: m.id })));
}

async function start() {
  const about = await get("page/methods.json");
  methods = about.methods;
  el("view-runs").hidden = !about.runs;
  el("method").replaceChildren(...methods.map((m) => make("option", { value: m.name, text: m.name })));
  el("method").value = about.default;
  try {
    await fillModels();
  } catch (error) { showError(error); }
  el("form").addEventListener("submit", (event) => { event.preventDefault(); forced = ""; ask(); });
  el("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) el("form").requestSubmit();
  });
  el("method").addEventListener("change", () => { showFields(); soon(); });
  el("model").addEventListener("change", soon);
  el("key").addEventListener("change", () => fillModels().catch(showError));
  el("stop").addEventListener("click", () => running?.abort());
  el("again").addEventListener("click", goOn);
  el("fresh").addEventListener("click", () => { turns = []; forced = ""; showTurns(); remember(); });
  el("view-ask").addEventListener("click", () => view("ask"));
  el("view-runs").addEventListener("click", () => view("runs"));
  el("save-json").addEventListener("click", () => save("trace.json", JSON.stringify(
    { asked: body(fields()), answer: answerSoFar(), tokens: strip.tokens }, null, 1), "application/json"));
  el("save-svg").addEventListener("click", () => save("trace.svg", picture(), "image/svg+xml"));
  el("save-png").addEventListener("click", savePng);
  addEventListener("hashchange", () => { if (recall()) ask(); });
  if (recall()) ask();
}

start().catch(showError);
