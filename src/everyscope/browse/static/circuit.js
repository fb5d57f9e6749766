// An attribution graph: tokens along x, layers along y. Everything that a stranger wrote goes in as text, never as markup.
// Plain scripts that share one object, so that a page works from a file too: there browsers load no modules.
"use strict";

const Circuit = { parts: [] };

(() => {
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const LABELS = 18, ROW = 78, EMPTY_ROW = 22, STEP = 15, WIDEST_STEP = 46, LINE = 13, PER_LINE = 9, PAD = { left: 14, top: 40, bottom: 62, right: 30 };

function draw(name, attributes, parent, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent?.append(made);
  return made;
}
function element(name, text, parent, kind) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = text;
  if (kind) made.className = kind;
  parent?.append(made);
  return made;
}
function button(text, parent, act, kind) {
  const made = element("button", text, parent, kind);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}
const short = (text, most) => ([...text].length > most ? `${[...text].slice(0, most - 1).join("")}…` : text);
const figure = (value) => (value === 0 ? "0" : Math.abs(value) >= 1000 ? value.toFixed(0) : value.toPrecision(3));
const signed = (value) => `${value < 0 ? "−" : "+"}${figure(Math.abs(value))}`;

function start(graph) {
  const { nodes, edges, tokens, rows } = graph, canvas = byId("canvas");
  const top = rows.length, axisWidth = rows.some((name) => name.length > 8) ? 86 : 58;
  const number = new Map(nodes.map((node, at) => [node.id, at]));
  const into = nodes.map(() => []), outOf = nodes.map(() => []);
  edges.forEach(([source, target, weight, cum]) => {
    const edge = { source, target, weight, cum };
    into[target].push(edge);
    outOf[source].push(edge);
  });
  for (const list of [...into, ...outOf]) list.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
  const outputs = nodes.map((_, at) => at).filter((at) => nodes[at].weight > 0).sort((a, b) => nodes[b].weight - nodes[a].weight);

  // What a node is called

  const tokenAt = (node) => `${tokens[node.position]} (${node.position})`;
  const siteOf = (node) => `L${node.layer}${node.site ? ` ${node.site}` : ""}`;
  function nameOf(node) {
    if (node.kind === "latent") return node.label || `latent ${node.index}`;
    if (node.kind === "error") return "error: what the coder leaves out";
    return node.kind === "token" ? tokens[node.position] : node.label;
  }
  function whereOf(node) {
    if (node.kind === "latent") return `${siteOf(node)} #${node.index} on ${tokenAt(node)}`;
    if (node.kind === "error") return `${siteOf(node)} on ${tokenAt(node)}`;
    if (node.kind === "token") return `token ${node.position}`;
    return node.probability === undefined ? "target" : `output, ${(100 * node.probability).toFixed(1)} %`;
  }

  // What is chosen, pinned, grouped, moved and drawn; the address holds it

  const state = { chosen: null, hovered: null, pins: [], groups: [], moved: new Map(), nodes: 80, edges: 90, seek: "" };
  const known = (ids) => ids.map((id) => number.get(id)).filter((at) => at !== undefined);
  const listed = (text) => known((text || "").split(","));
  function readAddress() {
    const said = new URLSearchParams(location.hash.slice(1));
    const pins = said.has("pins") || said.has("node") ? listed(said.get("pins")) : known(graph.pins);
    const groups = said.has("group") || said.has("node")
      ? said.getAll("group").map((text) => [text.slice(0, text.lastIndexOf(":")), listed(text.slice(text.lastIndexOf(":") + 1))])
      : graph.groups.map(([name, ...ids]) => [name, known(ids)]);
    state.groups = groups.filter(([, members]) => members.length).map(([name, members]) => ({ name: name.slice(0, 80), members }));
    state.pins = [...new Set([...pins, ...state.groups.flatMap((group) => group.members)])];
    state.chosen = listed(said.get("node"))[0] ?? outputs[0] ?? 0;
    for (const name of ["nodes", "edges"]) {
      const value = Number(said.get(name) || state[name]);
      byId(name).value = Number.isFinite(value) ? value : state[name];
      state[name] = Number(byId(name).value);
    }
    state.seek = byId("seek").value = (said.get("seek") || "").slice(0, 200);
    state.moved = new Map();
    for (const part of (said.get("at") || "").split(";").slice(0, 200)) {
      const [key, x, y] = part.split(":");
      if (key && Number.isFinite(+x) && Number.isFinite(+y)) state.moved.set(key, [+x, +y]);
    }
  }
  function writeAddress() {
    const said = new URLSearchParams({ node: nodes[state.chosen].id, nodes: state.nodes, edges: state.edges });
    const ids = (places) => places.map((at) => nodes[at].id).join(",");
    if (state.pins.length) said.set("pins", ids(state.pins));
    for (const group of state.groups) said.append("group", `${group.name}:${ids(group.members)}`);
    if (state.moved.size) said.set("at", [...state.moved].map(([key, [x, y]]) => `${key}:${Math.round(x)}:${Math.round(y)}`).join(";"));
    if (state.seek) said.set("seek", state.seek);
    history.replaceState(null, "", `#${said}`);
  }

  // Which nodes and edges pass the sliders: latents and errors that lead nowhere fall

  let isShown = [], shownEdges = [];
  function select() {
    const mustStay = (at) => nodes[at].fixed || state.pins.includes(at) || at === state.chosen;
    isShown = nodes.map((node, at) => node.cum <= state.nodes / 100 || mustStay(at));
    const passes = (edge) => edge[3] <= state.edges / 100 && isShown[edge[0]] && isShown[edge[1]];
    for (let again = true; again; ) {
      shownEdges = edges.filter(passes);
      const leads = new Set(shownEdges.map((edge) => edge[0]));
      again = false;
      nodes.forEach((node, at) => {
        if (!isShown[at] || mustStay(at) || leads.has(at)) return;
        isShown[at] = false;
        again = true;
      });
    }
  }

  // Places: a column for each token, as wide as its fullest cell; a row for each layer, low where nothing is drawn. Outputs stand
  // to the left of the last column too, where the top row is free.

  let places = [], size = { width: 0, height: 0 };
  const rowOf = (node) => (node.kind === "token" ? 0 : node.kind === "logit" ? top + 1 : node.row + 1);
  function place() {
    const cells = new Map(), spread = [];
    nodes.forEach((node, at) => {
      if (!isShown[at]) return;
      if (node.kind === "logit") { spread.push(at); return; }
      const key = `${rowOf(node)} ${node.position}`;
      if (!cells.has(key)) cells.set(key, []);
      cells.get(key).push(at);
    });
    const narrow = tokens.map((token) => Math.min(96, 26 + 6.8 * [...short(token, 10)].length)), lines = new Array(top + 2).fill(0);
    const most = tokens.map(() => 0), room = canvas.clientWidth - axisWidth - PAD.left - PAD.right, sum = (list) => list.reduce((a, b) => a + b, 0);
    for (const [key, list] of cells) {
      list.sort((a, b) => nodes[b].influence - nodes[a].influence);
      const [level, position] = key.split(" ").map(Number);
      most[position] = Math.max(most[position], Math.min(list.length, PER_LINE));
      lines[level] = Math.max(lines[level], Math.ceil(list.length / PER_LINE));
    }
    const wide = (step) => narrow.map((width, position) => Math.max(width, 20 + step * most[position]));
    let step = STEP;
    while (step < WIDEST_STEP && sum(wide(step + 1)) < room) step += 1;
    const widths = wide(step), spare = room - sum(widths), starts = [];
    let x = PAD.left;
    widths.forEach((width, position) => {
      starts[position] = x;
      widths[position] = width + Math.max(0, spare / tokens.length);
      x += widths[position];
    });
    const heights = lines.map((count, level) => (level === 0 || level > top ? ROW : count ? ROW + LINE * (count - 1) : EMPTY_ROW));
    const total = heights.slice(0, -1).reduce((a, b) => a + b, 0), levels = [];
    size = { width: Math.max(x + PAD.right, canvas.clientWidth - axisWidth), height: PAD.top + PAD.bottom + total };
    let y = size.height - PAD.bottom;
    heights.forEach((height, level) => { levels[level] = y; y -= height; });
    places = [];
    for (const [key, list] of cells) {
      const [level, position] = key.split(" ").map(Number);
      list.forEach((at, order) => {
        const line = Math.floor(order / PER_LINE), inLine = Math.min(list.length - line * PER_LINE, PER_LINE);
        const middle = starts[position] + widths[position] / 2 + ((order % PER_LINE) - (inLine - 1) / 2) * step;
        places[at] = [middle, levels[level] - line * LINE];
      });
    }
    spread.sort((a, b) => nodes[b].weight - nodes[a].weight);
    let right = Math.min(size.width - PAD.right / 2, starts.at(-1) + widths.at(-1) / 2 + 30);
    for (const at of spread) {
      const width = 18 + 6.6 * [...short(nameOf(nodes[at]), 12)].length;
      places[at] = [Math.max(16, right - width / 2), levels[top + 1]];
      right -= width;
    }
    return { starts, widths, levels };
  }

  // Drawing

  function mark(node, [x, y], parent) {
    const r = node.kind === "latent" || node.kind === "error" ? 3.2 + 7 * Math.sqrt(Math.min(1, node.influence * 4)) : 5.5;
    if (node.kind === "latent") return draw("circle", { cx: x, cy: y, r, class: "c-latent" }, parent);
    const side = 1.5 * r, box = { x: x - side / 2, y: y - side / 2, width: side, height: side };
    if (node.kind === "error") return draw("rect", { ...box, class: "c-error", transform: `rotate(45 ${x} ${y})` }, parent);
    return draw("rect", { ...box, class: "c-token", rx: 2 }, parent);
  }
  const curve = ([x, y], [u, v]) => `M${x.toFixed(1)} ${y.toFixed(1)}C${x.toFixed(1)} ${((y + v) / 2).toFixed(1)} ${u.toFixed(1)} ${((y + v) / 2).toFixed(1)} ${u.toFixed(1)} ${v.toFixed(1)}`;
  function paint() {
    select();
    const { starts, widths, levels } = place();
    const picture = draw("svg", { width: size.width, height: size.height, viewBox: `0 0 ${size.width} ${size.height}` });
    const axis = draw("svg", { width: axisWidth, height: size.height, class: "axis back", "aria-hidden": "true" });
    const back = draw("g", { class: "back" }, picture);
    levels.forEach((y, level) => {
      draw("line", { x1: PAD.left - 10, x2: size.width - 8, y1: y, y2: y }, back);
      draw("text", { x: 8, y: y + 4 }, axis, level === 0 ? "tokens" : level > top ? "output" : rows[level - 1]);
    });
    tokens.forEach((token, position) => {
      const x = starts[position] + widths[position] / 2, y = size.height - PAD.bottom;
      draw("text", { x, y: y + 24, class: "word", "text-anchor": "middle" }, back, short(token, Math.max(4, Math.floor(widths[position] / 7))));
      draw("text", { x, y: y + 40, "text-anchor": "middle", class: "count" }, back, position);
    });
    paintEdges(draw("g", { class: "links" }, picture));
    paintNodes(draw("g", { class: "nodes" }, picture), draw("g", { class: "labels" }, picture));
    canvas.replaceChildren(axis, picture);
  }
  function paintEdges(layer) {
    const near = ([source, target]) => source === state.chosen || target === state.chosen, pinned = new Set(state.pins);
    const most = Math.max(1e-12, ...shownEdges.filter(near).map((edge) => Math.abs(edge[2])));
    const strong = Math.max(1e-12, ...shownEdges.map((edge) => Math.abs(edge[2])));
    for (const edge of [...shownEdges].reverse()) {
      const [source, target, weight] = edge, isNear = near(edge), isPinned = pinned.has(source) && pinned.has(target);
      const share = Math.abs(weight) / (isNear ? most : strong);
      const kind = `${weight > 0 ? "raises" : "lowers"}${isNear ? " near" : ""}${isPinned ? " pinned" : ""}`;
      const opacity = isNear || isPinned ? 0.2 + 0.7 * share : Math.min(0.2, 0.02 + 0.5 * share);
      draw("path", { d: curve(places[source], places[target]), class: kind, "stroke-width": (0.5 + 4.5 * share).toFixed(2), "stroke-opacity": opacity.toFixed(3), fill: "none" }, layer);
    }
  }
  const isFound = (node) => {
    const wanted = state.seek.toLowerCase();
    return wanted && `${nameOf(node)} ${tokens[node.position]} ${siteOf(node)}#${node.index}`.toLowerCase().includes(wanted);
  };
  function paintNodes(layer, words) {
    const byWorth = nodes.map((_, at) => at).filter((at) => isShown[at]).sort((a, b) => nodes[b].influence - nodes[a].influence);
    for (const at of byWorth) {
      const node = nodes[at], made = draw("g", { class: `node ${node.kind}`, "data-node": at }, layer);
      made.classList.toggle("chosen", at === state.chosen);
      made.classList.toggle("pinned", state.pins.includes(at));
      made.classList.toggle("found", Boolean(isFound(node)));
      draw("circle", { cx: places[at][0], cy: places[at][1], r: 11, class: "reach" }, made);
      mark(node, places[at], made);
      draw("title", {}, made, `${nameOf(node)} — ${whereOf(node)}`);
    }
    const neighbours = [...into[state.chosen], ...outOf[state.chosen]].slice(0, 12).map((edge) => (edge.source === state.chosen ? edge.target : edge.source));
    const first = [state.chosen, ...state.pins, ...byWorth.filter((at) => isFound(nodes[at])), ...outputs, ...neighbours, ...byWorth];
    const taken = byWorth.map((at) => [places[at][0] - 5, places[at][1] - 5, 10, 10]);
    const isFree = ([x, y, width]) => !taken.some(([a, b, w, h]) => a < x + width && x < a + w && b < y + 13 && y < b + h);
    let count = 0;
    for (const at of new Set(first)) {
      const node = nodes[at], must = at === state.chosen || state.pins.includes(at);
      if (!isShown[at] || node.kind === "token" || node.kind === "error" || (count >= LABELS + state.pins.length && !must)) continue;
      const text = short(nameOf(node), node.kind === "logit" ? 12 : 26), [x, y] = places[at], width = 6.1 * [...text].length + 6;
      const left = Math.min(Math.max(2, x - width / 2), size.width - width - 2);
      const box = [[left, y - 24], [left, y + 9], [x + 12, y - 6], [x - 12 - width, y - 6], [left, y - 37], [left, y + 22]].find(([a, b]) => a > 0 && a + width < size.width && isFree([a, b, width]));
      if (!box && !must) continue;
      const [a, b] = box ?? [left, y - 24];
      taken.push([a, b, width, 13]);
      count += 1;
      draw("text", { x: a + width / 2, y: b + 10, "text-anchor": "middle", class: must ? "must" : "" }, words, text);
    }
  }

  // Acting

  function refresh() {
    byId("nodes-out").textContent = `${state.nodes}%`;
    byId("edges-out").textContent = `${state.edges}%`;
    paint();
    for (const part of Circuit.parts) part.refresh();
    writeAddress();
  }
  function choose(at, pins = false) {
    state.hovered = null;
    state.chosen = at;
    if (pins) pin(at);
    else refresh();
    canvas.querySelector(".chosen")?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
  function pin(at) {
    state.pins = state.pins.includes(at) ? state.pins.filter((one) => one !== at) : [...state.pins, at];
    state.groups.forEach((group) => { group.members = group.members.filter((one) => state.pins.includes(one)); });
    state.groups = state.groups.filter((group) => group.members.length);
    refresh();
  }
  Object.assign(Circuit, {
    graph, nodes, edges, tokens, into, outOf, outputs, state, number, canvas, byId, draw, element, button, short, figure, signed,
    nameOf, whereOf, curve, mark, choose, pin, refresh, axisWidth, size: () => size,
  });
  for (const part of Circuit.parts) part.start();

  const hit = (event) => { const found = event.target.closest?.("[data-node]"); return found ? Number(found.dataset.node) : null; };
  const hover = (at) => { state.hovered = at; for (const part of Circuit.parts) part.hover?.(at ?? state.chosen); };
  canvas.addEventListener("click", (event) => { const at = hit(event); if (at !== null) choose(at, true); });
  canvas.addEventListener("pointerover", (event) => {
    const at = event.pointerType === "touch" ? null : hit(event);
    if (at !== state.hovered) hover(at);
  });
  canvas.addEventListener("pointerleave", () => hover(null));
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
    else if (event.key === "Escape") { state.pins = []; state.groups = []; refresh(); }
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
  readAddress();
  refresh();
  canvas.scrollLeft = canvas.scrollWidth;
  byId("circuit").dataset.ready = "yes";
}

async function load() {
  const inside = byId("graph-data"), root = byId("circuit");
  if (inside) { start(JSON.parse(inside.textContent)); return; }
  const answer = await fetch(root.dataset.graph);
  if (answer.ok) start(await answer.json());
  else byId("canvas").textContent = "This graph could not be read: load the page again, or compute it again.";
}
addEventListener("DOMContentLoaded", load);
})();
