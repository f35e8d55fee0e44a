// What runs left: the over-refusal frontier, metrics over a grid, curves, scores after each task.

import { get } from "./api.js";
import { draw, make } from "./strip.js";

const WIDE = 520, HIGH = 300, LEFT = 60, LOW = 250, RIGHT = 500, TOP = 20;

const x = (share) => LEFT + share * (RIGHT - LEFT);
const y = (share) => LOW - share * (LOW - TOP);

function axes(label, across, up, limits) {
  const svg = draw("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, width: WIDE, height: HIGH, role: "img", "aria-label": label });
  svg.append(draw("line", { class: "axis", x1: LEFT, y1: LOW, x2: RIGHT, y2: LOW }),
    draw("line", { class: "axis", x1: LEFT, y1: LOW, x2: LEFT, y2: TOP }),
    draw("text", { x: LEFT, y: HIGH - 8 }, across), draw("text", { x: 4, y: 14 }, up));
  const [x0, x1, y0, y1] = limits;
  for (const share of [0, 0.5, 1]) {
    svg.append(draw("text", { x: x(share) - 8, y: LOW + 16 }, short(x0 + share * (x1 - x0))),
      draw("text", { x: 8, y: y(share) + 4 }, short(y0 + share * (y1 - y0))));
  }
  return svg;
}

const short = (value) => (Math.abs(value) >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(3))));

/** Points that another one beats in one rate and equals or beats in the other. */
export function dominated(points) {
  const better = (a, b) => a.over <= b.over && a.harm >= b.harm && (a.over < b.over || a.harm > b.harm);
  return points.map((p) => points.some((q) => better(q, p)));
}

function frontier(run) {
  const points = run.points.map((p) => ({
    label: p.label, over: p.measures.over_refusal.value, harm: p.measures.harmful_refusal.value,
  }));
  const out = dominated(points);
  const svg = axes(`${run.title}: over-refusal against refusal of harmful requests, ${points.length} settings`,
    "harmless requests refused →", "harmful requests refused ↑", [0, 1, 0, 1]);
  points.forEach((p, i) => {
    const mark = draw("circle", { cx: x(p.over), cy: y(p.harm), r: 6, class: "bar",
      "fill-opacity": out[i] ? 0 : 1, stroke: "currentColor" });
    mark.append(draw("title", {}, `${p.label}${out[i] ? " (dominated)" : ""}`));
    svg.append(mark, draw("text", { x: x(p.over) + 9, y: y(p.harm) + 4 }, p.label));
  });
  return [svg, make("p", { class: "note", text: "Hollow: dominated, another setting is no worse in both. " +
    `Recommended: ${run.recommended ?? "none"}.` })];
}

function grid(run) {
  const names = [...new Set(run.points.flatMap((p) => Object.keys(p.measures)))];
  return [make("table", { "aria-label": run.title },
    make("thead", {}, make("tr", {}, make("th", { scope: "col", text: "Setting" }),
      ...names.map((n) => make("th", { scope: "col", text: n.replaceAll("_", " ") })))),
    make("tbody", {}, ...run.points.map((p) => make("tr", {}, make("th", { scope: "row", text: p.label }),
      ...names.map((n) => make("td", { class: "number", text: p.measures[n] ? short(p.measures[n].value) : "–" }))))))];
}

function curve(name, points) {
  const [xs, ys] = [points.map((p) => p[0]), points.map((p) => p[1])];
  const limits = [Math.min(...xs), Math.max(...xs), Math.min(0, ...ys), Math.max(...ys)];
  const share = (value, low, high) => (high > low ? (value - low) / (high - low) : 0.5);
  const svg = axes(`${name} over ${points.length} steps, last ${short(ys.at(-1))}`, "step →", `${name.replaceAll("_", " ")} ↑`, limits);
  const path = points.map(([a, b], i) =>
    `${i ? "L" : "M"}${x(share(a, limits[0], limits[1]))},${y(share(b, limits[2], limits[3]))}`).join("");
  svg.append(draw("path", { d: path, fill: "none", stroke: "#d97706", "stroke-width": 2 }));
  return svg;
}

function scores(run) {
  const table = make("table", { "aria-label": run.title },
    make("thead", {}, make("tr", {}, make("th", { scope: "col", text: "After" }),
      ...run.tasks.map((t) => make("th", { scope: "col", text: t })))),
    make("tbody", {}, ...run.R.map((row, i) => make("tr", {}, make("th", { scope: "row", text: run.tasks[i] ?? "all" }),
      ...row.map((v) => make("td", { class: `number token heat-${Math.min(4, Math.floor(v * 5))}`, text: v.toFixed(2) }))))));
  return [table];
}

function pictures(run) {
  if (run.kind === "curves") return Object.entries(run.curves).map(([name, points]) => curve(name, points));
  if (run.kind === "scores") return scores(run);
  const both = run.points.every((p) => p.measures.over_refusal && p.measures.harmful_refusal);
  return both ? frontier(run) : grid(run);
}

export async function showRuns(root, key) {
  const runs = await get("v1/runs", key);
  const cards = runs.map((run) => make("article", {}, make("h2", { text: run.name }),
    make("p", { class: "what", text: run.title }), ...pictures(run)));
  if (!cards.length) cards.push(make("p", { text: "No run lies in the folder yet." }));
  root.replaceChildren(...cards);
}
