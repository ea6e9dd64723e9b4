// Elements of the page. What a model wrote reaches it here only, as text.
"use strict";

/** An SVG element; attributes that are null are left out. */
function svg(name, attributes = {}, ...children) {
  return build(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

/** An HTML element. Strings become text nodes, never markup: what a model wrote stays text. */
function html(name, attributes = {}, ...children) {
  return build(document.createElement(name), attributes, children);
}

function build(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value == null) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}
