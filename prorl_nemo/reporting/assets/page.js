// The page: reads the embedded data, builds cards, panels, sample browser, events and settings.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const main = document.getElementById("main");

// Series: key (a column), label; source ("validation" instead of train), dots (few points),
// exact (never smoothed), error (column of standard errors), faint, dash, colour.
// Panel: title, help, unit, digits of the read-out, size (tall, small), stack (areas).
const PANELS = {
  "Signal": [
    { title: "Reward", help: "Mean score per response, as graded and after the length penalties.",
      series: [{ key: "reward/raw_mean", label: "raw" }, { key: "reward/shaped_mean", label: "shaped" }] },
    { title: "Groups with signal", unit: "%",
      help: "Share of sampled groups kept: the responses to the prompt did not all score the same.",
      series: [{ key: "rollout/kept_share", label: "kept" }] },
    { title: "Response length", unit: "tokens", help: "Tokens per response, and the limit in force.",
      series: [
        { key: "rollout/response_tokens_mean", label: "mean" },
        { key: "rollout/response_tokens_max", label: "longest", faint: true, colour: 6 },
        { key: "validation/response_tokens_mean", label: "validation", source: "validation", dots: true, colour: 2 },
        { key: "rollout/response_limit", label: "limit", exact: true, dash: "4 3", colour: 7 }] },
    { title: "Truncated responses", unit: "%", help: "Share of responses cut at the limit.",
      series: [
        { key: "rollout/truncated_share", label: "training" },
        { key: "validation/truncated_share", label: "validation", source: "validation", dots: true, colour: 2 }] },
    { title: "Repetitive responses", unit: "%", help: "Share of responses that mostly repeat what they have said.",
      series: [
        { key: "rollout/repetition_share", label: "training" },
        { key: "validation/repetition_share", label: "validation", source: "validation", dots: true, colour: 2 }] },
  ],
  "Policy": [
    { title: "KL to the reference", help: "Mean per token; starts again from zero after a reset. Above the threshold it is a spike.",
      series: [
        { key: "policy/kl", label: "KL", colour: 3 },
        { key: "reset/kl_threshold", label: "threshold", exact: true, faint: true, dash: "4 3", colour: 7 }] },
    { title: "Entropy", help: "Mean per token, in nats. A fall towards zero is collapse.",
      series: [{ key: "policy/entropy", label: "entropy", colour: 2 }] },
    { title: "Clipped tokens", unit: "%", help: "Share of tokens whose ratio left the clip range, below or above.",
      series: [{ key: "policy/clip_share_low", label: "low" }, { key: "policy/clip_share_high", label: "high" }] },
    { title: "Gradient norm", help: "Before clipping.",
      series: [{ key: "policy/grad_norm", label: "norm", colour: 4 }] },
    { title: "Learning rate",
      series: [{ key: "policy/learning_rate", label: "rate", exact: true, colour: 5 }] },
    { title: "Probability ratio", digits: 6, help: "Mean of new over old probability of a trained token; stays near 1.",
      series: [{ key: "policy/ratio_mean", label: "ratio", colour: 6 }] },
  ],
  "Agreement of engine and trainer": [
    { title: "Log-probability difference", help: "Absolute difference per token between the sampling engine and the trainer.",
      series: [{ key: "mismatch/mean_abs", label: "mean" }, { key: "mismatch/p99", label: "p99" }] },
    { title: "Tokens out of bounds", unit: "%", help: "Share of tokens whose importance weight left its bounds.",
      series: [{ key: "mismatch/out_of_bounds_share", label: "share", colour: 4 }] },
    { title: "Token probability error", digits: 5, help: "Mean of exp |difference|: 1 is perfect agreement.",
      series: [{ key: "mismatch/token_mult_prob_error", label: "factor", colour: 5 }] },
    { title: "KL of engine and trainer",
      series: [{ key: "mismatch/gen_kl", label: "KL", colour: 3 }] },
  ],
  "Cost": [
    { title: "Seconds per step", unit: "s", stack: true, help: "Where the time of a step goes; means over neighbouring steps.",
      series: ["generate", "logprobs", "reference", "train", "sync", "checkpoint"].map(
        (phase) => ({ key: `time/${phase}`, label: phase })) },
    { title: "Tokens per second", unit: "tokens",
      series: [
        { key: "throughput/generated_tokens_per_second", label: "generated" },
        { key: "throughput/trained_tokens_per_second", label: "trained" }] },
  ],
};
const HERO = { title: "Validation", size: "tall", help: "Mean score; the band is two standard errors each side.",
  series: [{ key: "validation/mean", label: "mean score ± standard error", source: "validation", dots: true, error: "validation/stderr" }] };
const NOT_A_TASK = new Set(["mean", "stderr", "pass", "samples", "truncated_share", "response_tokens_mean",
  "best", "repetition_share"]);
const NOT_A_CURVE = new Set(["step", "time", "stage", "time/step", "shaping/cosine_on"]);
const FIRST_TASKS = 12;
const ROUTINE = new Set(["checkpoint_saved", "reset_decision"]); // events too many to read

data.runs.forEach((run, index) => { run.index = index; });
const lastStep = Math.max(...data.runs.flatMap((run) => [run.train, run.validation].map((t) => t.step?.at(-1) ?? 0)));
const firstStep = Math.min(...data.runs.flatMap((run) => [run.train, run.validation].map((t) => t.step?.[0] ?? 0)));

const page = {
  runs: data.runs, focus: data.runs[0], hidden: new Set(), step: null,
  range: [firstStep, Math.max(lastStep, firstStep + 1)],
  smoothing: lastStep > 1000 ? 25 : lastStep > 100 ? 10 : 0,
  charts: [],
  hover(step) {
    if (step === this.step) return;
    this.step = step;
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.charts.forEach((chart) => chart.seen && chart.hover(this.step));
    });
  },
  zoom(range) {
    this.range = range ?? [firstStep, Math.max(lastStep, firstStep + 1)];
    document.getElementById("zoom").hidden = range === null;
    this.redraw();
  },
  redraw() {
    this.charts.forEach((chart) => { chart.stale = true; if (chart.seen) drawNow(chart); });
  },
};

function drawNow(chart) {
  chart.draw();
  chart.stale = !chart.plot.clientWidth; // in a part that is folded away
}

// Panels out of sight are drawn when they come into view: thirty of them cost seconds on a phone.
const chartOf = new WeakMap();
const sight = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const chart = chartOf.get(entry.target);
    chart.seen = entry.isIntersecting;
    if (chart.seen && chart.stale) drawNow(chart);
  }
}, { rootMargin: "300px" });
window.addEventListener("beforeprint", () => page.charts.filter((chart) => chart.stale).forEach(drawNow));
const size = new ResizeObserver(() => page.redraw());

function addChart(panel) {
  const chart = new Chart(panel, page);
  chart.stale = true;
  page.charts.push(chart);
  chartOf.set(chart.element, chart);
  sight.observe(chart.element);
  return chart.element;
}

function has(panel) {
  return panel.series.some(({ key, source }) => data.runs.some((run) => run[source ?? "train"][key]));
}

function section(title, ...children) {
  main.append(html("section", { class: "block" }, title ? html("h2", {}, title) : null, ...children));
}

const swatch = (run) => {
  const dot = html("i", { class: "dot" });
  dot.style.background = `var(--c${run.index % COLOURS})`;
  return dot;
};
const plusMinus = (error) => (error == null ? "" : ` ± ${error.toFixed(3)}`);
const withError = (point) => (point ? `${point.mean.toFixed(3)}${plusMinus(point.stderr)}` : "–");
const signed = (gain) => `${gain >= 0 ? "+" : "−"}${Math.abs(gain).toFixed(3)}`;

// -- header and cards

function card(label, value, note, kind = "") {
  return html("div", { class: `card ${kind}` }, html("span", { class: "label" }, label),
    html("span", { class: "value" }, value), html("span", { class: "note" }, note));
}

function cards({ summary: s }) {
  const v = s.validation;
  const point = (label, p) => html("div", {}, html("span", { class: "label" }, label),
    html("span", { class: "value" }, p.mean.toFixed(3)),
    html("span", { class: "note" }, `${plusMinus(p.stderr)} at step ${p.step.toLocaleString("en")}`.trim()));
  const arrow = () => html("span", { class: "arrow", "aria-hidden": "true" }, "→");
  const gain = v?.gain == null ? null : html("div", { class: "gain" }, html("span", { class: "label" }, "last − start"),
    html("span", { class: "value" }, signed(v.gain)), html("span", { class: "note" }, plusMinus(v.gain_stderr)));
  const outcome = v ? html("div", { class: "card outcome", title:
      `± is one standard error. Best is the highest of ${v.count} noisy points, so it flatters.` },
    point("validation at start", v.start), arrow(), point("best", v.best), arrow(), point("last", v.last), gain) : null;
  const steps = s.total_steps ? `of ${s.total_steps.toLocaleString("en")} · ${s.state}` : s.state;
  const troubles = [[s.engine_restarts, "engine restart"], [s.skipped_updates, "skipped update"], [s.prompts_dropped, "dropped prompt"]]
    .filter(([count]) => count).map(([count, what]) => `${count} ${what}${count > 1 ? "s" : ""}`);
  return html("div", { class: "cards" }, outcome,
    card("steps", s.steps.toLocaleString("en"), s.reason ? `${steps}: ${s.reason}` : steps),
    card("time", duration(s.seconds), `${format(s.generated_tokens, "tokens")} tokens generated`),
    card("reference resets", String(s.resets), `${s.stages} stage${s.stages === 1 ? "" : "s"}`),
    card("restarts", String(s.restarts), troubles.join(", ") || "no other trouble"));
}

function comparison() {
  const head = ["run", "state", "steps", "start", "best", "last", "last − start", "time", "tokens", "resets", "restarts"];
  const row = (run) => {
    const s = run.summary, v = s.validation;
    const gain = v?.gain == null ? "–" : signed(v.gain) + plusMinus(v.gain_stderr);
    return html("tr", {}, html("th", { scope: "row" }, swatch(run), run.name),
      ...[s.state, s.steps.toLocaleString("en"), withError(v?.start), withError(v?.best), withError(v?.last), gain,
        duration(s.seconds), format(s.generated_tokens, "tokens"), s.resets, s.restarts]
        .map((cell) => html("td", {}, String(cell))));
  };
  return html("div", { class: "card scroll", title: "± is one standard error. Best is the highest of several noisy points, so it flatters." },
    html("table", { class: "runs" },
      html("thead", {}, html("tr", {}, ...head.map((name) => html("th", { scope: "col" }, name)))),
      html("tbody", {}, ...data.runs.map(row))));
}

// -- toolbar

function choices(label, options, chosen, pick) {
  const buttons = options.map(([value, text]) => html("button", {
    "aria-pressed": String(value === chosen), onclick: () => {
      buttons.forEach((b, i) => b.setAttribute("aria-pressed", String(options[i][0] === value)));
      pick(value);
    } }, text));
  return html("div", { class: "choices", role: "group", "aria-label": label }, html("span", {}, label), ...buttons);
}

function runToggles() {
  return html("div", { class: "toggles" }, ...data.runs.map((run) => {
    const button = html("button", { "aria-pressed": "true", title: "Show or hide this run", onclick: () => {
      if (page.hidden.has(run)) page.hidden.delete(run); else page.hidden.add(run);
      button.setAttribute("aria-pressed", String(!page.hidden.has(run)));
      page.redraw();
    } }, swatch(run), run.name);
    return button;
  }));
}

function focusChoice() {
  const select = html("select", { onchange: () => {
    page.focus = data.runs[select.selectedIndex];
    page.redraw();
    details();
  } }, ...data.runs.map((run) => html("option", {}, run.name)));
  return html("label", {}, html("span", {}, "marks, samples and settings of"), select);
}

function markLegend() {
  const any = (key) => data.runs.some((run) => run[key].length);
  const mark = (kind, text) => html("span", { class: "mark" }, html("i", { class: kind }), text);
  return html("div", { class: "marks" },
    any("resets") ? mark("reset", "reference reset") : null,
    any("cosine") ? mark("cosine", "length penalty on") : null,
    any("restarts") ? mark("restart", "restart") : null);
}

function toolbar() {
  const zoom = html("button", { id: "zoom", class: "solid", onclick: () => page.zoom(null) }, "show all steps");
  zoom.hidden = true;
  const smoothing = choices("smoothing", [[0, "off"], [10, "10"], [25, "25"], [100, "100 steps"]], page.smoothing,
    (value) => { page.smoothing = value; page.redraw(); });
  const compare = data.runs.length > 1;
  return html("div", { class: "toolbar" }, compare ? runToggles() : null, smoothing, compare ? focusChoice() : null,
    markLegend(), zoom, html("span", { class: "hint" }, "drag over a panel to zoom"));
}

// -- panels by task, and whatever else was recorded

/** Of runs with several domains: of one alone the mean over all prompts says the same. */
function domainPanels() {
  const prefix = "validation/domain/";
  const keys = new Set(data.runs.flatMap((run) => Object.keys(run.validation)).filter((key) => key.startsWith(prefix)));
  if (keys.size < 2) return [];
  return [...keys].sort().map((key) => ({ title: key.slice(prefix.length), size: "small", series: [
    { key, label: "validation", source: "validation", dots: true,
      error: key.replace("/domain/", "/domain_stderr/") },
    { key: `reward/domain/${key.slice(prefix.length)}`, label: "training", faint: true, colour: 1 }] }));
}

function taskPanels() {
  const tasks = new Set();
  for (const run of data.runs) {
    for (const key of Object.keys(run.validation)) {
      const name = key.replace(/^validation\//, "");
      if (name !== key && !name.includes("/") && !NOT_A_TASK.has(name)) tasks.add(name);
    }
    for (const key of Object.keys(run.train)) if (key.startsWith("reward/raw/")) tasks.add(key.slice(11));
  }
  return [...tasks].sort().map((task) => ({ title: task.replaceAll("_", " "), size: "small", series: [
    { key: `validation/${task}`, label: "validation", source: "validation", dots: true, colour: 0 },
    { key: `reward/raw/${task}`, label: "training", faint: true, colour: 1 }] }));
}

function otherPanels() {
  const drawn = new Set(Object.values(PANELS).flat().flatMap((panel) => panel.series.map((s) => s.key)));
  const keys = new Set(data.runs.flatMap((run) => Object.keys(run.train)));
  return [...keys].filter((key) => !drawn.has(key) && !NOT_A_CURVE.has(key) && !/^reward\/(raw|domain)\//.test(key))
    .sort().map((key) => ({ title: key, size: "small", series: [{ key, label: "" }] }));
}

/** Columns for `count` small panels: the number that leaves the fewest empty places. */
function columnsFor(count) {
  const empty = (n) => (n - (count % n)) % n;
  return count < 3 ? 2 : [4, 3, 5].reduce((best, n) => (empty(n) < empty(best) ? n : best));
}

function curves() {
  if (has(HERO)) section("", html("div", { class: "grid" }, addChart(HERO)));
  const domains = domainPanels();
  if (domains.length) section("Domains", html("div", { class: `grid of${columnsFor(domains.length)}` }, ...domains.map(addChart)));
  const tasks = taskPanels();
  if (tasks.length) {
    const first = tasks.slice(0, FIRST_TASKS);
    const grid = html("div", { class: `grid of${columnsFor(first.length)}` }, ...first.map(addChart));
    const rest = tasks.slice(FIRST_TASKS);
    const more = rest.length ? html("button", { class: "more", onclick: () => {
      grid.append(...rest.map(addChart));
      more.remove();
    } }, `show ${rest.length} more tasks`) : null;
    section("Tasks", grid, more);
  }
  for (const [title, panels] of Object.entries(PANELS)) {
    const present = panels.filter(has);
    if (present.length) section(title, html("div", { class: `grid of${present.length % 3 ? 2 : 3}` }, ...present.map(addChart)));
  }
  const others = otherPanels();
  if (others.length) {
    main.append(html("details", { class: "block" }, html("summary", {}, html("h2", {}, "Everything else recorded")),
      html("div", { class: "grid of4" }, ...others.map(addChart))));
  }
}

// -- events and settings

function eventTable(events) {
  const kinds = [...new Set(events.map((e) => e.event))].sort();
  const select = html("select", { "aria-label": "event" }, html("option", {}, "highlights"), html("option", {}, "all events"), ...kinds.map((k) => html("option", {}, k.replaceAll("_", " "))));
  const body = html("tbody", {});
  const words = (value) => {
    if (typeof value === "number") return figure(value);
    if (value === null || typeof value !== "object") return String(value);
    return Object.entries(value).map(([k, v]) => `${k.replaceAll("_", " ")} ${words(v)}`).join(", ");
  };
  function fill() {
    const kind = kinds[select.selectedIndex - 2];
    const wanted = (e) => (kind ? e.event === kind : select.selectedIndex === 1 || !ROUTINE.has(e.event));
    body.replaceChildren(...events.filter(wanted).map((e) => html("tr", {},
      html("td", { class: "number" }, e.step == null ? "" : Number(e.step).toLocaleString("en")),
      html("td", {}, e.time == null ? "" : new Date(e.time * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" })),
      html("td", {}, html("span", { class: `event ${e.event}` }, String(e.event).replaceAll("_", " "))),
      html("td", { class: "details" }, words(e.details)))));
  }
  select.addEventListener("change", fill);
  fill();
  return [html("div", { class: "filters" }, select), html("div", { class: "card scroll events" }, html("table", {},
    html("thead", {}, html("tr", {}, ...["step", "time", "event", "details"].map((h) => html("th", { scope: "col" }, h)))), body))];
}

function differences() {
  return html("div", { class: "card scroll" }, html("table", {},
    html("thead", {}, html("tr", {}, html("th", { scope: "col" }, "setting"), ...data.runs.map((run) => html("th", { scope: "col" }, swatch(run), run.name)))),
    html("tbody", {}, ...data.differences.map(([key, values]) => html("tr", {}, html("th", { scope: "row" }, html("code", {}, key)), ...values.map((value) => html("td", {}, value)))))));
}

const RUN_SAMPLES = {
  filters: [{ key: "step", all: "all steps" }, { key: "task", all: "all tasks" }],
  chips: (s) => [["shaped", figure(s.shaped)], ["advantage", figure(s.advantage)], ["tokens", figure(s.tokens)],
    ["ended by", s.finish || "–"], ["prompt", s.prompt_id || "–"]],
  what: (s) => s.task.replaceAll("_", " "),
  when: (s) => s.step.toLocaleString("en"),
};
const tail = html("div", {});

/** What belongs to the run in focus alone. */
function details() {
  const run = page.focus;
  const of = data.runs.length > 1 ? ` · ${run.name}` : "";
  const block = (title, children) => html("section", { class: "block" }, html("h2", {}, title + of), ...children);
  tail.replaceChildren(...[
    run.samples.length ? block("Samples", sampleBrowser(run.samples, RUN_SAMPLES)) : null,
    run.events.length ? block("Events", eventTable(run.events)) : null,
    run.recipe ? html("details", { class: "block" }, html("summary", {}, html("h2", {}, `Settings${of}`)), html("pre", { class: "card scroll" }, run.recipe)) : null,
  ].filter(Boolean));
}

main.append(toolbar());
section("", data.runs.length > 1 ? comparison() : cards(data.runs[0]));
curves();
if (data.differences.length) section("Settings that differ", differences());
main.append(tail);
details();
size.observe(main);
