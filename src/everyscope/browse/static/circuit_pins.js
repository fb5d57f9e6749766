// The pinned nodes as a small graph of boxes: grouped, named, dragged; and what the model does without them.
"use strict";

(() => {
const BOX = { width: 208, height: 60 }, GAP = { x: 20, y: 56 }, PAD = 12, MOVE = 12, OUTPUTS = 3, CHANGED = 8, CHARACTERS = 30;
const factors = { remove: "0", halve: "0.5", double: "2" };
let checked = new Set(), units = [], areas = new Map(), answer = null;

// Units: a group, or a node of its own. Without pins, the strongest paths of the graph.

const isOwn = () => Circuit.state.pins.length > 0;
function unitsNow() {
  const { nodes, state, graph, number, outputs, nameOf, whereOf } = Circuit;
  const pins = isOwn() ? state.pins : graph.suggested.map((id) => number.get(id)).filter((at) => at !== undefined);
  const grouped = new Set(isOwn() ? state.groups.flatMap((group) => group.members) : []);
  const found = (isOwn() ? state.groups : []).map((group, place) => ({ key: `g${place}`, name: group.name, where: `${group.members.length} nodes`, members: group.members, group }));
  const targets = outputs.slice(0, OUTPUTS).filter((at) => !pins.includes(at));
  for (const at of [...pins.filter((one) => !grouped.has(one)), ...targets]) found.push({ key: nodes[at].id, name: nameOf(nodes[at]), where: whereOf(nodes[at]), members: [at] });
  return found;
}

// What each unit brings each other, directly or through nodes that are in no unit, to first order: as edges shrink with their source

function links() {
  const { nodes, into, edges } = Circuit, owner = new Map();
  units.forEach((unit, place) => unit.members.forEach((at) => owner.set(at, place)));
  const found = new Map(), order = nodes.map((_, at) => at).sort((a, b) => nodes[b].level - nodes[a].level);
  if (edges.length === 0) return [];
  for (const target of owner.keys()) {
    const worth = new Map([[target, 1]]);
    for (const at of order) {
      const passed = worth.get(at);
      if (passed === undefined || (at !== target && owner.has(at)) || (at !== target && nodes[at].kind !== "latent")) continue;
      const scale = at === target ? 1 : passed / nodes[at].activation;
      for (const { source, weight } of into[at]) {
        worth.set(source, (worth.get(source) ?? 0) + weight * scale);
        if (!owner.has(source) || owner.get(source) === owner.get(target)) continue;
        const key = `${owner.get(source)} ${owner.get(target)}`, link = found.get(key) ?? { direct: 0, total: 0 };
        link.total += weight * scale;
        if (at === target) link.direct += weight;
        found.set(key, link);
      }
    }
  }
  return [...found].map(([key, link]) => ({ ...link, ends: key.split(" ").map(Number) }));
}

// Boxes: higher layers above, positions from left to right, until they are dragged

function arrange(width) {
  const { nodes, state } = Circuit, rows = new Map();
  for (const unit of units) {
    unit.row = Math.max(...unit.members.map((at) => nodes[at].level));
    unit.position = Math.min(...unit.members.map((at) => nodes[at].position));
    if (!rows.has(unit.row)) rows.set(unit.row, []);
    rows.get(unit.row).push(unit);
  }
  const perLine = Math.max(1, Math.floor((width - 2 * PAD + GAP.x) / (BOX.width + GAP.x)));
  let y = PAD;
  for (const level of [...rows.keys()].sort((a, b) => b - a)) {
    const row = rows.get(level).sort((a, b) => a.position - b.position);
    for (let begin = 0; begin < row.length; begin += perLine) {
      const line = row.slice(begin, begin + perLine), taken = line.length * (BOX.width + GAP.x) - GAP.x;
      line.forEach((unit, place) => {
        const x = Math.max(PAD, (width - taken) / 2) + place * (BOX.width + GAP.x);
        unit.at = state.moved.get(unit.key) ?? [x, y];
      });
      y += BOX.height + (begin + perLine < row.length ? 14 : GAP.y);
    }
  }
  return Math.max(y - GAP.y + PAD, ...units.map((unit) => unit.at[1] + BOX.height + PAD));
}

function folded(name) {
  const signs = [...name];
  if (signs.length <= CHARACTERS) return [name, ""];
  const space = signs.lastIndexOf(" ", CHARACTERS), cut = space > CHARACTERS / 2 ? space : CHARACTERS;
  return [signs.slice(0, cut).join(""), Circuit.short(signs.slice(cut).join("").trim(), CHARACTERS)];
}
function paint() {
  const { byId, draw, signed, short, state, curve } = Circuit, area = byId("subgraph");
  units = unitsNow();
  const width = Math.max(area.clientWidth, 300), height = arrange(width);
  const full = Math.max(width, ...units.map((unit) => unit.at[0] + BOX.width + PAD));
  const svg = draw("svg", { width: full, height, viewBox: `0 0 ${full} ${height}`, role: "group", "aria-label": "Pinned nodes" });
  const lines = links(), most = Math.max(1e-12, ...lines.map((link) => Math.abs(link.total)));
  const under = draw("g", { class: "links" }, svg);
  for (const { ends: [source, target], direct, total } of lines.sort((a, b) => Math.abs(a.total) - Math.abs(b.total))) {
    const share = Math.abs(total) / most;
    if (share < 0.02) continue;
    const from = units[source].at, to = units[target].at, d = curve([from[0] + BOX.width / 2, from[1]], [to[0] + BOX.width / 2, to[1] + BOX.height]);
    const line = draw("path", { d, class: total > 0 ? "raises" : "lowers", fill: "none", "stroke-width": (1 + 6 * share).toFixed(2), "stroke-opacity": (0.3 + 0.6 * share).toFixed(2) }, under);
    if (Math.abs(direct) < 0.5 * Math.abs(total)) line.setAttribute("stroke-dasharray", "5 4");
    draw("title", {}, line, `${units[source].name} → ${units[target].name}: ${signed(total)}, directly ${signed(direct)}`);
  }
  areas = new Map();
  for (const unit of units) {
    const [x, y] = unit.at, node = Circuit.nodes[unit.members[0]];
    const kind = unit.group ? "group" : node.kind;
    const made = draw("g", { class: `unit ${kind}${unit.members.includes(state.chosen) ? " chosen" : ""}`, tabindex: 0, role: "button", "data-key": unit.key, "aria-label": `${unit.name}, ${unit.where}` }, svg);
    draw("rect", { x, y, width: BOX.width, height: BOX.height, rx: 8 }, made);
    const [one, two] = folded(unit.name);
    draw("text", { x: x + 10, y: y + (two ? 19 : 26), class: "must" }, made, one);
    if (two) draw("text", { x: x + 10, y: y + 34, class: "must" }, made, two);
    draw("text", { x: x + 10, y: y + (two ? 50 : 43), class: "count" }, made, short(unit.where, 34));
    draw("title", {}, made, `${unit.name} — ${unit.where}`);
    areas.set(unit.key, unit);
  }
  const focused = document.activeElement?.dataset?.key;
  area.replaceChildren(svg);
  if (focused) svg.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
}

// Dragging with mouse, finger or arrow keys

function drags(area) {
  let held = null;
  const unitOf = (event) => areas.get(event.target.closest?.("[data-key]")?.dataset.key);
  area.addEventListener("pointerdown", (event) => {
    const unit = unitOf(event);
    if (!unit || event.button > 0) return;
    held = { unit, from: [event.clientX, event.clientY], at: unit.at, isMoved: false };
    area.setPointerCapture(event.pointerId);
  });
  area.addEventListener("pointermove", (event) => {
    if (!held) return;
    const by = [event.clientX - held.from[0], event.clientY - held.from[1]];
    if (!held.isMoved && Math.hypot(...by) < 4) return;
    held.isMoved = true;
    move(held.unit, [held.at[0] + by[0], held.at[1] + by[1]]);
  });
  const drop = (event) => {
    if (!held) return;
    const { unit, isMoved } = held;
    held = null;
    if (isMoved) Circuit.refresh();
    else if (event.type === "pointerup") Circuit.choose(unit.members[0]);
  };
  area.addEventListener("pointerup", drop);
  area.addEventListener("pointercancel", drop);
  area.addEventListener("keydown", (event) => {
    const unit = unitOf(event), by = { ArrowLeft: [-MOVE, 0], ArrowRight: [MOVE, 0], ArrowUp: [0, -MOVE], ArrowDown: [0, MOVE] }[event.key];
    if (!unit || event.ctrlKey || event.metaKey || event.altKey) return;
    if (by) { move(unit, [unit.at[0] + by[0], unit.at[1] + by[1]]); Circuit.refresh(); }
    else if (event.key === "Enter" || event.key === " ") Circuit.choose(unit.members[0]);
    else if (event.key === "Delete" && isOwn() && !unit.group && Circuit.state.pins.includes(unit.members[0])) Circuit.pin(unit.members[0]);
    else return;
    event.preventDefault();
  });
}
function move(unit, [x, y]) {
  Circuit.state.moved.set(unit.key, [Math.max(0, x), Math.max(0, y)]);
  paint();
}

// The list of pins, by group

function list() {
  const { byId, element, button, state, nodes, short, nameOf, whereOf } = Circuit, box = byId("pins");
  box.replaceChildren();
  byId("pinned-title").textContent = isOwn() ? `Pinned (${state.pins.length})` : "Strongest paths";
  byId("pinned-note").textContent = isOwn()
    ? "Solid lines are direct, dashed ones run through nodes that are not pinned. Drag boxes, or move them with arrow keys."
    : "The nodes of the graph’s strongest paths. Pin nodes above to draw a circuit of your own.";
  const grouped = new Map(state.groups.flatMap((group) => group.members.map((at) => [at, group])));
  const chip = (at, parent) => {
    const line = element("span", null, parent, "pin"), box = element("input", null, line);
    box.type = "checkbox";
    box.checked = checked.has(at);
    box.setAttribute("aria-label", `Select ${nameOf(nodes[at])}`);
    box.addEventListener("change", () => { if (box.checked) checked.add(at); else checked.delete(at); acts(); });
    button(`${short(nameOf(nodes[at]), 40)} · ${whereOf(nodes[at])}`, line, () => Circuit.choose(at), "chip-button");
    button("×", line, () => Circuit.pin(at), "drop").setAttribute("aria-label", `Unpin ${nameOf(nodes[at])}`);
  };
  checked = new Set([...checked].filter((at) => state.pins.includes(at)));
  for (const group of state.groups) {
    const part = element("fieldset", null, box, "pin-group"), name = element("input", null, element("legend", null, part));
    name.type = "text";
    name.value = group.name;
    name.maxLength = 80;
    name.setAttribute("aria-label", "Name of the group");
    name.addEventListener("change", () => { group.name = name.value || "group"; Circuit.refresh(); });
    for (const at of group.members) chip(at, part);
    button("Ungroup", part, () => { state.groups = state.groups.filter((one) => one !== group); Circuit.refresh(); }, "quiet");
  }
  for (const at of state.pins) if (!grouped.has(at)) chip(at, box);
  acts();
}

function acts() {
  const { byId, graph, state, nodes, number } = Circuit, latents = state.pins.filter((at) => nodes[at].kind === "latent");
  byId("pin-these").hidden = isOwn() || !graph.suggested.length;
  byId("group").hidden = state.pins.length < 2;
  byId("group").disabled = checked.size < 2;
  byId("unpin").hidden = !isOwn();
  byId("ablation").hidden = !graph.ablate || !latents.length;
  byId("pin-these").onclick = () => { state.pins = graph.suggested.map((id) => number.get(id)).filter((at) => at !== undefined); Circuit.refresh(); };
  byId("unpin").onclick = () => { state.pins = []; state.groups = []; state.moved.clear(); Circuit.refresh(); };
  byId("group").onclick = () => {
    const members = [...checked];
    state.groups = state.groups.map((group) => ({ ...group, members: group.members.filter((at) => !checked.has(at)) })).filter((group) => group.members.length);
    state.groups.push({ name: `group ${state.groups.length + 1}`, members });
    checked.clear();
    Circuit.refresh();
    byId("pins").querySelector("fieldset:last-of-type input[type=text]")?.select();
  };
}

// Ablation: each group and each latent of its own, then all together

async function ablate(event) {
  event.preventDefault();
  const { byId, graph, nodes, state } = Circuit, form = byId("ablation"), result = byId("ablated");
  const latents = (members) => members.filter((at) => nodes[at].kind === "latent");
  const each = units.filter((unit) => isOwn() && latents(unit.members).length).map((unit) => ({ name: unit.name, where: unit.where, members: latents(unit.members) }));
  const all = latents(state.pins);
  const variants = each.length > 1 ? [{ name: "all of them", where: "", members: all }, ...each] : each;
  const fields = new URLSearchParams({ factor: factors[form.elements.what.value] });
  for (const name of ["attention", "norms"]) if (form.elements[name].checked) fields.set(name, "yes");
  for (const { members } of variants) fields.append("variant", members.map((at) => nodes[at].id).join(","));
  form.classList.add("busy");
  byId("ablating").hidden = false;
  try {
    const got = await fetch(graph.ablate, { method: "POST", body: fields, headers: { accept: "application/json" } });
    const found = await got.json();
    if (got.ok) answer = variants.map((variant, place) => ({ ...variant, ...found[place] }));
    result.replaceChildren();
    if (got.ok) tell(0);
    else Circuit.element("p", found.error, result, "wrong");
  } catch {
    result.replaceChildren();
    Circuit.element("p", "The server did not answer: is everyscope browse still running?", result, "wrong");
  } finally {
    byId("ablating").hidden = true;
    form.classList.remove("busy");
  }
}

function pair(parent, measured, predicted, most) {
  const { element, signed } = Circuit;
  for (const [kind, value] of [["measured", measured], ["predicted", predicted]]) {
    const cell = element("td", null, parent, kind);
    if (value === null) { element("span", "overflowed", cell, "soft"); continue; }
    const bar = element("span", null, cell, `bar ${value < 0 ? "lowers" : "raises"}`);
    bar.style.width = `${(60 * Math.abs(value)) / most}px`;
    element("span", value === 0 ? "0" : signed(value), cell, "num");
  }
}
function table(parent, title, rows, act) {
  const { element, button, short } = Circuit, made = element("table", null, element("div", null, parent, "table"), "effects");
  const head = element("tr", null, element("thead", null, made));
  for (const text of [title, "measured", "predicted"]) element("th", text, head);
  const most = Math.max(1e-12, ...rows.flatMap((row) => [Math.abs(row.measured), Math.abs(row.predicted)]));
  const body = element("tbody", null, made);
  rows.forEach((row, place) => {
    const line = element("tr", null, body), cell = element("td", null, line);
    if (row.isChosen) line.className = "chosen-row";
    if (act) button(short(row.name, 48), cell, () => act(row, place), "chip-button");
    else element("span", short(row.name, 48), cell);
    element("span", ` ${row.where}`, cell, "soft");
    pair(line, row.measured, row.predicted, most);
  });
}
function tell(chosen) {
  const { byId, element, nodes, number, outputs, graph, nameOf, whereOf, choose } = Circuit, box = byId("ablated"), one = answer[chosen];
  box.replaceChildren();
  const place = graph.targets.indexOf(nodes[outputs[0]]?.id);
  if (place >= 0) {
    const rows = answer.map((row, at) => ({ name: row.name, where: row.where, measured: row.targets[place][0], predicted: row.targets[place][1], isChosen: at === chosen }));
    table(box, `Change of the logit of ${nameOf(nodes[outputs[0]])}`, rows, (_, at) => tell(at));
  }
  element("h3", answer.length > 1 ? `Without ${one.name}` : "What follows", box).textContent = `Next tokens: ${one.name}`;
  const shown = element("p", null, box, "shift");
  for (const [text, before, after] of one.tokens) {
    if (before === null || after === null) continue;
    element("code", text, shown, "chip");
    element("span", ` ${(100 * before).toFixed(1)} % → ${(100 * after).toFixed(1)} %  `, shown, after < before ? "fell" : "rose");
  }
  const rows = one.latents.slice(0, CHANGED).map(([id, measured, predicted]) => {
    const at = number.get(id), [layer, index, position] = id.split("_");
    const words = at === undefined ? [`latent ${index}`, `L${layer} on ${Circuit.tokens[position]} (${position}), not drawn`] : [nameOf(nodes[at]), whereOf(nodes[at])];
    return { at, name: words[0], where: words[1], measured, predicted };
  });
  if (rows.length) table(box, "Change of later latents’ activations", rows, (row) => { if (row.at !== undefined) choose(row.at); });
}

Circuit.parts.push({
  start() {
    drags(Circuit.byId("subgraph"));
    Circuit.byId("ablation").addEventListener("submit", ablate);
    let width = 0;
    const area = Circuit.byId("subgraph");
    new ResizeObserver(() => { if (area.clientWidth !== width) { width = area.clientWidth; paint(); } }).observe(area);
  },
  refresh() { paint(); list(); },
});
})();
