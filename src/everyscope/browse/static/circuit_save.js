// Saving a drawing: as SVG with the colours of the moment inside, as PNG, or as circuit-tracer's JSON with what is pinned.
"use strict";

(() => {
const STYLES = ["fill", "stroke", "stroke-width", "stroke-opacity", "font-size", "font-family", "font-weight", "opacity", "paint-order", "stroke-dasharray"];

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// Several drawings side by side as one, every style written out

function joined(area) {
  const drawings = [...area.querySelectorAll("svg")], { draw } = Circuit;
  const sizes = drawings.map((one) => one.getBoundingClientRect()), height = Math.max(...sizes.map((one) => one.height));
  const whole = draw("svg", { xmlns: "http://www.w3.org/2000/svg", width: sizes.reduce((sum, one) => sum + one.width, 0), height });
  draw("rect", { width: "100%", height: "100%", fill: getComputedStyle(area).backgroundColor }, whole);
  let x = 0;
  drawings.forEach((drawing, place) => {
    const part = draw("g", { transform: `translate(${x} 0)` }, whole);
    for (const child of drawing.children) part.append(styled(child));
    x += sizes[place].width;
  });
  return whole;
}
function styled(original) {
  const copy = original.cloneNode(true), originals = [original, ...original.querySelectorAll("*")];
  [copy, ...copy.querySelectorAll("*")].forEach((made, at) => {
    const style = getComputedStyle(originals[at]);
    for (const name of STYLES) made.setAttribute(name, style.getPropertyValue(name));
    for (const name of ["data-node", "data-key", "tabindex", "role"]) made.removeAttribute(name);
  });
  return copy;
}
function asSvg(area, name) {
  save(new Blob([new XMLSerializer().serializeToString(joined(area))], { type: "image/svg+xml" }), `${name}.svg`);
}

// The same shapes on a canvas: the pages' own rules forbid pictures that are not files of this server

function asPng(area, name) {
  const drawings = [...area.querySelectorAll("svg")], sizes = drawings.map((one) => one.getBoundingClientRect()), scale = 2;
  const board = document.createElement("canvas"), pen = board.getContext("2d");
  board.width = scale * sizes.reduce((sum, one) => sum + one.width, 0);
  board.height = scale * Math.max(...sizes.map((one) => one.height));
  pen.scale(scale, scale);
  pen.fillStyle = getComputedStyle(area).backgroundColor;
  pen.fillRect(0, 0, board.width, board.height);
  drawings.forEach((drawing, place) => {
    for (const shape of drawing.querySelectorAll("path, circle, rect, line, text")) ink(pen, shape);
    pen.translate(sizes[place].width, 0);
  });
  board.toBlob((blob) => save(blob, `${name}.png`));
}
function ink(pen, shape) {
  const style = getComputedStyle(shape), is = (name) => Number(shape.getAttribute(name) ?? 0);
  pen.save();
  const turned = shape.transform.baseVal.consolidate()?.matrix;
  if (turned) pen.transform(turned.a, turned.b, turned.c, turned.d, turned.e, turned.f);
  pen.globalAlpha = Number(style.opacity);
  pen.fillStyle = style.fill;
  pen.strokeStyle = style.stroke;
  pen.lineWidth = parseFloat(style.strokeWidth) || 1;
  pen.setLineDash(style.strokeDasharray === "none" ? [] : style.strokeDasharray.split(/[, ]+/).map(parseFloat));
  if (shape.tagName === "text") {
    pen.font = `${style.fontWeight} ${style.fontSize} ${style.fontFamily}`;
    pen.textAlign = { middle: "center", end: "right" }[style.textAnchor] ?? "left";
    pen.lineJoin = "round";
    if (style.stroke !== "none") pen.strokeText(shape.textContent, is("x"), is("y"));
    pen.fillText(shape.textContent, is("x"), is("y"));
  } else {
    const way = shape.tagName === "path" ? new Path2D(shape.getAttribute("d")) : new Path2D();
    if (shape.tagName === "circle") way.arc(is("cx"), is("cy"), is("r"), 0, 2 * Math.PI);
    if (shape.tagName === "rect") way.roundRect(is("x"), is("y"), is("width"), is("height"), is("rx"));
    if (shape.tagName === "line") { way.moveTo(is("x1"), is("y1")); way.lineTo(is("x2"), is("y2")); }
    if (style.fill !== "none" && shape.tagName !== "line") pen.fill(way);
    pen.globalAlpha *= Number(style.strokeOpacity);
    if (style.stroke !== "none") pen.stroke(way);
  }
  pen.restore();
}

// circuit-tracer's JSON: the server prunes as the sliders stand; a file has one that was made with it

function tellForeign() {
  const { graph, state, nodes, byId } = Circuit, link = byId("foreign"), ids = (places) => places.map((at) => nodes[at].id);
  if (!graph.foreign) return;
  const fields = new URLSearchParams({ nodes: state.nodes, edges: state.edges, node: nodes[state.chosen].id });
  if (state.pins.length) fields.set("pins", ids(state.pins).join(","));
  for (const group of state.groups) fields.append("group", `${group.name}:${ids(group.members).join(",")}`);
  link.href = `${graph.foreign}?${fields}`;
}
function saveForeign(event) {
  const { graph, state, nodes } = Circuit;
  if (graph.foreign) return;
  event.preventDefault();
  const known = new Set(graph.foreign_json.nodes.map((node) => node.node_id)), ids = (places) => places.map((at) => nodes[at].id).filter((id) => known.has(id));
  const supernodes = state.groups.map((group) => [group.name, ...ids(group.members)]);
  const whole = { ...graph.foreign_json, qParams: { ...graph.foreign_json.qParams, pinnedIds: ids(state.pins), supernodes } };
  save(new Blob([JSON.stringify(whole)], { type: "application/json" }), `${graph.name}.json`);
}

Circuit.parts.push({
  start() {
    const { byId, graph, canvas } = Circuit;
    byId("svg").addEventListener("click", () => asSvg(canvas, graph.name));
    byId("png").addEventListener("click", () => asPng(canvas, graph.name));
    byId("pins-svg").addEventListener("click", () => asSvg(byId("subgraph"), `${graph.name}-pinned`));
    byId("pins-png").addEventListener("click", () => asPng(byId("subgraph"), `${graph.name}-pinned`));
    byId("foreign").addEventListener("click", saveForeign);
  },
  refresh: tellForeign,
});
})();
