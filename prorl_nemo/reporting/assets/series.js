// Arithmetic of the curves: no document, no state. Tested from Python in an embedded engine.
"use strict";

/** Mean over the window of `width` steps centred on each point; gaps stay gaps.
 *  The window never crosses a step in `breaks` (ascending), where the quantity jumps. */
function smooth(steps, values, width, breaks = []) {
  const sums = new Float64Array(steps.length + 1);
  const counts = new Int32Array(steps.length + 1);
  values.forEach((value, i) => {
    sums[i + 1] = sums[i] + (value ?? 0);
    counts[i + 1] = counts[i] + (value == null ? 0 : 1);
  });
  let left = 0, right = 0, next = 0, from = -Infinity;
  return values.map((value, i) => {
    while (next < breaks.length && steps[i] >= breaks[next]) from = breaks[next++];
    const to = next < breaks.length ? breaks[next] : Infinity;
    while (steps[left] < Math.max(steps[i] - width / 2, from)) left++;
    while (right < steps.length && steps[right] <= steps[i] + width / 2 && steps[right] < to) right++;
    return value == null ? null : (sums[right] - sums[left]) / (counts[right] - counts[left]);
  });
}

/** Indices to draw so that a line over `pixels` columns looks as all its points would:
 *  the first, lowest, highest and last of each column. Gaps keep one index each. */
function decimate(steps, values, pixels) {
  const n = steps.length;
  if (n <= 2 * pixels) return steps.map((_, i) => i);
  const scale = pixels / (steps[n - 1] - steps[0] || 1);
  const column = (i) => Math.floor((steps[i] - steps[0]) * scale);
  const kept = [];
  for (let start = 0; start < n; ) {
    let end = start, low = start, high = start, gap = -1;
    for (; end < n && column(end) === column(start); end++) {
      if (values[end] == null) { gap = end; continue; }
      if (values[low] == null || values[end] < values[low]) low = end;
      if (values[high] == null || values[end] > values[high]) high = end;
    }
    const chosen = new Set([start, low, high, end - 1]);
    if (gap >= 0) chosen.add(gap);
    kept.push(...[...chosen].sort((a, b) => a - b));
    start = end;
  }
  return kept;
}

/** Round tick values inside [low, high], about `count` of them, in steps of 1, 2, 2.5 or 5. */
function ticks(low, high, count) {
  if (!(high > low)) return [low];
  const rough = (high - low) / count;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 2.5, 5, 10].find((m) => m * unit >= rough * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k <= high / step + 1e-9; k++) {
    found.push(Number((k * step).toPrecision(12)));
  }
  return found;
}

/** Powers of ten inside [low, high], thinned to at most `count`. */
function logTicks(low, high, count) {
  const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
  if (last - first < 1) return ticks(low, high, 3).filter((t) => t > 0);
  const stride = Math.ceil((last - first + 1) / count);
  const found = [];
  for (let power = first; power <= last; power += stride) found.push(Number(`1e${power}`));
  return found;
}

/** Axis range around the values: a little air, zero included when it is near. */
function range(values, log) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value == null || (log && value <= 0)) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (low > high) return log ? [0.1, 1] : [0, 1];
  if (log) return low === high ? [low / 2, high * 2] : [low / 1.15, high * 1.15];
  if (low === high) {
    const air = Math.abs(low) * 0.1 || 1;
    return low === 0 ? [0, 1] : [low - air, high + air];
  }
  const air = (high - low) * 0.06;
  const nearZero = low >= 0 && low < 0.4 * high;
  return [nearZero ? 0 : low - air, high + air];
}

/** Index of the last step at or before `step`, -1 before the first. `steps` ascend. */
function indexAt(steps, step) {
  let low = 0, high = steps.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle + 1; else high = middle;
  }
  return low - 1;
}

/** Means of at most `pixels` equal shares of each column, for stacked areas. */
function shares(steps, columns, pixels) {
  const count = Math.min(pixels, steps.length);
  const mean = (values, a, b) => {
    let sum = 0;
    for (let i = a; i < b; i++) sum += values[i] ?? 0;
    return sum / (b - a);
  };
  const edges = Array.from({ length: count + 1 }, (_, i) => Math.round((i * steps.length) / count));
  const over = (values) => edges.slice(1).map((b, i) => mean(values, edges[i], b));
  return { steps: over(steps), columns: columns.map(over) };
}

/** Significant digits that tell neighbouring ticks apart. */
function tickDigits(values) {
  const largest = Math.max(...values.map(Math.abs));
  const step = values.length > 1 ? Math.abs(values[1] - values[0]) : largest;
  return largest > 0 && step > 0 ? Math.max(3, Math.ceil(Math.log10(largest / step)) + 1) : 3;
}

/** A number on an axis, zeros trimmed. Units: "%" (a share), "tokens", "" (plain). */
function format(value, unit = "", digits = 4) {
  if (value == null) return "–";
  if (unit === "%") return `${trim(value * 100, digits)}%`;
  return unit === "tokens" ? short(value) : trim(value, digits);
}

/** A number to read, in a fixed count of digits so that it does not jump about. */
function figure(value, unit = "", digits = 4) {
  if (value == null) return "–";
  if (unit === "%") return `${figure(value * 100, "", digits - 1)}%`;
  if (unit === "s") return `${figure(value, "", digits - 1)} s`;
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6) return unit === "tokens" ? short(value) : trim(value, digits);
  return size >= 1000 ? Math.round(value).toLocaleString("en") : value.toPrecision(digits);
}

function trim(value, digits) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) {
    return value.toExponential(digits - 2).replace(/\.?0+e/, "e").replace("e+", "e");
  }
  return Number(value.toPrecision(digits)).toLocaleString("en", { maximumFractionDigits: 12 });
}

function short(value) {
  for (const [size, suffix] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= 0.9995 * size && (size > 1e3 || Math.abs(value) >= 1e4)) {
      return `${Number((value / size).toPrecision(3))}${suffix}`;
    }
  }
  return trim(value, 4);
}

/** Seconds as `8 s`, `12 m`, `3 h 12 m`, `2 d 5 h`. */
function duration(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} m ${whole % 60} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} m`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}
