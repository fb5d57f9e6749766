// One's own things: stars, labels, notes and lists of latents, kept in this browser, written and read as JSON.
// What is read, from storage, a file or an address, is checked field by field, and shown as text alone.
"use strict";

(() => {
  const KEY = /^(?:[a-z_]{1,20})\/layer_\d{1,6}\/width_\w{1,12}\/average_l0_\w{1,20}\/\d{1,12}$/;
  const PLACE = /(?:^|\/)sae\/([a-z_]+\/layer_\d+\/width_\w+\/average_l0_\w+)\/(?:\d+\/)?(\d{1,12})(?:\.html)?$/;
  const MOST = { latents: 10000, label: 200, note: 4000, list: 80, lists: 50, file: 4 << 20 };
  const store = `mine:${document.documentElement.dataset.suite ?? ""}`;
  const byId = (name) => document.getElementById(name);

  const text = (value, most) => (typeof value === "string" ? value.slice(0, most) : "");

  // A Map from latents to what is theirs, of anything at all; and how many entries made no sense.
  function checked(found) {
    const own = new Map();
    let refused = 0;
    const latents = found !== null && typeof found === "object" && !Array.isArray(found) ? found.latents : null;
    if (latents === null || typeof latents !== "object" || Array.isArray(latents)) return { own, refused: 1 };
    for (const [key, value] of Object.entries(latents)) {
      if (!KEY.test(key) || value === null || typeof value !== "object" || own.size >= MOST.latents) {
        refused += 1;
        continue;
      }
      const lists = Array.isArray(value.lists) ? value.lists.map((name) => text(name, MOST.list)).filter(Boolean) : [];
      const changed = Number.isFinite(value.changed) ? value.changed : 0;
      const entry = { star: value.star === true, label: text(value.label, MOST.label), note: text(value.note, MOST.note), changed };
      own.set(key, { ...entry, lists: [...new Set(lists)].slice(0, MOST.lists) });
    }
    return { own, refused };
  }

  function read() {
    try {
      return checked(JSON.parse(localStorage.getItem(store) ?? '{"latents": {}}')).own;
    } catch {
      return new Map();
    }
  }

  const asJson = (own) => JSON.stringify({ format: "everyscope-mine-1", latents: Object.fromEntries(own) }, null, 1);

  function write(own) {
    try {
      localStorage.setItem(store, asJson(own));
    } catch {
      say("This browser keeps nothing: its storage is full or switched off.");
    }
  }

  const isEmpty = (entry) => !entry.star && !entry.label && !entry.note && !entry.lists.length;

  function change(key, fields) {
    const own = read();
    const entry = { star: false, label: "", note: "", lists: [], ...own.get(key), ...fields, changed: Date.now() };
    if (isEmpty(entry)) own.delete(key);
    else own.set(key, entry);
    write(own);
  }

  const names = (own) => [...new Set([...own.values()].flatMap((entry) => entry.lists))].sort();

  function make(name, content, attributes = {}) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (content !== undefined) made.append(content);
    return made;
  }

  function say(message) {
    const place = byId("mine-says");
    if (place) place.textContent = message;
  }

  // A latent's page

  const form = byId("own");
  if (form) {
    const key = form.dataset.latent;
    const star = byId("star");
    const show = () => {
      const entry = read().get(key) ?? { star: false, label: "", note: "", lists: [] };
      star.setAttribute("aria-pressed", String(entry.star));
      star.textContent = entry.star ? "★ starred" : "☆ star";
      byId("own-label").textContent = entry.label;
      for (const [name, value] of [["label", entry.label], ["note", entry.note], ["lists", entry.lists.join(", ")]]) {
        if (form.elements[name] !== document.activeElement) form.elements[name].value = value;
      }
      byId("own-lists").replaceChildren(...names(read()).map((name) => make("option", undefined, { value: name })));
    };
    star.addEventListener("click", () => {
      change(key, { star: star.getAttribute("aria-pressed") !== "true" });
      show();
    });
    byId("own-open").addEventListener("click", () => {
      form.hidden = !form.hidden;
      byId("own-open").setAttribute("aria-expanded", String(!form.hidden));
      if (!form.hidden) form.elements.label.focus();
    });
    const keep = () => change(key, {
      label: text(form.elements.label.value.trim(), MOST.label),
      note: text(form.elements.note.value.trim(), MOST.note),
      lists: form.elements.lists.value.split(",").map((name) => text(name.trim(), MOST.list)).filter(Boolean),
    });
    form.addEventListener("input", () => {
      keep();
      byId("own-label").textContent = form.elements.label.value;
    });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      byId("own-open").click();
    });
    addEventListener("storage", show);
    for (const name of ["star", "own-open"]) byId(name).hidden = false;
    show();
  }

  // Latents named anywhere: a star, and the own label

  function decorate() {
    const own = read();
    if (!own.size) return;
    for (const link of document.querySelectorAll("a.named[href], td.wide a[href]")) {
      const place = PLACE.exec(decodeURIComponent(link.pathname));
      const entry = place && own.get(`${place[1]}/${place[2]}`);
      if (!entry || link.querySelector(".own-mark")) continue;
      link.prepend(make("span", `${entry.star ? "★ " : ""}${entry.label ? `${entry.label} · ` : ""}`, { class: "own-mark" }));
    }
  }

  // The page of one's own things

  const table = byId("mine");

  function address(key) {
    const [, folder, latent] = /^(.*)\/(\d+)$/.exec(key);
    const places = { folder, latent, thousand: String(Math.floor(Number(latent) / 1000)) };
    return table.dataset.address.replace(/\{(\w+)\}/g, (_, name) => places[name]);
  }

  function row(key, entry, isOwn) {
    const made = make("tr");
    const [, folder, latent] = /^(.*)\/(\d+)$/.exec(key);
    const name = make("td", undefined, { class: "wide" });
    name.append(make("a", `${entry.star ? "★ " : ""}${entry.label || `latent ${latent}`}`, { href: address(key) }));
    made.append(name, make("td", `${folder}/${latent}`, { class: "left" }), make("td", entry.note, { class: "wide" }));
    made.append(make("td", entry.lists.join(", "), { class: "left" }));
    const last = make("td");
    if (isOwn) {
      const remove = make("button", "remove", { type: "button", "aria-label": `remove latent ${latent}` });
      remove.addEventListener("click", () => {
        const own = read();
        own.delete(key);
        write(own);
        show();
      });
      last.append(remove);
    }
    made.append(last);
    return made;
  }

  // A list in an address: #name=…&latents=site/layer_0/width_1k/average_l0_20/7,…
  function shared() {
    const fields = new URLSearchParams(location.hash.slice(1));
    const keys = (fields.get("latents") ?? "").split(",").filter((key) => KEY.test(key)).slice(0, MOST.latents);
    return { name: text(fields.get("name") ?? "", MOST.list), keys };
  }

  function show() {
    const own = read();
    const { name, keys } = shared();
    const list = byId("mine-list");
    const chosen = list.value;
    list.replaceChildren(make("option", "all", { value: "" }), ...names(own).map((each) => make("option", each, { value: each })));
    list.value = names(own).includes(chosen) ? chosen : "";
    const rows = [...own].filter(([, entry]) => !list.value || entry.lists.includes(list.value));
    const nothing = { star: false, label: "", note: "", lists: [], changed: 0 };
    const shown = keys.length ? keys.map((key) => [key, own.get(key) ?? nothing]) : rows.sort((a, b) => b[1].changed - a[1].changed);
    byId("mine-rows").replaceChildren(...shown.map(([key, entry]) => row(key, entry, own.has(key))));
    byId("mine-shared").hidden = !keys.length;
    byId("mine-shared-name").textContent = `${name || "A list"}: ${keys.length} latent${keys.length === 1 ? "" : "s"}`;
    byId("mine-none").hidden = shown.length > 0;
    byId("mine-share").hidden = !list.value || keys.length > 0;
  }

  async function take(file) {
    if (file.size > MOST.file) return say(`${file.size.toLocaleString("en")} bytes are more than own things can be.`);
    let found;
    try {
      found = JSON.parse(await file.text());
    } catch {
      return say("This file is no JSON: choose one that was saved here.");
    }
    const { own: given, refused } = checked(found);
    const own = read();
    for (const [key, entry] of given) if (!(own.get(key)?.changed > entry.changed)) own.set(key, entry);
    write(own);
    show();
    return say(`${given.size} taken in${refused ? `, ${refused} refused: not what own things look like` : ""}.`);
  }

  function save() {
    const url = URL.createObjectURL(new Blob([asJson(read())], { type: "application/json" }));
    const link = make("a", undefined, { href: url, download: "mine.json" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000); // some browsers begin later
  }

  if (table) {
    byId("mine-list").addEventListener("change", show);
    byId("mine-save").addEventListener("click", save);
    byId("mine-file").addEventListener("change", (event) => {
      if (event.target.files.length) take(event.target.files[0]);
      event.target.value = "";
    });
    byId("mine-share").addEventListener("click", async () => {
      const name = byId("mine-list").value;
      const keys = [...read()].filter(([, entry]) => entry.lists.includes(name)).map(([key]) => key);
      location.hash = new URLSearchParams({ name, latents: keys.join(",") });
      try {
        await navigator.clipboard.writeText(location.href);
        say("Its address was copied.");
      } catch {
        say("Its address is above: copy it from there.");
      }
    });
    byId("mine-keep").addEventListener("click", () => {
      const { name, keys } = shared();
      for (const key of keys) change(key, { lists: [...new Set([...(read().get(key)?.lists ?? []), name || "shared"])] });
      location.hash = "";
      show();
    });
    addEventListener("hashchange", show);
    addEventListener("storage", show);
    show();
  }
  decorate();
})();
