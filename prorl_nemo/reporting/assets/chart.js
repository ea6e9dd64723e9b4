// One panel: a title, a read-out that doubles as legend, and an SVG over the shared step axis.
"use strict";

const DASHES = ["", "6 3", "2 3", "8 3 2 3"];
const COLOURS = 8; // --c0 .. --c7 in the style sheet
let clips = 0;

class Chart {
  /** `panel` says what to draw (see PANELS), `page` which runs, steps and smoothing. */
  constructor(panel, page) {
    this.panel = panel;
    this.page = page;
    this.log = false;
    this.readout = html("div", { class: "readout" });
    this.plot = html("div", { class: "plot" });
    const log = html("button", { class: "log", title: "Logarithmic axis", "aria-pressed": "false",
      onclick: () => {
        this.log = !this.log;
        log.setAttribute("aria-pressed", String(this.log));
        this.draw();
      } }, "log");
    const help = panel.help ? html("i", { class: "help", title: panel.help, "aria-label": panel.help }, "?") : null;
    this.element = html("section", { class: `panel ${panel.size ?? ""}` },
      html("header", {}, html("h3", {}, panel.title, help), panel.stack ? null : log),
      this.readout, this.plot);
    this.size = { tall: 320, small: 104 }[panel.size] ?? 176;
    this.plot.style.minHeight = `${this.size}px`; // no jump when a panel is drawn on scrolling
  }

  /** The curves to draw: one per visible run and series that the run has. */
  lines() {
    const { page, panel } = this;
    const single = page.runs.length === 1 || panel.stack;
    const runs = panel.stack ? [page.focus] : page.runs.filter((run) => !page.hidden.has(run));
    const table = (run, series) => run[series.source ?? "train"];
    const recorded = panel.series.filter((series) => runs.some((run) => table(run, series)[series.key]));
    // A small panel has room for one series of several runs: the first that was recorded.
    const chosen = panel.size === "small" && !single ? recorded.slice(0, 1) : recorded;
    return runs.flatMap((run) => chosen.flatMap((series, index) => {
      const values = table(run, series)[series.key];
      if (!values) return [];
      const steps = table(run, series).step;
      const smoothed = page.smoothing && !series.dots && !series.exact
        ? smooth(steps, values, page.smoothing, run.breaks) : null;
      return [{
        run, series, steps, values, smoothed,
        // The raw curve behind a smoothed one, where it does not bury its neighbours.
        raw: !smoothed || (panel.size !== "small" && runs.length === 1),
        colour: `var(--c${(single ? series.colour ?? index : run.index) % COLOURS})`,
        dash: single ? series.dash ?? "" : DASHES[index % DASHES.length],
        error: series.error ? table(run, series)[series.error] : null,
      }];
    }));
  }

  draw() {
    const width = this.plot.clientWidth;
    if (!width) return;
    const top = this.panel.size === "tall" ? 26 : 10;
    this.box = { left: 46, right: width - 18, top, bottom: this.size - 22 };
    this.current = this.lines();
    if (!this.current.length) {
      this.plot.replaceChildren(html("p", { class: "empty" }, "not recorded"));
      this.readout.replaceChildren();
      return;
    }
    this.layers = this.panel.stack ? this.stackLayers() : null;
    this.setScales();
    const clip = `clip${clips++}`;
    const { left, right, bottom } = this.box;
    const curves = svg("g", { "clip-path": `url(#${clip})` },
      ...(this.layers ? this.areas() : this.current.toReversed().flatMap((line) => this.curve(line))));
    this.cross = svg("g", { class: "cross" });
    const root = svg("svg", { width, height: this.size, viewBox: `0 0 ${width} ${this.size}`, role: "img", "aria-label": this.panel.title },
      svg("defs", {}, svg("clipPath", { id: clip }, svg("rect", {
        x: left - 4, y: top - 4, width: Math.max(right - left + 8, 0), height: bottom - top + 8 }))),
      this.background(), this.axes(), curves, this.marks(), this.cross);
    this.listen(root);
    this.plot.replaceChildren(root);
    this.legend();
    this.hover(this.page.step);
  }

  setScales() {
    const [from, to] = this.page.range;
    const seen = [];
    for (const { steps, values, smoothed, raw, error } of this.current) {
      const drawn = raw ? values : smoothed;
      drawn.forEach((value, i) => {
        const step = steps[i];
        if (value == null || step < from || step > to) return;
        const half = error ? 2 * (error[i] ?? 0) : 0;
        seen.push(value - half, value + half);
      });
    }
    // Small panels stand side by side to be compared, so they all show zero.
    if (this.panel.size === "small" && !this.log) seen.push(0);
    const [low, high] = range(this.layers ? this.layers.totals.concat(0) : seen, this.log);
    const { left, right, top, bottom } = this.box;
    const fix = this.log ? Math.log10 : (value) => value;
    const a = fix(low), b = fix(high);
    this.domain = [low, high];
    this.x = (step) => left + ((step - from) / (to - from || 1)) * (right - left);
    this.y = (value) => (this.log && value <= 0 ? bottom + 9
      : bottom - ((fix(value) - a) / (b - a)) * (bottom - top));
    this.stepAt = (x) => from + ((x - left) / (right - left)) * (to - from);
  }

  /** Shaded cosine-penalty steps and stage names, of the run in focus. */
  background() {
    const { left, right, top, bottom } = this.box;
    const [from, to] = this.page.range;
    const span = (first, last) => {
      const a = Math.max(this.x(first), left), b = Math.min(this.x(last), right);
      return b > a ? { x: a, width: b - a } : null;
    };
    const group = svg("g", {});
    for (const [first, last] of this.page.focus.cosine) {
      const at = span(first - 0.5, last + 0.5);
      if (at) group.append(svg("rect", { class: "cosine", y: top, height: bottom - top, ...at }));
    }
    this.page.focus.stages.forEach((stage, i) => {
      const at = span(i ? stage.from - 0.5 : from, i + 1 < this.page.focus.stages.length ? stage.to + 0.5 : to);
      if (!at) return;
      group.append(svg("rect", { class: `stage stage${i % 2}`, y: top - 6, height: 3, ...at }));
      if (this.panel.size !== "tall") return;
      const limit = stage.limit ? ` · ${format(stage.limit)} tokens` : "";
      const text = `${stage.name}${limit}`;
      const fits = Math.floor(at.width / 6.4);
      if (fits < 4) return;
      const shown = text.length > fits ? `${text.slice(0, fits - 1)}…` : text;
      group.append(svg("text", { class: "stage-name", x: at.x + 2, y: top - 11 }, shown));
    });
    return group;
  }

  axes() {
    const { left, right, bottom } = this.box;
    const rows = Math.max(2, Math.round((bottom - this.box.top) / 36));
    const values = this.log ? logTicks(...this.domain, rows) : ticks(...this.domain, rows);
    const digits = tickDigits(values);
    const columns = Math.max(2, Math.floor((right - left) / 90));
    const steps = ticks(...this.page.range, columns).filter(Number.isInteger);
    return svg("g", { class: "axes" },
      ...values.flatMap((value) => [
        svg("line", { x1: left, x2: right, y1: this.y(value), y2: this.y(value) }),
        svg("text", { x: left - 6, y: this.y(value) + 3.5, "text-anchor": "end" },
          format(value, this.panel.unit, digits)),
      ]),
      ...steps.map((step) => svg("text", { x: this.x(step), y: bottom + 15, "text-anchor": "middle" },
        step.toLocaleString("en"))));
  }

  curve({ steps, values, smoothed, raw, error, series, colour, dash }) {
    const parts = [];
    if (error) parts.push(svg("path", { d: this.band(steps, values, error), fill: colour, class: "band" }));
    if (smoothed && raw) {
      parts.push(svg("path", { d: this.path(steps, values), stroke: colour, class: "line raw" }));
    }
    parts.push(svg("path", { d: this.path(steps, smoothed ?? values), stroke: colour,
      "stroke-dasharray": dash || null, class: `line ${series.faint ? "faint" : ""} ${series.dots ? "thick" : ""}` }));
    const few = steps.length < (this.box.right - this.box.left) / 6;
    if (series.dots && few) {
      const radius = this.panel.size === "small" ? 1.8 : 2.6;
      steps.forEach((step, i) => values[i] != null && parts.push(svg("circle", {
        cx: this.x(step), cy: this.y(values[i]), r: radius, fill: colour })));
    }
    return parts;
  }

  /** Path of a line, thinned to the pixels there are, broken at gaps. */
  path(steps, values) {
    const [a, b] = this.window(steps);
    const part = steps.slice(a, b), drawn = values.slice(a, b);
    let pen = "M", d = "";
    for (const i of decimate(part, drawn, this.box.right - this.box.left)) {
      if (drawn[i] == null) { pen = "M"; continue; }
      d += `${pen}${this.x(part[i]).toFixed(1)} ${this.y(drawn[i]).toFixed(1)}`;
      pen = "L";
    }
    return d;
  }

  band(steps, values, error) {
    const known = steps.map((_, i) => i).filter((i) => values[i] != null);
    const edge = (sign) => (i) => {
      const y = this.y(values[i] + sign * 2 * (error[i] ?? 0));
      return `${this.x(steps[i]).toFixed(1)} ${y.toFixed(1)}`;
    };
    const points = [...known.map(edge(1)), ...known.reverse().map(edge(-1))];
    return points.length ? `M${points.join("L")}Z` : "";
  }

  /** Indices [a, b) of the steps in view, one beyond each end so that lines reach the edge. */
  window(steps) {
    const [from, to] = this.page.range;
    return [Math.max(indexAt(steps, from - 1e-9), 0), indexAt(steps, to) + 2];
  }

  stackLayers() {
    const [a, b] = this.window(this.current[0].steps);
    const steps = this.current[0].steps.slice(a, b);
    const columns = this.current.map((line) => (line.smoothed ?? line.values).slice(a, b));
    const thin = shares(steps, columns, this.box.right - this.box.left);
    let below = thin.steps.map(() => 0);
    const tops = thin.columns.map((column) => (below = below.map((sum, i) => sum + column[i])));
    return { steps: thin.steps, tops, totals: below };
  }

  areas() {
    const { steps, tops } = this.layers;
    const points = (values) => steps.map((s, i) => `${this.x(s).toFixed(1)} ${this.y(values[i]).toFixed(1)}`);
    return tops.map((upper, k) => {
      const lower = k ? tops[k - 1] : steps.map(() => 0);
      const d = `M${points(upper).join("L")}L${points(lower).reverse().join("L")}Z`;
      return svg("path", { d, fill: this.current[k].colour, class: "area" });
    });
  }

  /** Vertical marks of the run in focus: reference resets and restarts. */
  marks() {
    const { top, bottom } = this.box;
    const [from, to] = this.page.range;
    const group = svg("g", {});
    const each = (steps, draw) => steps.filter((s) => s >= from && s <= to).forEach((s) => draw(this.x(s)));
    each(this.page.focus.resets, (x) => group.append(
      svg("line", { class: "reset", x1: x, x2: x, y1: top, y2: bottom }),
      this.panel.size === "small" ? ""
        : svg("path", { class: "reset-head", d: `M${x} ${top - 4}l4 4l-4 4l-4 -4Z` })));
    each(this.page.focus.restarts, (x) => group.append(
      svg("path", { class: "restart", d: `M${x} ${bottom - 6}l3.5 6h-7Z` })));
    return group;
  }

  /** The read-out: series named once, one value per visible run. */
  legend() {
    this.values = [];
    const groups = new Map();
    for (const line of this.current) {
      if (!groups.has(line.series)) groups.set(line.series, []);
      groups.get(line.series).push(line);
    }
    const many = this.page.runs.length > 1 && !this.panel.stack;
    this.readout.replaceChildren(...[...groups].map(([series, lines]) => {
      const named = groups.size > 1 || !many;
      const swatch = svg("svg", { width: 16, height: 8, class: "swatch" }, svg("line", {
        x1: 0, x2: 16, y1: 4, y2: 4, stroke: many ? "currentColor" : lines[0].colour,
        "stroke-dasharray": lines[0].dash || null }));
      const values = lines.map((line) => {
        const value = html("b", {});
        if (many) value.style.color = line.colour;
        this.values.push([line, value]);
        return value;
      });
      return html("span", {}, named ? swatch : null, named ? `${series.label} ` : null, ...values);
    }));
  }

  /** Show the values at a step, or the latest in view where it is null. */
  hover(step) {
    if (!this.current?.length) return;
    const { left, right, top, bottom } = this.box;
    const marks = [];
    const inside = step != null && this.x(step) >= left - 1 && this.x(step) <= right + 1;
    for (const [line, value] of this.values) {
      const values = line.smoothed ?? line.values;
      let i = indexAt(line.steps, step ?? this.page.range[1]);
      if (step == null || line.series.dots) while (i > 0 && values[i] == null) i--;
      const shown = i >= 0 ? values[i] : null;
      const error = line.error?.[i];
      value.textContent = figure(shown, this.panel.unit, this.panel.digits)
        + (error != null && shown != null ? ` ± ${figure(error, this.panel.unit, 2)}` : "");
      if (inside && shown != null && !this.panel.stack) {
        marks.push(svg("circle", { cx: this.x(line.steps[i]), cy: this.y(shown), r: 3.2, fill: line.colour }));
      }
    }
    if (!inside) { this.cross.replaceChildren(); return; }
    const x = this.x(step);
    const label = Math.round(step).toLocaleString("en");
    const wide = label.length * 6.6 + 12;
    const at = Math.min(Math.max(x, left + wide / 2), right - wide / 2);
    this.cross.replaceChildren(
      svg("line", { x1: x, x2: x, y1: top, y2: bottom }), ...marks,
      svg("rect", { x: at - wide / 2, y: bottom + 3, width: wide, height: 17, rx: 4 }),
      svg("text", { x: at, y: bottom + 15, "text-anchor": "middle" }, label));
  }

  /** Moving reads values in every panel; dragging zooms every panel; a double click shows all. */
  listen(root) {
    let start = null, brush = null;
    const step = (event) => {
      const x = event.clientX - root.getBoundingClientRect().left;
      return Math.min(Math.max(this.stepAt(x), this.page.range[0]), this.page.range[1]);
    };
    root.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      start = step(event);
      brush = svg("rect", { class: "brush", y: this.box.top, height: this.box.bottom - this.box.top });
      root.append(brush);
    });
    root.addEventListener("pointermove", (event) => {
      const now = step(event);
      this.page.hover(Math.round(now));
      if (brush) {
        const [a, b] = [this.x(start), this.x(now)].sort((p, q) => p - q);
        brush.setAttribute("x", a);
        brush.setAttribute("width", b - a);
      }
    });
    root.addEventListener("pointerup", (event) => {
      if (!brush) return;
      const [a, b] = [start, step(event)].sort((p, q) => p - q);
      brush.remove();
      brush = null;
      if (this.x(b) - this.x(a) > 8 && b - a >= 2) this.page.zoom([Math.floor(a), Math.ceil(b)]);
    });
    root.addEventListener("pointerleave", () => {
      brush?.remove();
      brush = null;
      this.page.hover(null);
    });
    root.addEventListener("dblclick", () => this.page.zoom(null));
  }
}
