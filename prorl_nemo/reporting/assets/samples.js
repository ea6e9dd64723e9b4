// The sample browser: a list with filters beside one sample in full.
"use strict";

const VERDICTS = {
  "any score": () => true,
  "full score": (s) => s.score >= 1,
  "part of it": (s) => s.score > 0 && s.score < 1,
  "no score": (s) => s.score != null && s.score <= 0,
  "truncated": (s) => s.finish === "length",
};

function verdictClass(sample) {
  return sample.score >= 1 ? "good" : sample.score > 0 ? "fair" : "bad";
}

/** A response, its reasoning between <think> tags set apart. */
function responseParts(text) {
  const end = text.indexOf("</think>");
  if (end < 0) return [html("div", { class: "text" }, text)];
  const thought = text.slice(0, end).replace(/^\s*<think>/, "");
  return [html("div", { class: "text thought" }, thought.trim()), html("div", { class: "text" }, text.slice(end + 8).trim())];
}

function transcript(sample, kind) {
  const chip = (label, value) => html("span", { class: "chip" }, `${label} `, html("b", {}, value));
  const turns = sample.turns.map(([role, text]) => html("div", { class: "turn" }, html("span", { class: "role" }, role), html("div", { class: "text" }, text)));
  return html("div", { class: "transcript" },
    html("div", { class: "chips" },
      html("span", { class: `chip ${verdictClass(sample)}` }, "score ", html("b", {}, figure(sample.score))),
      ...kind.chips(sample).map(([label, value]) => chip(label, value))),
    sample.reason ? html("p", { class: "reason" }, sample.reason) : null,
    ...turns,
    html("div", { class: "turn answer" }, html("span", { class: "role" }, "response"), ...responseParts(sample.response)));
}

/** Samples have score, finish, reason, turns and response. `kind` says what else is shown of them:
 *  filters ({ key, all }), chips (sample => [[label, value]]), what and when (sample => text). */
function sampleBrowser(samples, kind) {
  const list = html("div", { class: "list", tabindex: "0", role: "listbox", "aria-label": "samples" });
  const view = html("div", { class: "view" });
  const count = html("span", { class: "count" });
  const options = (values) => values.map((value) => html("option", {}, String(value)));
  const inOrder = (values) => (values.every((v) => typeof v === "number") ? values : values.sort());
  const filters = kind.filters.map(({ key, all }) => {
    const values = inOrder([...new Set(samples.map((s) => s[key]))]);
    const select = html("select", { "aria-label": key }, ...options([all, ...values]));
    return { select, keeps: (s) => !select.selectedIndex || s[key] === values[select.selectedIndex - 1] };
  });
  const verdict = html("select", { "aria-label": "score" }, ...options(Object.keys(VERDICTS)));
  const words = html("input", { type: "search", placeholder: "words in the response", "aria-label": "words in the response" });
  let shown = [], at = 0;

  function choose(index) {
    at = Math.min(Math.max(index, 0), shown.length - 1);
    [...list.children].forEach((item, i) => item.setAttribute("aria-selected", String(i === at)));
    view.replaceChildren(shown[at] ? transcript(shown[at], kind) : html("p", { class: "empty" }, "no sample matches"));
    view.scrollTop = 0;
    const item = list.children[at];
    if (item && document.activeElement === list) item.scrollIntoView({ block: "nearest" });
  }

  function filter() {
    const wanted = words.value.toLowerCase();
    shown = samples.filter((s) => filters.every((f) => f.keeps(s)) && VERDICTS[verdict.value](s) && (!wanted || s.response.toLowerCase().includes(wanted)));
    count.textContent = `${shown.length} of ${samples.length} samples`;
    list.replaceChildren(...shown.map((s, i) => html("div", { class: "item", role: "option", onclick: () => choose(i) },
      html("span", { class: `score ${verdictClass(s)}` }, s.score == null ? "–" : String(Number(s.score.toFixed(2)))),
      html("span", { class: "what" }, kind.what(s)),
      html("span", { class: "when" }, `${kind.when(s)}${s.finish === "length" ? " ✂" : ""}`))));
    choose(0);
  }

  [...filters.map((f) => f.select), verdict].forEach((select) => select.addEventListener("change", filter));
  words.addEventListener("input", filter);
  list.addEventListener("keydown", (event) => {
    const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (move) { event.preventDefault(); choose(at + move); }
  });
  filter();
  return [html("div", { class: "filters" }, ...filters.map((f) => f.select), verdict, words, count), html("div", { class: "browser" }, list, view)];
}
