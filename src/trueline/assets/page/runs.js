// What runs left: over-refusal frontiers, curves of distillations, scores after each task, verdicts.

import { get } from "./api.js";
import { draw, make } from "./strip.js";

/** Tabs by kind of run. */
export const KINDS = { frontier: "Frontiers", curves: "Distillations", scores: "Tasks", align: "Alignments", points: "Sweeps" };

const WIDE = 560, HIGH = 320, LEFT = 60, LOW = 270, RIGHT = 540, TOP = 24;

const across = (share) => LEFT + share * (RIGHT - LEFT);
const up = (share) => LOW - share * (LOW - TOP);
const short = (value) => (Math.abs(value) >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(3))));
const rate = (m) => (m?.value ?? null) === null ? "–" : `${(100 * m.value).toFixed(1)} %` +
  ((m.low ?? null) === null ? "" : ` [${(100 * m.low).toFixed(1)}, ${(100 * m.high).toFixed(1)}]`);

function axes(label, xText, yText, [x0, x1, y0, y1]) {
  const svg = draw("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, width: WIDE, height: HIGH, role: "img", "aria-label": label });
  svg.append(draw("line", { class: "axis", x1: LEFT, y1: LOW, x2: RIGHT, y2: LOW }),
    draw("line", { class: "axis", x1: LEFT, y1: LOW, x2: LEFT, y2: TOP }),
    draw("text", { x: LEFT, y: HIGH - 8 }, xText), draw("text", { x: 4, y: 14 }, yText));
  for (const share of [0, 0.5, 1]) {
    svg.append(draw("text", { x: across(share) - 8, y: LOW + 16 }, short(x0 + share * (x1 - x0))),
      draw("text", { x: 8, y: up(share) + 4 }, short(y0 + share * (y1 - y0))));
  }
  return svg;
}

function table(name, head, rows) {
  return make("div", { class: "wide-box", tabindex: "0", role: "region", "aria-label": name },
    make("table", { "aria-label": name },
      make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col", text })))),
      make("tbody", {}, ...rows.map(([first, ...rest]) => make("tr", {}, make("th", { scope: "row", text: first }),
        ...rest.map((cell) => (cell instanceof Node ? cell : make("td", { class: "number", text: cell }))))))));
}

/** For each point the label of one that is no worse in both rates and better in one, or null. */
export function dominators(points) {
  const better = (a, b) => a.over <= b.over && a.harm >= b.harm && (a.over < b.over || a.harm > b.harm);
  return points.map((p) => points.find((q) => better(q, p))?.label ?? null);
}

function frontier(run) {
  const points = run.points.map((p) => ({ ...p,
    over: p.measures.over_refusal.value, harm: p.measures.harmful_refusal.value }));
  const found = dominators(points);
  const by = points.map((p, i) => (p.dominated_by === undefined ? found[i] : p.dominated_by));
  const svg = axes(`${run.title}: over-refusal against refusal of harmful requests, ${points.length} settings`,
    "harmless requests refused →", "harmful requests refused ↑", [0, 1, 0, 1]);
  svg.classList.add("frontier");
  points.forEach((p, i) => {
    const shape = { class: "bar mark", "fill-opacity": by[i] ? 0 : 1, stroke: "currentColor" };
    const mark = p.baseline
      ? draw("rect", { ...shape, x: across(p.over) - 5, y: up(p.harm) - 5, width: 10, height: 10 })
      : draw("circle", { ...shape, cx: across(p.over), cy: up(p.harm), r: 6 });
    mark.append(draw("title", {}, `${p.label}${by[i] ? ` (dominated by ${by[i]})` : ""}`));
    svg.append(mark);
    if (!by[i]) svg.append(draw("text", { x: across(p.over) + 9, y: up(p.harm) + 4 }, p.label));
  });
  const note = "Hollow: dominated, another setting is no worse in both. Square: a system text alone, for comparison. " +
    `Recommended: ${run.recommended ?? "none"}.`;
  const gain = run.frontier?.gain;
  const area = gain ? [make("p", { class: "note", text: `Area under the frontier: the method adds ${short(gain.value)} ` +
    `[${short(gain.low)}, ${short(gain.high)}] to the system texts alone.` })] : [];
  return [svg, make("p", { class: "note", text: note }), ...area,
    table(run.title, ["Setting", "Harmless refused", "Harmful refused", "Dominated by"],
      points.map((p, i) => [p.label, rate(p.measures.over_refusal), rate(p.measures.harmful_refusal), by[i] ?? "–"]))];
}

function grid(run) {
  const names = [...new Set(run.points.flatMap((p) => Object.keys(p.measures)))];
  return [table(run.title, ["Setting", ...names.map((n) => n.replaceAll("_", " "))],
    run.points.map((p) => [p.label, ...names.map((n) => (p.measures[n] ? short(p.measures[n].value) : "–"))]))];
}

function curve(name, points) {
  const [xs, ys] = [points.map((p) => p[0]), points.map((p) => p[1])];
  const limits = [Math.min(...xs), Math.max(...xs), Math.min(0, ...ys), Math.max(...ys)];
  const share = (value, low, high) => (high > low ? (value - low) / (high - low) : 0.5);
  const text = name.replaceAll("_", " ");
  const svg = axes(`${text} over ${points.length} steps, last ${short(ys.at(-1))}`, "step →", `${text} ↑`, limits);
  const path = points.map(([a, b], i) =>
    `${i ? "L" : "M"}${across(share(a, limits[0], limits[1])).toFixed(1)},${up(share(b, limits[2], limits[3])).toFixed(1)}`).join("");
  svg.append(draw("path", { class: "curve", d: path, fill: "none", stroke: "#d97706", "stroke-width": 2 }));
  return svg;
}

/** R[i, j], the score of task j after training on task i; a share by its shade and its number. */
function scores(title, { tasks, R, untouched, measures = {} }) {
  const cell = (v) => make("td", { class: `number token heat-${Math.max(0, Math.min(4, Math.floor(v * 5)))}`, text: v.toFixed(2) });
  const rows = R.map((row, i) => [`after ${tasks[i] ?? "all"}`, ...row.map(cell)]);
  if (untouched) rows.unshift(["untouched", ...untouched.map(cell)]);
  const said = Object.entries(measures).filter(([, v]) => typeof v === "number")
    .map(([name, v]) => `${name.replaceAll("_", " ")} ${v.toFixed(3)}`);
  return [table(title, ["", ...tasks], rows), make("p", { class: "note", text: said.join(", ") })];
}

function verdict(run) {
  const marks = run.checks.map((c) => [`${c.principle ? `${c.principle}: ` : ""}${c.says}`,
    c.value === null ? "–" : short(c.value),
    (c.low ?? null) === null ? "–" : `[${short(c.low)}, ${short(c.high)}]`,
    `${c.at_least ? "at least" : "at most"} ${short(c.limit)}`, c.passed ? "passed" : "FAILED"]);
  return [make("p", { class: "verdict", text: `Verdict: ${run.verdict}` }),
    ...run.reasons.map((text) => make("p", { class: "note", text })),
    table(`${run.title}: what was asked`, ["Check", "Value", "95 % interval", "Asked", ""], marks),
    ...(run.R ? scores(`${run.title}: R over principles`, run.R) : [])];
}

function pictures(run) {
  if (run.kind === "curves") return [make("div", { class: "tables" }, ...Object.entries(run.curves).map(([name, points]) => curve(name, points)))];
  return { frontier, points: grid, scores: (r) => scores(r.title, r), align: verdict }[run.kind](run);
}

export async function showRuns(root, kind, key) {
  const runs = (await get("v1/runs", key)).filter((run) => run.kind === kind);
  const cards = runs.map((run) => make("article", {}, make("h2", { text: run.name }),
    make("p", { class: "what", text: `${run.title}${run.finished ? "" : " (not finished)"}` }), ...pictures(run)));
  if (!cards.length) cards.push(make("p", { text: `The folder holds no ${KINDS[kind].toLowerCase()} yet.` }));
  root.replaceChildren(...cards);
}
