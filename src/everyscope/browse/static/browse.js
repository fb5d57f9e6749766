// Keys, tooltips, sorting and opening. Every page works without this file.
"use strict";

const byId = (name) => document.getElementById(name);

// Light and dark

function switchTheme() {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  root.dataset.theme = (root.dataset.theme || system) === "dark" ? "light" : "dark";
  try { localStorage.setItem("theme", root.dataset.theme); } catch { /* kept until the page is left */ }
}
byId("theme").addEventListener("click", switchTheme);

// Keys

const help = byId("help");
byId("help-button").addEventListener("click", () => help.showModal());

function follow(name) {
  const link = byId(name);
  if (link && link.href) location.href = link.href;
}

const keys = {
  n: () => follow("next"),
  p: () => follow("previous"),
  r: () => follow("random"),
  u: () => follow("up"),
  d: switchTheme,
  e: () => byId("open-all")?.click(),
  "?": () => (help.open ? help.close() : help.showModal()),
  "/": () => {
    const box = byId("find").form.hidden ? byId("label") : byId("find");
    box?.focus();
    box?.select();
  },
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") hideTip();
  if (event.target.matches("input, textarea, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const action = keys[event.key];
  if (!action || (help.open && event.key !== "?")) return;
  event.preventDefault();
  action();
});

// Tooltips: data-tip is text, and is shown as text

const tip = byId("tip");

function showTip(target) {
  tip.textContent = target.dataset.tip;
  tip.hidden = false;
  const box = target.getBoundingClientRect();
  const own = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left + box.width / 2 - own.width / 2), innerWidth - own.width - 8);
  const above = box.top - own.height - 6;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 4 ? above : box.bottom + 6}px`;
}

function hideTip() {
  tip.hidden = true;
}

function tipped(event) {
  const target = event.target.closest?.("[data-tip]") || event.target.querySelector?.(":scope > [data-tip]");
  if (target && target.dataset.tip) showTip(target);
  else hideTip();
}
document.addEventListener("pointerover", tipped);
document.addEventListener("focusin", tipped);

// A finger's first tap on a word shows its tip, the second leads to the help
let told = null;
document.addEventListener("click", (event) => {
  const term = event.target.closest?.("a.term");
  if (term && event.pointerType === "touch" && told !== term) {
    event.preventDefault();
    showTip(term);
  }
  told = term;
});
document.addEventListener("scroll", hideTip, { passive: true, capture: true });

// Tables that sort in the page

function keyOf(row, column) {
  return row.cells[column].dataset.key ?? row.cells[column].textContent;
}

function sortTable(table, column, sign) {
  table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
  table.tHead.rows[0].cells[column].setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  const rows = [...table.tBodies[0].rows].sort((one, other) => {
    const [a, b] = [keyOf(one, column), keyOf(other, column)];
    const difference = Number(a) - Number(b);
    return sign * (Number.isNaN(difference) ? a.localeCompare(b, "en", { numeric: true }) : difference);
  });
  table.tBodies[0].append(...rows);
}

// Tables of the same columns are sorted together; the address keeps how, after a reload too: sort=group.column.up
function sorted(table) {
  const group = table.closest("[data-sorted-together]");
  return group ? [...group.querySelectorAll("table.sortable")] : [table];
}

const sortable = [...document.querySelectorAll("table.sortable")];
document.addEventListener("click", (event) => {
  const head = event.target.closest("table.sortable th");
  if (!head) return;
  const together = sorted(head.closest("table"));
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const table of together) sortTable(table, head.cellIndex, sign);
  const place = sortable.indexOf(together[0]);
  if (place < 0) return; // it came later, with an answer of the language model
  const address = new URL(location.href);
  address.searchParams.set("sort", `${place}.${head.cellIndex}.${sign > 0 ? "up" : "down"}`);
  history.replaceState(null, "", address);
});
const kept = /^(\d+)\.(\d+)\.(up|down)$/.exec(new URLSearchParams(location.search).get("sort") ?? "");
if (kept && sortable[kept[1]]?.tHead.rows[0].cells[kept[2]]) {
  for (const table of sorted(sortable[kept[1]])) sortTable(table, Number(kept[2]), kept[3] === "up" ? 1 : -1);
}

// Opening: overlong tokens, and all examples at once

document.addEventListener("click", (event) => {
  const button = event.target.closest(".unfold");
  if (!button) return;
  event.preventDefault();
  const rest = button.nextElementSibling;
  rest.hidden = !rest.hidden;
  button.setAttribute("aria-expanded", String(!rest.hidden));
});

const openAll = byId("open-all");
openAll?.addEventListener("click", () => {
  const isOpening = openAll.textContent === openAll.dataset.open;
  for (const example of document.querySelectorAll(".example-list details")) example.open = isOpening;
  openAll.textContent = isOpening ? openAll.dataset.close : openAll.dataset.open;
});

// The address of this latent, to the clipboard

const copy = byId("copy");
if (copy && navigator.clipboard && byId("permalink").href) {
  copy.hidden = false;
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(byId("permalink").href);
    copy.textContent = "copied";
  });
}

// A token of an example that is pointed at is marked in the histogram; its tip ends in its activation

function markAt(value) {
  const chart = document.querySelector("#how-strongly svg[data-x]");
  chart?.querySelectorAll(".pointed").forEach((line) => line.remove());
  if (!chart || !(value > 0)) return;
  const [low, high, left, right, top, bottom] = chart.dataset.x.split(" ").map(Number);
  const place = left + (right - left) * Math.min(1, Math.max(0, (value - low) / (high - low)));
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  line.setAttribute("class", "pointed");
  for (const [end, at] of [["x1", place], ["x2", place], ["y1", top], ["y2", bottom]]) line.setAttribute(end, at);
  chart.append(line);
}
document.addEventListener("pointerover", (event) => {
  const token = event.target.closest?.(".examples .t[data-tip]");
  markAt(token ? Number(token.dataset.tip.split(" ").at(-1)) : 0);
});

// An index in the making: a page that waits for its part, and parts of pages that fill in

const preparing = byId("preparing");
async function watch() {
  const state = await (await fetch(`/state?part=${preparing.dataset.part}`)).json();
  preparing.value = state.share;
  if (state.is_ready || state.error) location.reload();
  else setTimeout(watch, 300);
}
if (preparing) watch();

async function fillIn() {
  const state = await (await fetch("/state")).json();
  const before = Number(byId("filling").dataset.indexed);
  if (state.indexed > before && (state.is_ready || document.querySelector("#found"))) {
    const page = new DOMParser().parseFromString(await (await fetch(location.href)).text(), "text/html");
    for (const old of document.querySelectorAll("[data-fills]")) {
      const filled = page.getElementById(old.id);
      if (filled) old.replaceChildren(...filled.childNodes);
    }
  }
  if (byId("filling") && !state.error) setTimeout(fillIn, 1000);
}
if (byId("filling")) setTimeout(fillIn, 500);
