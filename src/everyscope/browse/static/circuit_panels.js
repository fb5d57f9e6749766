// Beside a graph: the card of the chosen node, and what it receives and sends, as ranked lists with bars.
"use strict";

(() => {
const SHOWN = 10, LEVELS = 10;
const cards = new Map();

async function cardOf(node) {
  const { graph } = Circuit;
  if (node.kind !== "latent") return null;
  if (graph.cards) return graph.cards[`${node.coder}_${node.index}`] ?? null;
  const address = `${graph.card}/${node.coder}/${node.index}`;
  if (!cards.has(address)) cards.set(address, fetch(address).then((answer) => (answer.ok ? answer.json() : null)).catch(() => null).then((card) => {
    if (!card) cards.delete(address); // its SAE may be indexed by the next time
    return card;
  }));
  return cards.get(address);
}

function describe(at) {
  const { nodes, state, byId, element, button, nameOf, whereOf, figure } = Circuit;
  const node = nodes[at], box = byId("chosen");
  box.replaceChildren();
  element("h2", nameOf(node), box);
  element("p", whereOf(node), box, "soft");
  const facts = element("dl", null, box, "facts");
  const say = (term, value) => { const one = element("div", null, facts); element("dt", term, one); element("dd", value, one); };
  if (node.weight) say("counts", `${(100 * node.weight).toFixed(1)} %`);
  else say("influence on the output", `${(100 * node.influence).toFixed(2)} %`);
  if (node.kind === "latent") say("activation", figure(node.activation));
  const line = element("p", null, box, "acts");
  button(state.pins.includes(at) ? "Unpin" : "Pin", line, () => Circuit.choose(at, true));
  if (node.href) { const link = element("a", "all examples and logits", line); link.href = node.href; }
  const more = element("div", null, box, "more");
  cardOf(node).then((card) => { if (card && (state.hovered ?? state.chosen) === at) show(card, more); });
}

function show(card, box) {
  const { element } = Circuit;
  for (const [name, title] of [["fires", "fires on"], ["raises", "makes likelier"], ["lowers", "less likely"]]) {
    if (!card[name].length) continue;
    const line = element("p", `${title} `, box, "soft");
    for (const text of card[name]) { element("code", text, line, "chip"); line.append(" "); }
  }
  for (const example of card.examples) {
    const line = element("p", null, box, "text example");
    for (const [text, level] of example) {
      if (level > 0) element("span", text, line, `t a${Math.min(LEVELS, level)}`);
      else line.append(text);
    }
  }
}

function list(box, title, found, other, total, extra) {
  const { nodes, element, button, short, figure, signed, nameOf, whereOf, choose } = Circuit;
  box.replaceChildren();
  element("h2", title, box);
  const most = Math.max(1e-12, ...found.map((edge) => Math.abs(edge.weight)), ...extra.map(([, value]) => Math.abs(value)));
  const lines = element("ol", null, box, "ranked");
  const line = (text, where, value, act) => {
    const item = element("li", null, lines), made = act ? button(null, item, act, "entry") : element("span", null, item, "entry");
    element("span", short(text, 44), made, "name");
    element("span", where, made, "soft");
    element("span", signed(value), made, "num");
    element("span", null, made, `amount ${value > 0 ? "raises" : "lowers"}`).style.width = `${(100 * Math.abs(value)) / most}%`;
  };
  for (const edge of found.slice(0, SHOWN)) line(nameOf(nodes[edge[other]]), whereOf(nodes[edge[other]]), edge.weight, () => choose(edge[other]));
  const hidden = found.slice(SHOWN);
  if (hidden.length) line(`${hidden.length} weaker ones`, "", hidden.reduce((sum, edge) => sum + edge.weight, 0));
  for (const [text, value] of extra) if (value) line(text, "", value);
  if (total !== null) element("p", `${figure(total)} in sum: its value before the threshold`, box, "soft");
  if (!found.length && !extra.some(([, value]) => value)) element("p", "nothing in this graph", box, "soft");
}

Circuit.parts.push({
  start() {},
  hover: describe,
  refresh() {
    const { graph, nodes, state, byId, into, outOf } = Circuit, at = state.chosen, node = nodes[at];
    const hasSum = graph.method === "replacement" && (node.kind === "latent" || node.kind === "logit") && node.pre;
    describe(at);
    list(byId("inputs"), "Inputs", into[at], "source", hasSum ? node.pre : null, hasSum ? [["nodes not in this graph", node.rest], ["biases", node.bias]] : []);
    list(byId("outputs"), "Outputs", outOf[at], "target", null, []);
  },
});
})();
