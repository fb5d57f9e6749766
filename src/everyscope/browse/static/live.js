// What asks the language model: texts that are read, streams that are written, and what one does with the answers.
// Without this file the same forms lead to the same pages.
"use strict";

const WAITING = { asleep: "Waking the language model…", loading: "Loading the language model…", ready: "Working…" };
const LONGEST_ADDRESS = 8000; // what is longer is sent as a form, and the address stays

const reader = byId("reader");
const steerer = byId("steerer");
const trier = byId("trier");
const drawer = byId("drawer");

function kept(name, value) {
  try {
    if (value === undefined) return sessionStorage.getItem(name);
    sessionStorage.setItem(name, value);
  } catch { /* nothing is kept */ }
  return null;
}

async function tellState(what, isDone) {
  while (!isDone()) {
    try {
      const { model, done } = await (await fetch("/state")).json();
      if (!isDone()) what.textContent = done ? `Working… ${done[0]} of ${done[1]} latents` : WAITING[model] ?? "Working…";
    } catch { /* the answer itself will say what is wrong */ }
    await new Promise((resume) => setTimeout(resume, 400));
  }
}

// One request at a time for each form; Stop and leaving the page end it, and with it the model's work

async function busy(form, work) {
  const working = form.querySelector(".working");
  const stopping = new AbortController();
  const stop = () => stopping.abort();
  let isDone = false;
  const tell = (text) => {
    isDone = true;
    working.querySelector(".what").textContent = text;
  };
  form.classList.add("busy");
  working.hidden = false;
  working.querySelector(".what").textContent = "Working…";
  working.querySelector(".stop").addEventListener("click", stop);
  addEventListener("pagehide", stop);
  tellState(working.querySelector(".what"), () => isDone);
  try {
    await work(stopping.signal, tell);
  } catch (error) {
    if (error.name !== "AbortError") refuse(form, "The server does not answer; is everyscope browse still running?");
  } finally {
    isDone = true;
    removeEventListener("pagehide", stop);
    working.querySelector(".stop").removeEventListener("click", stop);
    working.hidden = true;
    form.classList.remove("busy");
  }
}

function refuse(form, message) {
  const hint = document.createElement("p");
  hint.className = "hint bad";
  hint.setAttribute("role", "alert");
  hint.textContent = message;
  (form === trier ? byId("tried") : byId("result")).replaceChildren(hint);
}

function fieldsOf(form, submitter) {
  const fields = new URLSearchParams(new FormData(form, submitter?.name ? submitter : null));
  fields.delete("start");
  return fields;
}

function addressOf(form, fields) {
  return `${form.getAttribute("action")}?${fields}`;
}

async function fetched(path, fields, signal) {
  const address = `${path}?${fields}`;
  const answer = address.length > LONGEST_ADDRESS ? await fetch(path, { method: "POST", body: fields, signal }) : await fetch(address, { signal });
  return { isFine: answer.ok, page: new DOMParser().parseFromString(await answer.text(), "text/html") };
}

const saidBy = (page) => page.querySelector("main .lead")?.textContent ?? "That did not work";

// Back and forward: what an address shows is the server's to say

let shownAddress = location.pathname + location.search;

function remember(address, isStep) {
  if (address.length > LONGEST_ADDRESS) return;
  if (isStep) history.pushState(null, "", address);
  else history.replaceState(null, "", address);
  shownAddress = location.pathname + location.search;
}

addEventListener("popstate", () => {
  if (location.pathname + location.search !== shownAddress) location.reload();
});

// A text

async function read(submitter) {
  const fields = fieldsOf(reader, submitter);
  await busy(reader, async (signal) => {
    const { isFine, page } = await fetched(reader.getAttribute("action"), fields, signal);
    const result = page.getElementById("result");
    if (!isFine || !result) return refuse(reader, saidBy(page));
    byId("result").replaceChildren(...result.childNodes);
    kept("text", fields.get("text"));
    remember(addressOf(reader, fields), true);
    prepare();
  });
}

async function look(button) {
  if (button.classList.contains("looked")) return letGo();
  const fields = new URLSearchParams(location.search);
  if (!fields.get("text")) new FormData(reader).forEach((value, name) => fields.set(name, value));
  fields.set("at", button.value);
  look.last = button;
  let answer;
  try {
    answer = await fetched(reader.dataset.pane, fields);
  } catch {
    return refuse(reader, "The server does not answer: is everyscope browse still running?");
  }
  if (look.last !== button) return; // another was chosen meanwhile
  const { isFine, page } = answer;
  if (!isFine) return refuse(reader, saidBy(page));
  document.querySelectorAll(".looked").forEach((other) => other.classList.remove("looked"));
  byId("pane").replaceWith(page.getElementById("pane"));
  document.querySelectorAll(`.matrix [value="${CSS.escape(button.value)}"]`).forEach((here) => here.classList.add("looked"));
  remember(addressOf(reader, fields), false);
  if (matchMedia("(max-width: 62rem)").matches) document.querySelector(".matrix").scrollIntoView({ block: "start" }); // above its pane
}

// A pane that is pinned stays until it is let go; pointing at tokens only previews while none is

const pinned = () => document.querySelector(".token.pinned");

function show(token) {
  document.querySelectorAll(".pane.shown").forEach((pane) => pane.classList.remove("shown"));
  if (token) byId(token.hash.slice(1))?.classList.add("shown");
}

function pin(token) {
  pinned()?.classList.remove("pinned");
  token.classList.add("pinned");
  show(token);
  history.replaceState(null, "", token.hash);
}

function letGo() {
  const fields = new URLSearchParams(location.search);
  pinned()?.classList.remove("pinned");
  show(null);
  document.querySelectorAll(".looked").forEach((button) => button.classList.remove("looked"));
  if (document.querySelector(".matrix")) {
    const hint = document.createElement("p");
    hint.id = "pane";
    hint.className = "soft hint-pane";
    hint.textContent = "Nothing chosen.";
    byId("pane").replaceWith(hint);
    fields.delete("at");
  }
  history.replaceState(null, "", fields.size ? `${location.pathname}?${fields}` : location.pathname);
  shownAddress = location.pathname + location.search;
}

function prepare() {
  const reading = document.querySelector(".reading");
  if (!reading) return;
  reading.classList.add("scripted");
  const token = location.hash && [...reading.querySelectorAll(".token")].find((one) => one.hash === location.hash);
  if (token) pin(token);
  const at = new URLSearchParams(location.search).get("at");
  const cells = [...reading.querySelectorAll(".matrix button")];
  cells.forEach((cell) => {
    cell.tabIndex = -1;
    if (at === cell.value) cell.classList.add("looked");
  });
  if (cells.length) cells[0].tabIndex = 0;
}

document.addEventListener("pointerover", (event) => {
  const token = event.target.closest?.(".reading .token");
  if (token && event.pointerType !== "touch" && !pinned()) show(token);
});

document.addEventListener("click", (event) => {
  const token = event.target.closest(".reading .token");
  if (token) {
    event.preventDefault();
    if (token.classList.contains("pinned")) letGo();
    else pin(token);
  } else if (event.target.closest(".free")) letGo();
  const start = event.target.closest(".from-here");
  if (start) {
    const text = new URLSearchParams(location.search).get("text")?.replaceAll("\r\n", "\n") ?? reader.elements.text.value;
    const prompt = [...text].slice(0, Number(start.closest("[data-upto]").dataset.upto)).join("");
    if (prompt.trim()) start.href = withPrompt(start.href, prompt);
  }
});

function withPrompt(href, prompt) {
  const address = new URL(href, location.href);
  address.searchParams.set("prompt", prompt);
  return address.href;
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && (pinned() || document.querySelector(".looked, #pane.pane"))) letGo();
  const cell = event.target.closest?.(".matrix button, .matrix th a");
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (!cell || !step || event.ctrlKey || event.metaKey || event.altKey) return;
  const [rows, place] = [[...cell.closest("table").rows], cell.closest("td, th")];
  for (let [row, column] = [place.parentNode.rowIndex + step[0], place.cellIndex + step[1]]; rows[row]?.cells[column]; row += step[0], column += step[1]) {
    const next = rows[row].cells[column].querySelector("button");
    if (!next) continue;
    event.preventDefault();
    cell.closest("table").querySelectorAll("[tabindex='0']").forEach((other) => { other.tabIndex = -1; });
    next.tabIndex = 0;
    next.focus();
    return;
  }
});

// Steering, token by token

function spanOf([kind, text]) {
  if (!kind) return document.createTextNode(text);
  const span = document.createElement("span");
  span.className = kind;
  span.textContent = text;
  return span;
}

class Writing {
  constructor(prompt) {
    this.prompt = prompt;
    this.columns = [];
    this.count = 0;
    this.begin = 0;
  }

  open(titles) {
    const frame = document.createElement("div");
    frame.className = `written columns-${titles.length}`;
    frame.setAttribute("aria-busy", "true");
    for (const title of titles) {
      const card = document.createElement("div");
      card.className = title === "as it is" ? "card" : "card steered";
      const head = document.createElement("h3");
      head.textContent = title;
      const text = document.createElement("p");
      text.className = "text";
      const start = document.createElement("span");
      start.className = "soft";
      start.textContent = this.prompt;
      text.append(start);
      card.append(head, text);
      frame.append(card);
      this.columns.push(text);
    }
    byId("result").replaceChildren(frame);
    this.begin = performance.now();
  }

  add(line) {
    if (!this.columns.length) this.open(line.titles);
    this.count += 1;
    line.parts.forEach((runs, place) => this.columns[place].append(...runs.map(spanOf)));
    line.repeats.forEach((doesRepeat, place) => {
      const card = this.columns[place].parentNode;
      if (!doesRepeat || card.querySelector(".warning")) return;
      const warning = document.createElement("p");
      warning.className = "warning";
      warning.textContent = "It repeats itself: the push is too strong for the model.";
      card.append(warning);
    });
  }

  get rate() {
    return (this.count - 1) / ((performance.now() - this.begin) / 1000);
  }
}

async function* linesOf(answer) {
  const decoder = new TextDecoder();
  let pending = "";
  for (const input = answer.body.getReader(); ;) {
    const { done, value } = await input.read();
    if (done) return;
    pending += decoder.decode(value, { stream: true });
    const events = pending.split("\n\n");
    pending = events.pop();
    for (const event of events) yield JSON.parse(event.slice("data: ".length));
  }
}

async function write(submitter) {
  const fields = fieldsOf(steerer, submitter);
  const writing = new Writing(fields.get("prompt").replaceAll("\r\n", "\n"));
  await busy(steerer, async (signal, tell) => {
    try {
      const answer = await fetch(steerer.dataset.stream, { method: "POST", body: fields, signal });
      if (!answer.ok) return refuse(steerer, saidBy(new DOMParser().parseFromString(await answer.text(), "text/html")));
      for await (const line of linesOf(answer)) {
        if (line.error) return refuse(steerer, line.error);
        if (line.html) {
          byId("result").replaceChildren(...new DOMParser().parseFromString(line.html, "text/html").body.childNodes);
          remember(addressOf(steerer, fields), true);
          return;
        }
        writing.add(line);
        if (writing.count > 1) tell(`${writing.count} tokens, ${writing.rate.toFixed(writing.rate < 10 ? 1 : 0)}/s`);
      }
      refuse(steerer, "The server ended before the text did.");
    } catch (error) {
      if (error.name !== "AbortError" || !writing.count) throw error;
      const note = document.createElement("p");
      note.className = "note";
      note.textContent = `Stopped after ${writing.count} token${writing.count === 1 ? "" : "s"}.`;
      byId("result").append(note);
      fields.set("tokens", writing.count); // the same seed writes the same beginning
      remember(addressOf(steerer, fields), true);
    }
  });
}

// Strength: a slider that doubles from a quarter on, beside the number that it sets

const FIRST = 0.25;
const strengthAt = (place) => Math.sign(place) * (Math.abs(place) <= 1 ? FIRST * Math.abs(place) : FIRST * 2 ** (Math.abs(place) - 1));
const placeOf = (strength) => {
  const size = Math.abs(strength);
  const place = size <= FIRST ? size / FIRST : 1 + Math.log2(size / FIRST);
  return Math.sign(strength) * Math.min(4, place);
};

function dial(row) {
  const [slider, number] = [row.querySelector(".slider"), row.querySelector("[name=strength]")];
  const tell = () => slider.setAttribute("aria-valuetext", `${Number(number.value)} times its highest activation`);
  const follow = () => {
    slider.value = placeOf(Number(number.value));
    tell();
  };
  row.querySelector(".rule").hidden = false;
  number.addEventListener("input", follow);
  slider.addEventListener("input", () => {
    number.value = Number(strengthAt(Number(slider.value)).toPrecision(2));
    tell();
  });
  follow();
}

// Rows of latents: named as soon as they are chosen, added and removed

async function nameLatent(row) {
  const [sae, latent] = [row.querySelector("[name=sae]").value, row.querySelector("[name=latent]").value.trim()];
  const caption = row.querySelector(".caption");
  row.asked = `${sae} ${latent}`;
  if (!latent) return caption.replaceChildren();
  let answer, page;
  try {
    answer = await fetch(`${steerer.dataset.caption}?${new URLSearchParams({ sae, latent })}`);
    page = new DOMParser().parseFromString(await answer.text(), "text/html");
  } catch {
    return caption.replaceChildren(); // it is only a caption
  }
  if (row.asked !== `${sae} ${latent}`) return; // another was chosen meanwhile
  caption.classList.toggle("wrong", !answer.ok);
  if (answer.ok) caption.replaceChildren(...page.body.childNodes);
  else caption.textContent = saidBy(page);
}

function renumber(rows) {
  rows.forEach((row, place) => {
    for (const [field, title] of [["sae", "SAE"], ["latent", "Latent"], ["strength", "Strength"]]) {
      const input = row.querySelector(`[name=${field}]`);
      const label = row.querySelector(`label[for="${input.id}"]`);
      input.id = `${field}-${place + 1}`;
      label.htmlFor = input.id;
      label.textContent = title;
    }
    row.querySelector("legend").textContent = `Latent ${place + 1}`;
    row.querySelector(".slider").setAttribute("aria-label", `Strength of latent ${place + 1}`);
    row.querySelector(".remove").setAttribute("aria-label", `Remove latent ${place + 1}`);
  });
}

function steerRows() {
  const [frame, add] = [steerer.querySelector(".pushes"), steerer.querySelector(".add")];
  const rows = () => [...frame.children];
  const settle = () => {
    renumber(rows());
    add.hidden = rows().length >= Number(frame.dataset.most);
    rows().forEach((row) => { row.querySelector(".remove").hidden = rows().length < 2; });
  };
  const blank = rows().at(-1).cloneNode(true);
  const wire = (row) => {
    dial(row);
    row.querySelector("[name=sae]").addEventListener("change", () => nameLatent(row));
    row.querySelector("[name=latent]").addEventListener("input", () => nameLatent(row));
    row.querySelector(".remove").addEventListener("click", () => {
      row.remove();
      settle();
      add.focus();
    });
    if (row.querySelector("[name=latent]").value) nameLatent(row);
  };
  if (rows().length > 1 && !rows().at(-1).querySelector("[name=latent]").value) rows().at(-1).remove();
  rows().forEach(wire);
  add.addEventListener("click", () => {
    const row = blank.cloneNode(true);
    row.querySelector("[name=sae]").value = rows().at(-1).querySelector("[name=sae]").value;
    row.querySelector("[name=latent]").value = "";
    row.querySelector(".caption").replaceChildren();
    frame.append(row);
    settle();
    wire(row);
    row.querySelector("[name=latent]").focus();
  });
  settle();
}

// A latent: texts tried on it, and what its examples are good for

async function tryText() {
  const fields = fieldsOf(trier, null);
  await busy(trier, async (signal) => {
    const { isFine, page } = await fetched(trier.getAttribute("action"), fields, signal);
    if (!isFine) return refuse(trier, saidBy(page));
    byId("tried").replaceChildren(...page.getElementById("tried").childNodes);
    const chart = page.getElementById("how-strongly");
    if (chart) byId("how-strongly").replaceWith(chart);
    kept("text", fields.get("text"));
    remember(addressOf(trier, fields), true);
  });
}

function toolsOf(row) {
  const tools = document.createElement("span");
  tools.className = "tools";
  const tool = (title, act) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = title;
    button.addEventListener("click", () => act(button));
    tools.append(button);
  };
  const text = row.dataset.text;
  tool("try", () => {
    trier.elements.text.value = text;
    trier.requestSubmit();
    trier.scrollIntoView({ block: "nearest" });
  });
  tool("steer from here", () => {
    location.href = withPrompt(trier.dataset.steer, [...text].slice(0, Number(row.dataset.upto)).join(""));
  });
  if (navigator.clipboard) {
    tool("copy", async (button) => {
      await navigator.clipboard.writeText(text);
      button.textContent = "copied";
    });
  }
  return tools;
}

if (trier) {
  trier.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!trier.classList.contains("busy")) tryText();
  });
  for (const row of document.querySelectorAll(".example-list [data-text]")) {
    const details = row.querySelector("details");
    row.addEventListener("pointerenter", (event) => {
      if (event.pointerType !== "touch" && !details.open && !row.querySelector(".tools")) row.append(toolsOf(row));
    });
    row.addEventListener("pointerleave", () => { if (!details.open) row.querySelector(".tools")?.remove(); });
    details.addEventListener("toggle", () => {
      row.querySelector(".tools")?.remove();
      if (details.open) details.append(toolsOf(row));
    });
  }
}

if (reader) {
  reader.addEventListener("submit", (event) => {
    event.preventDefault();
    if (event.submitter?.name === "at") look(event.submitter);
    else if (!reader.classList.contains("busy")) read(event.submitter);
  });
  if (!location.search && kept("text")) reader.elements.text.value = kept("text");
  prepare();
}

if (steerer) {
  steerer.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!steerer.classList.contains("busy")) write(event.submitter);
  });
  steerRows();
  const given = new URLSearchParams(location.search);
  if (!given.has("prompt") && kept("text")) steerer.elements.prompt.value = kept("text");
  if (steerer.dataset.start) write(null);
}

// A circuit: its answer is another page

async function draw() {
  await busy(drawer, async (signal) => {
    const answer = await fetch(drawer.getAttribute("action"), { method: "POST", body: fieldsOf(drawer, null), signal });
    if (answer.redirected) location.assign(answer.url);
    else refuse(drawer, saidBy(new DOMParser().parseFromString(await answer.text(), "text/html")));
  });
}

if (drawer) {
  drawer.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!drawer.classList.contains("busy")) draw();
  });
  if ("begins" in drawer.dataset) draw();
}

for (const area of document.querySelectorAll("form.live textarea")) {
  area.addEventListener("keydown", (event) => {
    const isOneLine = area.rows === 1 && !event.shiftKey && !event.isComposing;
    if (event.key !== "Enter" || !(isOneLine || event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    area.form.requestSubmit();
  });
}
