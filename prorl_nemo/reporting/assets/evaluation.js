// The page of an evaluation: scores, pass@k curves, reported numbers, notes, samples.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const main = document.getElementById("main");
const { manifest, benchmarks } = data;

const percent = (value, digits = 2) => (value == null ? "–" : (100 * value).toFixed(digits));
const signedPoints = (value) => `${value >= 0 ? "+" : "−"}${Math.abs(value).toFixed(2)}`;
const OUTCOMES = ["right", "partial", "wrong", "no_answer"];

function block(title, ...children) {
  main.append(html("section", { class: "block" }, html("h2", {}, title), ...children));
}

/** A table; cells are texts or elements, the first `left` are no numbers, those in `free` wrap. */
function table(columns, rows, left = 1, free = []) {
  const kind = (i) => (free.includes(i) ? "free" : i < left ? null : "number");
  return html("div", { class: "card scroll wide" }, html("table", {},
    html("thead", {}, html("tr", {}, ...columns.map((c, i) => html("th", { scope: "col", class: kind(i) }, c)))),
    html("tbody", {}, ...rows.map((row) => html("tr", {}, ...row.map((cell, i) =>
      (i ? html("td", { class: kind(i) }, cell) : html("th", { scope: "row" }, cell))))))));
}

/** A stacked bar of what became of the samples. */
function bar(shares) {
  const label = OUTCOMES.map((name) => `${name.replace("_", " ")} ${percent(shares[name], 1)} %`).join(", ");
  return html("span", { class: "bar", title: label, role: "img", "aria-label": label },
    ...OUTCOMES.map((name) => {
      const part = html("i", { class: name });
      part.style.width = `${100 * shares[name]}%`;
      return part;
    }));
}

function scores() {
  const last = (votes) => (votes ? votes[Math.max(...Object.keys(votes).map(Number))] : null);
  const columns = ["benchmark", "metric", "items", "score", "± items", "± samples", "95 % interval",
    "pass@n", "cons@n", "outcomes", "no answer", "truncated", "tokens"];
  const rows = benchmarks.map((b) => [b.title, `${b.metric}@${b.average.samples}`, String(b.average.items),
    percent(b.average.mean), percent(b.average.error_items), percent(b.average.error_samples),
    `${percent(b.interval.low)} to ${percent(b.interval.high)}`, percent(b.pass_curve.at(-1)),
    percent(last(b.votes)), bar(b.shares), percent(b.shares.no_answer), percent(b.shares.truncated),
    Math.round(b.shares.tokens).toLocaleString("en")]);
  const swatch = (name) => {
    const part = html("i", { class: name });
    part.style.width = "100%";
    return html("span", {}, html("span", { class: "bar" }, part), name.replace("_", " "));
  };
  block("Scores, in percent", html("div", { class: "legend" }, ...OUTCOMES.map(swatch)), table(columns, rows, 2));
}

/** pass@k over k = 1 ... n on a logarithmic axis, with cons@k where there are votes. */
function curve(b) {
  const n = b.pass_curve.length, width = 380, height = 200;
  const left = 40, right = width - 14, top = 12, bottom = height - 24;
  const points = b.pass_curve.map((value, i) => [i + 1, value]);
  const votes = Object.entries(b.votes ?? {}).map(([k, value]) => [Number(k), value]).sort((p, q) => p[0] - q[0]);
  const highest = Math.min(1, Math.max(0.05, ...points.concat(votes).map((p) => p[1])) * 1.12);
  const x = (k) => left + (n > 1 ? Math.log2(k) / Math.log2(n) : 0.5) * (right - left);
  const y = (value) => bottom - (value / highest) * (bottom - top);
  const path = (list) => list.map(([k, v], i) => `${i ? "L" : "M"}${x(k).toFixed(1)} ${y(v).toFixed(1)}`).join("");
  const powers = [];
  for (let k = 1; k <= n; k *= 2) powers.push(k);
  const plot = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `pass@k of ${b.title}` },
    svg("g", { class: "axes" },
      ...ticks(0, highest, 4).flatMap((value) => [
        svg("line", { x1: left, x2: right, y1: y(value), y2: y(value) }),
        svg("text", { x: left - 6, y: y(value) + 3.5, "text-anchor": "end" }, format(value, "%"))]),
      ...powers.map((k) => svg("text", { x: x(k), y: bottom + 16, "text-anchor": "middle" }, String(k)))),
    svg("path", { class: "line", d: path(votes), stroke: "var(--c1)", "stroke-dasharray": "5 3" }),
    svg("path", { class: "line thick", d: path(points), stroke: "var(--c0)" }),
    ...(n <= 32 ? points : []).map(([k, v]) => svg("circle", { cx: x(k), cy: y(v), r: 2.6, fill: "var(--c0)" })));
  const key = (colour, dash, text) => html("span", {}, svg("svg", { width: 16, height: 8, class: "swatch" },
    svg("line", { x1: 0, x2: 16, y1: 4, y2: 4, stroke: colour, "stroke-dasharray": dash })), text);
  return html("section", { class: "panel" }, html("header", {}, html("h3", {}, b.title)),
    html("div", { class: "readout" }, key("var(--c0)", null, `pass@${n} ${percent(b.pass_curve.at(-1))}`),
      votes.length ? key("var(--c1)", "5 3", `cons@${votes.at(-1)[0]} ${percent(votes.at(-1)[1])}`) : null),
    html("div", { class: "plot" }, plot));
}

function reportedNumbers() {
  const rows = benchmarks.flatMap((b) => b.comparisons.map((c) => {
    const word = c.inside_noise == null ? "–" : c.inside_noise ? "inside" : "outside";
    return [b.title, c.reported.model, `${c.reported.source}${c.reported.doubt ? ` (${c.reported.doubt})` : ""}`,
      c.mismatches.join("; ") || "nothing known",
      percent(b.average.mean), String(c.reported.value), signedPoints(c.difference),
      c.noise == null ? "–" : c.noise.toFixed(2), html("span", { class: word === "inside" ? "good" : word === "outside" ? "bad" : "" }, word)];
  }));
  if (!rows.length) return;
  const columns = ["benchmark", "reported for", "source", "not the same", "ours", "reported", "difference", "95 % noise", "noise"];
  block("Beside reported numbers", table(columns, rows, 4, [1, 2, 3]));
}

function readings() {
  const rows = benchmarks.flatMap((b) => [["mean over tasks", b.task_mean], ["mean over categories", b.category_mean],
    ...Object.entries(b.extra).map(([name, value]) => [name.replaceAll("_", " "), value])]
    .filter(([, value]) => value != null).map(([name, value]) => [b.title, name, percent(value)]));
  if (rows.length) block("Other readings of the same samples", table(["benchmark", "reading", "score"], rows, 2));
}

function tasks() {
  for (const b of benchmarks) {
    const rows = Object.entries(b.groups).map(([task, score]) => [task.replaceAll("_", " "), percent(score)]);
    if (!rows.length) continue;
    main.append(html("details", { class: "block" }, html("summary", {}, html("h2", {}, `${b.title}: by task`)),
      table(["task", "score"], rows)));
  }
}

function remarks() {
  const lines = benchmarks.flatMap((b) => [...b.notes, ...b.doubts].map((text) => `${b.title}: ${text}`));
  lines.push(...manifest.protocol.doubts.map((text) => `${manifest.protocol.title}: ${text}`));
  if (lines.length) {
    block("Notes, and known differences to other harnesses",
      html("ul", { class: "card plain" }, ...lines.map((line) => html("li", {}, line))));
  }
}

const SAMPLES = {
  filters: [{ key: "benchmark", all: "all benchmarks" }, { key: "verdict", all: "all verdicts" }],
  chips: (s) => [["verdict", s.verdict], ["tokens", figure(s.tokens)], ["ended by", s.finish], ["sample", String(s.sample)],
    ["seed", String(s.seed)], ["item", s.item]],
  what: (s) => s.item,
  when: (s) => `${figure(s.tokens)}`,
};

scores();
block("pass@k and votes", html("div", { class: "curves" }, ...benchmarks.map(curve)));
readings();
reportedNumbers();
tasks();
remarks();
if (data.samples.length) block("Samples", ...sampleBrowser(data.samples, SAMPLES));
main.append(html("details", { class: "block" }, html("summary", {}, html("h2", {}, "What was asked")),
  html("pre", { class: "card scroll" }, JSON.stringify({ versions: data.versions, ...manifest }, null, 1))));
