// The page: asking a server, drawing its runs, or showing one recorded answer that lies in the page.

import { get } from "./api.js";
import { Strip, make } from "./strip.js";
import { KINDS, showRuns } from "./runs.js";
import { Asking, showError, summary } from "./ask.js";

const byId = (id) => document.getElementById(id);

let asking = null;
let shown = null; // what the buttons save: {strip, trace()}
let seen = "ask"; // the view

function save(name, content, kind) {
  const link = make("a", { download: name, href: URL.createObjectURL(new Blob([content], { type: kind })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function picture() {
  const svg = shown.strip.picture();
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

function remember() {
  const state = new URLSearchParams(asking.state());
  if (seen !== "ask") state.set("view", seen);
  history.replaceState(null, "", `#${state}`);
}

async function view(name) {
  seen = name;
  byId("ask").hidden = name !== "ask";
  byId("runs").hidden = name === "ask";
  document.querySelector("footer").hidden = name !== "ask";
  for (const button of byId("views").children) button.setAttribute("aria-pressed", button.id === `view-${name}`);
  if (name !== "ask") await showRuns(byId("runs"), name, byId("key").value).catch(showError);
}

function tab(name, text) {
  return make("button", { type: "button", id: `view-${name}`, "aria-pressed": "false", text,
    onclick: () => { view(name); remember(); } });
}

function recall() {
  const state = new URLSearchParams(location.hash.slice(1));
  if (asking.recall(state)) asking.ask();
  view(state.get("view") ?? "ask");
}

/** Show a recorded answer: no server, nothing to ask. */
function showRecorded(data) {
  for (const node of [byId("form"), byId("views"), byId("hint"), ...document.querySelectorAll(".alone")]) node.hidden = true;
  document.querySelector("h1").textContent = data.question;
  byId("about").hidden = false;
  byId("about").append(...data.settings.flatMap(([name, value]) => [make("dt", { text: name }), make("dd", { text: String(value) })]));
  byId("what").textContent = data.cut ? `The first ${data.tokens.length} tokens.` : "";
  const strip = new Strip(byId("strip"), {});
  strip.name(data.names);
  for (const token of data.tokens) strip.add(token);
  strip.finish();
  byId("status").textContent = summary(strip);
  byId("answers").append(...data.alone.map((own) => make("article", {},
    make("h2", { text: own.name }),
    make("p", { class: "what", text: own.system ? (own.from_template ? "The template's system text:" : "System text:") : "No system text." }),
    ...(own.system ? [make("blockquote", { text: own.system })] : []),
    make("p", { class: "text", text: own.cut ? `${own.text} …` : own.text }))));
  shown = { strip, trace: () => data };
}

async function start() {
  const about = await get("page/methods.json");
  asking = new Asking(about, remember);
  shown = asking;
  byId("view-ask").addEventListener("click", () => { view("ask"); remember(); });
  if (about.runs) byId("views").append(...Object.entries(KINDS).map(([name, text]) => tab(name, text)));
  try {
    await asking.fillModels();
  } catch (error) { showError(error); }
  addEventListener("hashchange", recall);
  recall();
}

byId("save-json").addEventListener("click", () => save("trace.json", JSON.stringify(shown.trace(), null, 1), "application/json"));
byId("save-svg").addEventListener("click", () => save("trace.svg", picture(), "image/svg+xml"));
byId("save-png").addEventListener("click", savePng);
const held = byId("data");
if (held) showRecorded(JSON.parse(held.textContent));
else start().catch(showError);
