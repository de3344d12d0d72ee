"use strict";
// The rows of the page. Everything else on it is plain HTML that Python wrote.
//
// A row's tokens become elements only while the row is near the viewport, so the page holds a few
// thousand elements however many rows it has. Text reaches the page through textContent alone.

const el = (id) => document.getElementById(id);
const format = new Intl.NumberFormat("en"); // made once: n.toLocaleString() makes one a call
const number = (n) => format.format(n);
const plural = (n, word) => `${number(n)} ${word}${n === 1 ? "" : "s"}`;

function make(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** A typed array from `{type, data}`: little-endian values, zlib, base64. */
async function unpack({ type, data }) {
  const letters = atob(data);
  const packed = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) packed[i] = letters.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  return new { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i4: Int32Array, f4: Float32Array }[type](buffer);
}

/** The rows of the file, with the documents of each. `at(row, place)` tells one token. */
async function load() {
  const raw = JSON.parse(el("data").textContent);
  el("data").remove();
  const names = Object.keys(raw.arrays);
  const arrays = await Promise.all(names.map((name) => unpack(raw.arrays[name])));
  const data = { ...raw, ...Object.fromEntries(names.map((name, i) => [name, arrays[i]])) };
  data.rows = Array.from({ length: raw.n_rows }, () => ({ documents: [], filled: 0, trained: 0 }));
  data.start.forEach((start, d) => {
    const row = data.rows[data.row[d]];
    const length = data.length[d];
    row.documents.push({ start, length, trained: data.trained[d], source: data.source[d], line: data.line[d], part: data.part[d], note: data.notes[d] ?? "", text: null });
    row.filled += length;
    row.trained += data.trained[d];
  });
  return data;
}

const text = (data, row, place) => data.text[data.tokens[row * data.width + place]];
const weight = (data, row, place) => data.mask[row * data.width + place];

/** `source:line` of a document, and which example of its line it is. */
function where(data, doc, names) {
  const name = names[doc.source] ?? "source unknown";
  const place = doc.line > 0 ? `${name}:${doc.line}` : name;
  const whole = doc.part > 0 ? `${place} part ${doc.part + 1}` : place;
  return doc.note ? `${whole} · ${doc.note}` : whole;
}

/* ---- Drawing one row ---- */

/** Stops of a gradient that is `colour` where `inside(place)` holds. */
function stripes(width, colour, inside) {
  const stops = [];
  for (let from = 0; from < width; ) {
    const on = inside(from);
    let to = from + 1;
    while (to < width && inside(to) === on) to++;
    const percent = (n) => ((100 * n) / width).toFixed(2);
    stops.push(`${on ? colour : "transparent"} ${percent(from)}% ${percent(to)}%`);
    from = to;
  }
  return `linear-gradient(to right, ${stops.join(", ")})`;
}

/** The row at a glance: trained is tall, context half as tall, padding a line. */
function strip(data, r) {
  const made = make("div", "strip");
  made.setAttribute("aria-hidden", "true");
  made.style.backgroundImage = [
    stripes(data.width, "var(--trained-line)", (p) => weight(data, r, p) !== 0),
    stripes(data.width, "var(--context)", (p) => p < data.rows[r].filled),
    "linear-gradient(var(--context), var(--context))",
  ].join(", ");
  made.style.backgroundSize = "100% 100%, 100% 50%, 100% 1px";
  return made;
}

function drawDocument(data, r, doc, found) {
  const made = make("section", found ? "document" : "document other");
  const margin = make("p", "where");
  margin.title = where(data, doc, data.sources);
  margin.append(make("b", "", where(data, doc, data.labels)));
  margin.append(`${plural(doc.length, "token")}, ${number(doc.trained)} trained`);
  made.append(margin);
  if (!found) return made;
  const flow = make("p", "flow");
  for (let p = doc.start; p < doc.start + doc.length; p++) {
    const token = make("span", weight(data, r, p) !== 0 ? "t" : "c", text(data, r, p));
    token.dataset.place = p;
    flow.append(token);
  }
  for (const [from, to] of found) for (let p = from; p <= to; p++) flow.children[p - doc.start].classList.add("hit");
  made.append(flow);
  return made;
}

/** `found(r, doc)`: the hits in a document, each the places of its first and last token; null: it is not shown. */
function draw(data, item, r, found) {
  const row = data.rows[r];
  const body = item.lastChild;
  body.replaceChildren(...row.documents.map((doc) => drawDocument(data, r, doc, found(r, doc))));
  const padding = data.width - row.filled;
  if (padding > 0) body.append(make("p", "pad padding", `padding, ${plural(padding, "place")}`));
  item.insertBefore(strip(data, r), body);
  item.style.height = "";
}

/** Take the elements of a row away again; it keeps `height`. */
function erase(item, height) {
  item.style.height = `${height}px`;
  item.lastChild.replaceChildren();
  item.querySelector(".strip")?.remove();
}

function heading(data, r) {
  const row = data.rows[r];
  const made = make("h3", "", `Row ${number(data.first + r)}`);
  const filled = row.filled === data.width ? "full" : `${number(row.filled)} of ${number(data.width)} places filled`;
  made.append(make("small", "", `${plural(row.documents.length, "document")} · ${filled} · ${number(row.trained)} trained`));
  return made;
}

/* ---- The list of rows ---- */

function makeList(data) {
  const list = el("rows");
  let found = () => [];
  const items = data.rows.map((row, r) => {
    const item = make("li", "row");
    const body = make("div", "tokens");
    body.tabIndex = r === 0 ? 0 : -1;
    body.setAttribute("role", "group");
    body.setAttribute("aria-label", `Tokens of row ${data.first + r}. Arrow keys move.`);
    body.dataset.row = r;
    item.style.height = `${100 + 0.6 * row.filled}px`; // a guess until it is drawn
    item.append(heading(data, r), body);
    return item;
  });
  const drawn = new Set();
  const near = new IntersectionObserver(
    (entries) => {
      for (const { target: item, isIntersecting, boundingClientRect } of entries) {
        if (isIntersecting && !drawn.has(item)) {
          drawn.add(item);
          draw(data, item, Number(item.lastChild.dataset.row), found);
        } else if (!isIntersecting && drawn.delete(item)) erase(item, boundingClientRect.height);
      }
    },
    { rootMargin: "75% 0px" },
  );
  const show = (rows, finder) => {
    near.disconnect();
    drawn.forEach((item) => erase(item, item.offsetHeight));
    drawn.clear();
    found = finder;
    list.replaceChildren(...rows.map((r) => items[r]));
    if (!rows.length) list.append(make("li", "none", "No document matches."));
    rows.forEach((r) => near.observe(items[r]));
    makeReachable(list, items[rows[0]]?.lastChild);
  };
  return { items, show };
}

/** One stop of the Tab key for all rows; the arrow keys move it. */
function makeReachable(list, body) {
  list.querySelector('.tokens[tabindex="0"]')?.setAttribute("tabindex", "-1");
  body?.setAttribute("tabindex", "0");
}

/* ---- Filter ---- */

/** Where `words` stand in a document: the places of the first and last token of each hit. */
function hits(data, r, doc, words) {
  if (doc.text === null) {
    const parts = [];
    for (let p = doc.start; p < doc.start + doc.length; p++) parts.push(data.plain(r, p).toLowerCase());
    let end = 0;
    doc.ends = parts.map((part) => (end += part.length)); // of each token in the text
    doc.text = parts.join("");
  }
  const found = [];
  let token = 0;
  for (let at = doc.text.indexOf(words); at >= 0; at = doc.text.indexOf(words, at + words.length)) {
    while (doc.ends[token] <= at) token++;
    const first = token;
    while (doc.ends[token] < at + words.length) token++;
    found.push([doc.start + first, doc.start + token]);
  }
  return found;
}

/** Step through the hits of the search: the one at hand is marked and scrolled to. */
function makeSteps(list) {
  let all = [];
  let here = -1;
  const label = () => (el("hits").value = all.length ? `${number(here + 1)} of ${plural(all.length, "hit")}` : "");
  const show = (frames = 8) => {
    const [r, place] = all[here];
    document.querySelectorAll(".flow .here").forEach((one) => one.classList.remove("here"));
    const token = list.items[r].querySelector(`span[data-place="${place}"]`);
    (token ?? list.items[r]).scrollIntoView({ block: token ? "center" : "start" });
    token?.classList.add("here");
    if (frames > 0) requestAnimationFrame(() => show(frames - 1)); // rows around it get their true heights
  };
  const step = (by) => {
    if (!all.length) return;
    here = (here + by + all.length) % all.length;
    label();
    show();
  };
  el("next").addEventListener("click", () => step(1));
  el("previous").addEventListener("click", () => step(-1));
  el("find").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !all.length) return;
    event.preventDefault();
    step(event.shiftKey ? -1 : 1);
  });
  return (found) => {
    [all, here] = [found, -1];
    el("next").disabled = el("previous").disabled = !all.length;
    label();
  };
}

/** Fill the form and call `list.show` whenever it changes. */
function makeFilter(data, list) {
  const setHits = makeSteps(list);
  const source = el("source");
  const option = (label, value) => source.append(Object.assign(make("option", "", label), { value }));
  option("all sources", "");
  data.labels.forEach((label, s) => option(label, String(s)));
  const apply = () => {
    const words = el("find").value.toLowerCase();
    const find = (r, doc) => {
      if (source.value !== "" && doc.source !== Number(source.value)) return null;
      if (!words) return [];
      const found = hits(data, r, doc, words);
      return found.length ? found : null;
    };
    const [rows, all] = [[], []];
    let documents = 0;
    data.rows.forEach((row, r) => {
      const found = row.documents.map((doc) => find(r, doc)).filter((one) => one !== null);
      if (found.length || (!words && source.value === "")) rows.push(r);
      documents += found.length;
      for (const [first] of found.flat()) all.push([r, first]);
    });
    el("count").value = `${plural(rows.length, "row")}, ${plural(documents, "document")}`;
    setHits(all);
    list.show(rows, find);
  };
  let waiting = 0;
  el("find").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(apply, 200);
  });
  source.addEventListener("change", apply);
  Object.assign(el("row"), { min: data.first, max: data.first + data.rows.length - 1, placeholder: data.first });
  el("row").addEventListener("change", () => goTo(data, list, Number(el("row").value) - data.first));
  el("tools").addEventListener("submit", (event) => {
    event.preventDefault();
    goTo(data, list, Number(el("row").value) - data.first);
  });
  apply();
}

/** Scroll to a row, and again while rows around it are drawn and get their true heights. */
function showRow(item, frames = 6) {
  item.scrollIntoView();
  if (frames > 0) requestAnimationFrame(() => showRow(item, frames - 1));
}

function goTo(data, list, r) {
  const item = list.items[r];
  if (!item) return;
  if (!item.isConnected) {
    el("source").value = "";
    el("find").value = "";
    el("source").dispatchEvent(new Event("change"));
  }
  showRow(item);
}

/* ---- The card of one token ---- */

function makeCard(data) {
  const card = el("card");
  let marked = null;
  const hide = () => {
    marked?.classList.remove("at");
    marked = null;
    card.hidden = true;
  };
  const fill = (token) => {
    const r = Number(token.closest(".tokens").dataset.row);
    const place = Number(token.dataset.place);
    const doc = data.rows[r].documents.find((d) => place >= d.start && place < d.start + d.length);
    const w = weight(data, r, place);
    const list = make("dl");
    const line = (name, value) => list.append(make("dt", "", name), make("dd", "", value));
    line("id", String(data.ids[data.tokens[r * data.width + place]]));
    line("is", w !== 0 ? (w === 1 ? "trained" : `trained, weight ${+w.toPrecision(6)}`) : "context");
    line("source", data.sources[doc.source] ?? "unknown");
    if (doc.line > 0) line("line", String(doc.line));
    line("place", `${number(place)} of the row, ${number(place - doc.start)} of the document`);
    card.replaceChildren(make("code", "", token.textContent.replace(/^ +| +$/g, (s) => "␣".repeat(s.length)) || "continues the character before it"), list);
  };
  const show = (token) => {
    if (token === marked) return;
    hide();
    marked = token;
    token.classList.add("at");
    fill(token);
    card.hidden = false;
    const box = token.getClientRects()[0] ?? token.getBoundingClientRect();
    const below = box.bottom + 8 + card.offsetHeight < innerHeight;
    const x = Math.max(8, Math.min(box.left, innerWidth - card.offsetWidth - 16));
    const y = below ? box.bottom + 8 : Math.max(8, box.top - card.offsetHeight - 8);
    card.style.transform = `translate(${x}px, ${y}px)`;
  };
  return { show, hide, marked: () => marked };
}

function listen(card) {
  const rows = el("rows");
  const token = (target) => target.closest?.("span[data-place]");
  const showAt = (event) => (token(event.target) ? card.show(token(event.target)) : card.hide());
  // A finger that leaves the screen leaves the rows as well: its card stays until the next tap.
  const byMouse = (act) => (event) => event.pointerType === "mouse" && act(event);
  rows.addEventListener("pointerover", byMouse(showAt));
  rows.addEventListener("pointerleave", byMouse(card.hide));
  document.addEventListener("click", showAt);
  rows.addEventListener("keydown", (event) => moveBy(event, card));
  rows.addEventListener("focusout", card.hide);
}

/** Left and Right move through the tokens of a row, Up and Down through the rows. */
function moveBy(event, card) {
  const body = event.target.closest(".tokens");
  if (!body || event.ctrlKey || event.altKey || event.metaKey) return;
  const tokens = [...body.querySelectorAll("span[data-place]")];
  const here = tokens.indexOf(card.marked());
  const row = { ArrowUp: "previousElementSibling", ArrowDown: "nextElementSibling" }[event.key];
  const goal = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: tokens.length - 1 }[event.key];
  if (event.key === "Escape") return card.hide();
  if (row === undefined && goal === undefined) return;
  event.preventDefault();
  if (row) {
    const item = body.parentElement[row];
    if (!item) return;
    makeReachable(el("rows"), item.lastChild);
    item.lastChild.focus({ preventScroll: true });
    showRow(item);
  } else if (tokens.length) {
    const next = tokens[Math.max(0, Math.min(goal, tokens.length - 1))];
    next.scrollIntoView({ block: "nearest" });
    card.show(next);
  }
}

async function start() {
  const data = await load();
  data.plain = (r, p) => text(data, r, p).replaceAll("↵\n", "\n");
  makeFilter(data, makeList(data));
  listen(makeCard(data));
  document.documentElement.dataset.ready = "yes";
}

start();
