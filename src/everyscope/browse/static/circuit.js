// An attribution graph: tokens along x, layers along y. Everything that a stranger wrote goes in as text, never as markup.

const root = document.getElementById("circuit");
const canvas = document.getElementById("canvas");
const byId = (id) => document.getElementById(id);
const graph = await (await fetch(root.dataset.graph)).json();
const { nodes, edges, tokens } = graph;
const SHOWN = 10, LABELS = 16, ROW = 78, STEP = 15, AXIS = 58, PAD = { left: 14, top: 34, bottom: 62, right: 30 };

// What the graph says of each node

const number = new Map(nodes.map((node, place) => [node.id, place]));
const into = nodes.map(() => []), outOf = nodes.map(() => []);
edges.forEach(([source, target, weight, cum]) => {
  const edge = { source, target, weight, cum };
  into[target].push(edge);
  outOf[source].push(edge);
});
for (const list of [...into, ...outOf]) list.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));

const tokenAt = (node) => `${tokens[node.position]} (${node.position})`;
function nameOf(node) {
  if (node.kind === "latent") return node.label || `latent ${node.index}`;
  if (node.kind === "error") return "error of the transcoder";
  if (node.kind === "token") return tokens[node.position];
  return node.label;
}
function whereOf(node) {
  if (node.kind === "latent") return `L${node.layer} #${node.index} on ${tokenAt(node)}`;
  if (node.kind === "error") return `L${node.layer} on ${tokenAt(node)}`;
  if (node.kind === "token") return `token ${node.position}`;
  return node.probability === undefined ? "target" : `output, ${(100 * node.probability).toFixed(1)} %`;
}
const short = (text, most) => ([...text].length > most ? `${[...text].slice(0, most - 1).join("")}…` : text);
const figure = (value) => (value === 0 ? "0" : Math.abs(value) >= 1000 ? value.toFixed(0) : value.toPrecision(3));

// What is chosen, pinned and drawn; the address holds it

const state = { chosen: null, hovered: null, pins: [], nodes: 80, edges: 90, seek: "" };
function readAddress() {
  const said = new URLSearchParams(location.hash.slice(1));
  const known = (text) => (text || "").split(",").map((id) => number.get(id)).filter((place) => place !== undefined);
  state.pins = [...new Set(known(said.get("pins")))];
  const targets = nodes.map((node, place) => place).filter((place) => nodes[place].weight > 0);
  targets.sort((a, b) => nodes[b].weight - nodes[a].weight);
  state.chosen = known(said.get("node"))[0] ?? targets[0] ?? 0;
  for (const name of ["nodes", "edges"]) {
    const value = Number(said.get(name) || state[name]);
    byId(name).value = Number.isFinite(value) ? value : state[name];
    state[name] = Number(byId(name).value);
  }
  state.seek = byId("seek").value = (said.get("seek") || "").slice(0, 200);
}
function writeAddress() {
  const said = new URLSearchParams({ node: nodes[state.chosen].id, nodes: state.nodes, edges: state.edges });
  if (state.pins.length) said.set("pins", state.pins.map((place) => nodes[place].id).join(","));
  if (state.seek) said.set("seek", state.seek);
  history.replaceState(null, "", `#${said}`);
}

// Which nodes and edges pass the sliders: latents and errors that lead nowhere fall

let isShown = [], shownEdges = [];
function select() {
  isShown = nodes.map((node, place) => node.fixed || node.cum <= state.nodes / 100 || state.pins.includes(place) || place === state.chosen);
  const passes = (edge) => edge[3] <= state.edges / 100 && isShown[edge[0]] && isShown[edge[1]];
  for (let again = true; again; ) {
    shownEdges = edges.filter(passes);
    const leads = new Set(shownEdges.map((edge) => edge[0]));
    again = false;
    nodes.forEach((node, place) => {
      if (!isShown[place] || node.fixed || leads.has(place) || state.pins.includes(place) || place === state.chosen) return;
      isShown[place] = false;
      again = true;
    });
  }
}

// Places: a column for each token, as wide as its fullest cell

let places = [], size = { width: 0, height: 0 };
const row = (node) => (node.kind === "token" ? 0 : node.kind === "logit" ? graph.layers + 1 : node.layer + 1);
function place() {
  const cells = new Map();
  nodes.forEach((node, at) => {
    if (!isShown[at]) return;
    const key = `${row(node)} ${node.position}`;
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(at);
  });
  const widths = tokens.map((token) => Math.min(90, 26 + 6.6 * [...short(token, 10)].length));
  for (const [key, list] of cells) {
    list.sort((a, b) => nodes[b].influence - nodes[a].influence);
    const position = Number(key.split(" ")[1]);
    widths[position] = Math.max(widths[position], 20 + STEP * Math.min(list.length, 9) * (nodes[list[0]].kind === "logit" ? 4 : 1));
  }
  const spare = canvas.clientWidth - AXIS - PAD.left - PAD.right - widths.reduce((a, b) => a + b, 0);
  const wider = Math.max(0, spare / tokens.length);
  const starts = [];
  let x = PAD.left;
  widths.forEach((width, position) => {
    starts[position] = x;
    x += width + wider;
    widths[position] = width + wider;
  });
  size = { width: Math.max(x + PAD.right, canvas.clientWidth - AXIS), height: PAD.top + PAD.bottom + ROW * (graph.layers + 1) };
  places = [];
  for (const [key, list] of cells) {
    const [level, position] = key.split(" ").map(Number);
    const isLogit = level === graph.layers + 1, step = isLogit ? 4 * STEP : STEP, perLine = 9;
    list.forEach((at, order) => {
      const line = Math.floor(order / perLine), inLine = Math.min(list.length - line * perLine, perLine);
      const middle = starts[position] + widths[position] / 2 + ((order % perLine) - (inLine - 1) / 2) * step;
      places[at] = [middle, size.height - PAD.bottom - level * ROW - line * 12];
    });
  }
  return { starts, widths };
}

// Drawing

const SVG = "http://www.w3.org/2000/svg";
function draw(name, attributes, parent, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent?.append(made);
  return made;
}
function mark(node, [x, y], parent) {
  const r = node.kind === "latent" || node.kind === "error" ? 3.2 + 7 * Math.sqrt(Math.min(1, node.influence * 4)) : 5.5;
  if (node.kind === "latent") return draw("circle", { cx: x, cy: y, r, class: "c-latent" }, parent);
  const side = 1.5 * r, box = { x: x - side / 2, y: y - side / 2, width: side, height: side };
  if (node.kind === "error") return draw("rect", { ...box, class: "c-error", transform: `rotate(45 ${x} ${y})` }, parent);
  return draw("rect", { ...box, class: "c-token", rx: 2 }, parent);
}
const curve = ([x, y], [u, v]) => `M${x.toFixed(1)} ${y.toFixed(1)}C${x.toFixed(1)} ${((y + v) / 2).toFixed(1)} ${u.toFixed(1)} ${((y + v) / 2).toFixed(1)} ${u.toFixed(1)} ${v.toFixed(1)}`;
let picture = null;
function paint() {
  select();
  const { starts, widths } = place();
  picture = draw("svg", { width: size.width, height: size.height, viewBox: `0 0 ${size.width} ${size.height}` });
  const back = draw("g", { class: "back" }, picture);
  const axis = draw("svg", { width: AXIS, height: size.height, class: "axis back", "aria-hidden": "true" });
  for (let level = 0; level <= graph.layers + 1; level += 1) {
    const y = size.height - PAD.bottom - level * ROW;
    draw("line", { x1: PAD.left - 10, x2: size.width - 8, y1: y, y2: y }, back);
    draw("text", { x: 8, y: y + 4 }, axis, level === 0 ? "tokens" : level > graph.layers ? "output" : `layer ${level - 1}`);
  }
  tokens.forEach((token, position) => {
    const x = starts[position] + widths[position] / 2;
    draw("text", { x, y: size.height - PAD.bottom + 24, class: "word", "text-anchor": "middle" }, back, short(token, Math.max(4, Math.floor(widths[position] / 7))));
    draw("text", { x, y: size.height - PAD.bottom + 40, "text-anchor": "middle", class: "count" }, back, position);
  });
  paintEdges(draw("g", { class: "links" }, picture));
  paintNodes(draw("g", { class: "nodes" }, picture), draw("g", { class: "labels" }, picture));
  canvas.replaceChildren(axis, picture);
}
function paintEdges(layer) {
  const near = new Set([state.chosen]), pinned = new Set(state.pins);
  const most = Math.max(1e-12, ...shownEdges.filter(([s, t]) => near.has(s) || near.has(t)).map((edge) => Math.abs(edge[2])));
  const strong = Math.max(1e-12, ...shownEdges.map((edge) => Math.abs(edge[2])));
  for (const [source, target, weight] of [...shownEdges].reverse()) {
    const isNear = near.has(source) || near.has(target), isPinned = pinned.has(source) && pinned.has(target);
    const share = Math.abs(weight) / (isNear ? most : strong);
    const kind = `${weight > 0 ? "raises" : "lowers"}${isNear ? " near" : ""}${isPinned ? " pinned" : ""}`;
    const opacity = isNear || isPinned ? 0.25 + 0.7 * share : Math.min(0.28, 0.03 + 0.6 * share);
    draw("path", { d: curve(places[source], places[target]), class: kind, "stroke-width": (0.6 + 4.4 * share).toFixed(2), "stroke-opacity": opacity.toFixed(3), fill: "none" }, layer);
  }
}
function paintNodes(layer, words) {
  const wanted = state.seek.toLowerCase(), taken = [];
  const isFound = (node) => wanted && `${nameOf(node)} ${tokens[node.position]} L${node.layer}#${node.index}`.toLowerCase().includes(wanted);
  const byWorth = nodes.map((_, at) => at).filter((at) => isShown[at]).sort((a, b) => nodes[b].influence - nodes[a].influence);
  const neighbours = new Set([...into[state.chosen], ...outOf[state.chosen]].slice(0, 10).map((edge) => (edge.source === state.chosen ? edge.target : edge.source)));
  for (const at of byWorth) {
    const node = nodes[at], made = draw("g", { class: `node ${node.kind}`, "data-node": at }, layer);
    if (at === state.chosen) made.classList.add("chosen");
    if (state.pins.includes(at)) made.classList.add("pinned");
    if (isFound(node)) made.classList.add("found");
    draw("circle", { cx: places[at][0], cy: places[at][1], r: 11, class: "reach" }, made);
    mark(node, places[at], made);
    draw("title", {}, made, `${nameOf(node)} — ${whereOf(node)}`);
  }
  const first = [state.chosen, ...state.pins, ...byWorth.filter((at) => isFound(nodes[at])), ...byWorth.filter((at) => nodes[at].kind === "logit"), ...neighbours, ...byWorth.filter((at) => nodes[at].kind === "latent")];
  let count = 0;
  for (const at of new Set(first)) {
    const node = nodes[at];
    if (!isShown[at] || node.kind === "token" || node.kind === "error") continue;
    const must = at === state.chosen || state.pins.includes(at);
    if (count >= LABELS + state.pins.length && !must) continue;
    const text = short(nameOf(node), node.kind === "logit" ? 10 : 24), [x, y] = places[at];
    const width = 6.1 * [...text].length + 6, left = Math.min(Math.max(2, x - width / 2), size.width - width - 2);
    const boxes = [[left, y - 23], [left, y + 9]].filter(([bx, by]) => !taken.some(([tx, ty, tw]) => bx < tx + tw && tx < bx + width && Math.abs(by - ty) < 13));
    if (!boxes.length && !must) continue;
    const [bx, by] = boxes[0] ?? [left, y - 23];
    taken.push([bx, by, width]);
    count += 1;
    draw("text", { x: bx + width / 2, y: by + 10, "text-anchor": "middle", class: must ? "must" : "" }, words, text);
  }
}

// Panels

function element(name, text, parent, kind) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = text;
  if (kind) made.className = kind;
  parent?.append(made);
  return made;
}
const cards = new Map();
async function cardOf(node) {
  if (!node.raw) return null;
  if (!cards.has(node.raw)) cards.set(node.raw, fetch(node.raw).then((answer) => (answer.ok ? answer.json() : null)).catch(() => null));
  return cards.get(node.raw);
}
function describe(at) {
  const node = nodes[at], box = byId("chosen");
  box.replaceChildren();
  element("h2", nameOf(node), box);
  element("p", whereOf(node), box, "soft");
  const facts = element("dl", null, box, "facts");
  const say = (term, value) => { const one = element("div", null, facts); element("dt", term, one); element("dd", value, one); };
  if (node.weight) say("counts", `${(100 * node.weight).toFixed(1)} %`);
  else say("influence on the output", `${(100 * node.influence).toFixed(2)} %`);
  if (node.kind === "latent") say("activation", figure(node.activation));
  if (node.href) { const link = element("a", "examples and logits", element("p", null, box)); link.href = node.href; }
  const pin = element("button", state.pins.includes(at) ? "Unpin" : "Pin", box);
  pin.type = "button";
  pin.onclick = () => choose(at, true);
  const more = element("div", null, box, "more");
  cardOf(node).then((card) => {
    if (!card || (state.hovered ?? state.chosen) !== at) return;
    const text = (token) => card.tokens_text[token] ?? `#${token}`;
    for (const [name, title] of [["tokens", "fires on"], ["top_logits", "makes likelier"], ["bottom_logits", "less likely"]]) {
      const list = (card.row[name] || []).slice(0, 6);
      if (!list.length) continue;
      const line = element("p", `${title} `, more, "soft");
      for (const item of list) { element("code", JSON.stringify(text(item.token)).slice(1, -1), line, "chip"); line.append(" "); }
    }
  });
}
function list(box, title, found, other, total, extra) {
  box.replaceChildren();
  element("h2", title, box);
  const most = Math.max(1e-12, ...found.map((edge) => Math.abs(edge.weight)), ...extra.map(([, value]) => Math.abs(value)));
  const lines = element("ol", null, box, "ranked");
  const line = (text, where, value, act) => {
    const item = element("li", null, lines), made = element(act ? "button" : "span", null, item, "entry");
    if (act) { made.type = "button"; made.onclick = act; }
    element("span", short(text, 44), made, "name");
    element("span", where, made, "soft");
    element("span", `${value > 0 ? "+" : "−"}${figure(Math.abs(value))}`, made, "num");
    const bar = element("span", null, made, `amount ${value > 0 ? "raises" : "lowers"}`);
    bar.style.width = `${(100 * Math.abs(value)) / most}%`;
  };
  for (const edge of found.slice(0, SHOWN)) line(nameOf(nodes[edge[other]]), whereOf(nodes[edge[other]]), edge.weight, () => choose(edge[other]));
  const hidden = found.slice(SHOWN);
  if (hidden.length) line(`${hidden.length} weaker ones`, "", hidden.reduce((sum, edge) => sum + edge.weight, 0));
  for (const [text, value] of extra) if (value) line(text, "", value);
  if (total !== null) element("p", `${figure(total)} in sum: its value before the threshold`, box, "soft");
  if (!found.length && !extra.some(([, value]) => value)) element("p", "nothing in this graph", box, "soft");
}
function panels(at) {
  const node = nodes[at], isTarget = node.kind === "latent" || node.kind === "logit";
  describe(at);
  list(byId("inputs"), "Inputs", into[at], "source", isTarget && node.pre ? node.pre : null, isTarget && node.pre ? [["nodes not in this graph", node.rest], ["biases", node.bias]] : []);
  list(byId("outputs"), "Outputs", outOf[at], "target", null, []);
  const box = byId("pinned");
  box.hidden = !state.pins.length;
  box.replaceChildren();
  element("h2", `Pinned (${state.pins.length})`, box);
  for (const pin of state.pins) {
    const chip = element("button", `${short(nameOf(nodes[pin]), 40)} · ${whereOf(nodes[pin])}`, box, "chip-button");
    chip.type = "button";
    chip.onclick = () => choose(pin);
  }
}

// Acting

function refresh() {
  byId("nodes-out").textContent = `${state.nodes}%`;
  byId("edges-out").textContent = `${state.edges}%`;
  paint();
  panels(state.chosen);
  writeAddress();
}
function choose(at, pins = false) {
  state.hovered = null;
  state.chosen = at;
  if (pins) state.pins = state.pins.includes(at) ? state.pins.filter((pin) => pin !== at) : [...state.pins, at];
  refresh();
  canvas.querySelector(".chosen")?.scrollIntoView({ block: "nearest", inline: "nearest" });
}
const hit = (event) => { const found = event.target.closest?.("[data-node]"); return found ? Number(found.dataset.node) : null; };
canvas.addEventListener("click", (event) => { const at = hit(event); if (at !== null) choose(at, true); });
canvas.addEventListener("pointerover", (event) => {
  const at = event.pointerType === "touch" ? null : hit(event);
  if (at === state.hovered) return;
  state.hovered = at;
  describe(at ?? state.chosen);
});
canvas.addEventListener("pointerleave", () => { state.hovered = null; describe(state.chosen); });
function step(key) {
  const [x, y] = places[state.chosen], isAcross = key === "ArrowLeft" || key === "ArrowRight";
  const sign = key === "ArrowRight" || key === "ArrowUp" ? 1 : -1;
  let best = null, least = Infinity;
  nodes.forEach((_, at) => {
    if (!isShown[at] || at === state.chosen) return;
    const [u, v] = places[at], along = sign * (isAcross ? u - x : y - v), aside = Math.abs(isAcross ? v - y : u - x);
    if (along > 0.5 && along + 4 * aside < least) { least = along + 4 * aside; best = at; }
  });
  if (best !== null) choose(best);
}
canvas.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key.startsWith("Arrow")) step(event.key);
  else if (event.key === "Enter" || event.key === " ") choose(state.chosen, true);
  else if (event.key === "Escape") { state.pins = []; refresh(); }
  else return;
  event.preventDefault();
});
for (const name of ["nodes", "edges"]) byId(name).addEventListener("input", () => { state[name] = Number(byId(name).value); refresh(); });
byId("seek").addEventListener("input", () => { state.seek = byId("seek").value; refresh(); });
byId("seek").addEventListener("keydown", (event) => {
  const at = Number(canvas.querySelector(".found")?.dataset.node ?? NaN);
  if (event.key === "Enter" && Number.isInteger(at)) choose(at);
});
addEventListener("hashchange", () => { readAddress(); refresh(); });
let width = 0;
new ResizeObserver(() => { if (canvas.clientWidth !== width) { width = canvas.clientWidth; paint(); } }).observe(canvas);

// Export: the colours of the moment go into the file

byId("svg").addEventListener("click", () => {
  const copy = picture.cloneNode(true), originals = [picture, ...picture.querySelectorAll("*")];
  copy.setAttribute("xmlns", SVG);
  [copy, ...copy.querySelectorAll("*")].forEach((made, at) => {
    const style = getComputedStyle(originals[at]);
    for (const name of ["fill", "stroke", "font-size", "font-family", "font-weight", "opacity", "paint-order", "stroke-dasharray"]) made.setAttribute(name, style.getPropertyValue(name));
    if (made.tagName !== "path" || !made.hasAttribute("stroke-width")) made.setAttribute("stroke-width", style.getPropertyValue("stroke-width"));
  });
  const back = draw("rect", { width: size.width, height: size.height, fill: getComputedStyle(canvas).backgroundColor });
  copy.prepend(back);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([new XMLSerializer().serializeToString(copy)], { type: "image/svg+xml" }));
  link.download = `${graph.name}.svg`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
});

readAddress();
refresh();
canvas.scrollLeft = canvas.scrollWidth;
root.dataset.ready = "yes";
