"use strict";
// The chat page of `whet serve`. Texts reach the page as textContent only, never as HTML.

const byId = (id) => document.getElementById(id);
const turns = []; // {user, replies: Map(model name -> reply)}
const ALTERNATIVES = 8;
let models = [];

function make(kind, attributes = {}, ...children) {
  const element = document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") element.addEventListener("click", value);
    else if (name === "className") element.className = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// ---- Requests ----

async function request(path, body, signal) {
  const headers = {};
  if (byId("key").value) headers.Authorization = `Bearer ${byId("key").value}`;
  if (body) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer; is whet serve still running?");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) {
    byId("key-field").hidden = false;
    document.querySelector(".settings").open = true;
    byId("key").focus();
  }
  const said = await answer.json().catch(() => null);
  throw new Error(said?.error?.message ?? `the server answers ${answer.status}`);
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (waiting + value).split("\n\n");
    waiting = parts.pop();
    for (const part of parts) if (part !== "data: [DONE]") yield JSON.parse(part.slice(6));
  }
}

function asked() {
  const number = (id) => (byId(id).value === "" ? undefined : Number(byId(id).value));
  const stop = byId("stop").value;
  return {
    temperature: number("temperature"), top_p: number("top_p"), top_k: number("top_k"),
    max_tokens: number("max_tokens"), seed: number("seed"), stop: stop ? [stop] : undefined,
  };
}

/** The messages that ask for the reply of `name` to turn number `last`. */
function messages(name, last) {
  const system = byId("system").value;
  const found = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns.slice(0, last + 1)) {
    found.push({ role: "user", content: turn.user });
    const reply = turn.replies.get(name);
    if (turn !== turns[last] && reply) found.push({ role: "assistant", content: reply.content });
  }
  return found;
}

// ---- A reply ----

function startReply(name, number, place) {
  const reply = { name, number, content: "", entries: [], messages: messages(name, number), abort: new AbortController() };
  reply.text = make("p", { className: "text" });
  reply.state = make("small");
  reply.view = make("div", { className: "view" });
  reply.view.hidden = true;
  reply.problem = make("p", { className: "problem", role: "alert" });
  reply.problem.hidden = true;
  reply.buttons = {
    stop: make("button", { type: "button", onclick: () => reply.abort.abort() }, "Stop"),
    again: make("button", { type: "button", onclick: () => startReply(name, number, card) }, "Regenerate"),
    tokens: opener(reply, "Probabilities", showReplyTokens),
    prompt: opener(reply, "Prompt tokens", showPromptTokens),
    trained: opener(reply, "As trained", showCertificate),
  };
  const title = make("h2", {}, name, reply.state);
  const actions = make("div", { className: "actions" }, ...Object.values(reply.buttons));
  const card = make("article", { className: "reply", "aria-label": `Reply of ${name}` }, title, reply.text, reply.problem, actions, reply.view);
  place.replaceWith(card);
  turns[number].replies.set(name, reply);
  run(reply);
  return reply;
}

async function run(reply) {
  reply.running = true;
  update(reply, "…");
  const began = performance.now();
  let finish = null;
  try {
    const body = { model: reply.name, messages: reply.messages, stream: true, logprobs: true, top_logprobs: ALTERNATIVES, ...asked() };
    for await (const event of events(await request("/v1/chat/completions", body, reply.abort.signal))) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      const follow = innerHeight + scrollY > document.documentElement.scrollHeight - 80;
      reply.content += choice.delta.content ?? "";
      reply.entries.push(...(choice.logprobs?.content ?? []));
      finish = choice.finish_reason ?? finish;
      reply.text.textContent = reply.content;
      if (follow) scrollTo(0, document.documentElement.scrollHeight);
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      reply.problem.textContent = error.message;
      reply.problem.hidden = false;
    }
  }
  reply.running = false;
  const seconds = (performance.now() - began) / 1000;
  const how = finish === "length" ? ", cut at its longest" : finish ? "" : ", broken off";
  update(reply, `${reply.entries.length} tokens, ${seconds.toFixed(1)} s${how}`);
}

function update(reply, state) {
  reply.state.textContent = state;
  const { stop, again, tokens, trained } = reply.buttons;
  stop.hidden = !reply.running;
  again.hidden = reply.running || reply.number !== turns.length - 1;
  tokens.hidden = reply.running || !reply.entries.length;
  trained.hidden = reply.running || !reply.content;
  const running = [...(turns.at(-1)?.replies.values() ?? [])].filter((each) => each.running);
  byId("stop-all").hidden = !running.length;
  byId("send").hidden = running.length > 0;
  byId("status").textContent = running.length ? `${running.length} replying` : "";
}

// ---- Views: tokens of the reply, of the prompt, and the certificate ----

function opener(reply, label, show) {
  const button = make("button", { type: "button", "aria-expanded": "false" }, label);
  button.addEventListener("click", async () => {
    const open = button.getAttribute("aria-expanded") === "false";
    for (const other of Object.values(reply.buttons)) if (other.ariaExpanded !== null) other.setAttribute("aria-expanded", "false");
    button.setAttribute("aria-expanded", String(open));
    reply.view.replaceChildren();
    reply.view.hidden = !open;
    if (!open) return;
    try {
      reply.view.replaceChildren(...(await show(reply)));
    } catch (error) {
      reply.view.replaceChildren(make("p", { className: "problem" }, error.message));
    }
  });
  return button;
}

/** Tokens in a row; arrow keys and clicks choose one, which `tell` then shows below. */
function flow(label, tokens, tell) {
  const about = make("div", { className: "alternatives", role: "status" });
  const list = make("div", { className: "flow", role: "listbox", tabindex: "0", "aria-label": label });
  const spans = tokens.map((token, i) => make("span", { role: "option", className: token.className, "aria-selected": "false", id: `token-${++made}`, onclick: () => choose(i) }, token.text));
  spans.forEach((span, i) => tokens[i].text.trim() || span.setAttribute("aria-label", JSON.stringify(tokens[i].text)));
  let at = -1;
  function choose(i) {
    if (i < 0 || i >= spans.length) return;
    spans[at]?.setAttribute("aria-selected", "false");
    at = i;
    spans[at].setAttribute("aria-selected", "true");
    spans[at].scrollIntoView({ block: "nearest" });
    list.setAttribute("aria-activedescendant", spans[at].id);
    about.replaceChildren(tell(tokens[at]));
  }
  list.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    choose(at < 0 ? 0 : at + step);
  });
  list.append(...spans);
  return [list, about];
}
let made = 0;

const percent = (p) => `${(100 * p).toPrecision(3)} %`;

/** What is in a token, with whitespace and broken characters made visible. */
function visible(entry) {
  if (entry.token.includes("\ufffd")) return entry.bytes.map((b) => `<${b.toString(16).padStart(2, "0").toUpperCase()}>`).join("");
  const shown = entry.token.replaceAll("\n", "↵\n").replaceAll("\t", "→\t");
  return shown.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2060-\u2069]/g, (c) => `<U+${c.codePointAt(0).toString(16).padStart(4, "0").toUpperCase()}>`);
}

function legend(...pairs) {
  return make("p", { className: "legend" }, ...pairs.map(([className, text]) => make("span", { className }, text)));
}

function showReplyTokens(reply) {
  const tokens = reply.entries.map((entry) => {
    const p = Math.exp(entry.logprob);
    const shade = p >= 0.9 ? "" : p >= 0.5 ? "p1" : p >= 0.1 ? "p2" : "p3";
    return { text: visible(entry), className: `c ${shade}`, entry, p };
  });
  const key = legend(["", "90 % and more"], ["p1", "50 to 90 %"], ["p2", "10 to 50 %"], ["p3", "below 10 %"]);
  const hint = make("p", { className: "note" }, "Choose a token to see what else the model had in mind.");
  return [key, hint, ...flow(`Tokens of the reply of ${reply.name}`, tokens, alternatives)];
}

function alternatives({ entry, p }) {
  const known = entry.top_logprobs.some((top) => top.id === entry.id);
  const rows = known ? entry.top_logprobs : [...entry.top_logprobs, entry];
  const cells = rows.map((each) => {
    const value = Math.exp(each.logprob);
    const bar = make("meter", { min: "0", max: "1", value: String(value), "aria-label": percent(value) });
    const name = make("th", { scope: "row" }, make("code", {}, JSON.stringify(visible(each))), each.id === entry.id ? " ← taken" : "");
    return make("tr", {}, name, make("td", {}, String(each.id)), make("td", {}, percent(value)), make("td", {}, bar));
  });
  const head = make("tr", {}, ...["token", "id", "probability"].map((text) => make("th", { scope: "col" }, text)), make("td"));
  return make("table", {}, make("caption", { className: "unseen" }, `Alternatives, ${percent(p)} for the one taken`), make("thead", {}, head), make("tbody", {}, ...cells));
}

async function showPromptTokens(reply) {
  const found = await (await request("/tokenize", { model: reply.name, messages: reply.messages })).json();
  const tokens = found.token_strs.map((text, i) => ({ text, className: found.control[i] ? "c k" : "c", id: found.tokens[i], control: found.control[i] }));
  const note = make("p", { className: "note" }, `${found.count} tokens, exactly as the model gets them; the context holds ${found.max_model_len}.`);
  const tell = (token) => make("p", {}, make("code", {}, JSON.stringify(token.text)), ` id ${token.id}${token.control ? ", a control token" : ""}`);
  return [note, legend(["k", "control token"]), ...flow("Tokens of the prompt", tokens, tell)];
}

async function showCertificate(reply) {
  const talk = [...reply.messages, { role: "assistant", content: reply.content }];
  const found = await (await request("/certificate", { model: reply.name, messages: talk })).json();
  const parts = [make("p", { className: "note" }, "What whet sft would train of this conversation, as proven by its certificate.")];
  parts.push(legend(["t", "trained"], ["c", "context"]));
  found.examples.forEach((example, i) => {
    const tokens = example.map((token) => ({ ...token, className: (token.weight ? "t" : "c") + (token.control ? " k" : "") }));
    const tell = (token) => make("p", {}, make("code", {}, JSON.stringify(token.text)), ` id ${token.id}, ${token.weight ? `trained with weight ${token.weight}` : "context"}`);
    parts.push(...flow(`Tokens of example ${i + 1}`, tokens, tell));
  });
  const facts = Object.entries(found.facts).concat(found.turns.map((turn) => [`${turn.number} ${turn.role}`, turn.trained]));
  parts.push(make("dl", {}, ...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])));
  return parts;
}

// ---- The page ----

function send() {
  const user = byId("prompt").value.trim();
  const chosen = models.filter((name) => byId(`model-${name}`).checked);
  if (!user) return;
  if (!chosen.length) {
    byId("status").textContent = "Choose a model.";
    return;
  }
  byId("prompt").value = "";
  turns.push({ user, replies: new Map() });
  const replies = make("div", { className: "replies" });
  byId("talk").append(make("p", { className: "said" }, user), replies);
  for (const turn of turns.slice(0, -1)) for (const reply of turn.replies.values()) reply.buttons.again.hidden = true;
  for (const name of chosen) startReply(name, turns.length - 1, replies.appendChild(make("div")));
  scrollTo(0, document.documentElement.scrollHeight);
}

function stopAll() {
  for (const turn of turns) for (const reply of turn.replies.values()) reply.abort.abort();
}

async function readModels() {
  try {
    models = (await (await request("/v1/models")).json()).data.map((model) => model.id);
  } catch (error) {
    byId("status").textContent = error.message;
    return;
  }
  byId("status").textContent = "";
  for (const label of document.querySelectorAll(".models label")) label.remove();
  for (const name of models) {
    const box = make("input", { type: "checkbox", id: `model-${name}` });
    box.checked = true;
    byId("models").append(make("label", {}, box, name));
  }
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (byId("stop-all").hidden) send();
});
document.addEventListener("keydown", (event) => event.key === "Escape" && stopAll());
byId("stop-all").addEventListener("click", stopAll);
byId("key").addEventListener("change", readModels);
byId("clear").addEventListener("click", () => {
  stopAll();
  turns.length = 0;
  byId("talk").replaceChildren();
  byId("stop-all").hidden = true;
  byId("send").hidden = false;
  byId("prompt").focus();
});
addEventListener("pagehide", stopAll);
readModels();
byId("prompt").focus();
