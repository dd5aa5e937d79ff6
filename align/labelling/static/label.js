"use strict";
// The page on which people choose. What comes next is fetched and decoded ahead, so that an answer shows it at once; the
// answer goes into this browser's storage first and from there to the server, one after another, until it says that it
// is on its disk. An id that this page makes keeps one that is sent twice from counting twice.

const $ = (id) => document.getElementById(id);
const { task, name } = document.body.dataset;
const base = `/annotate/${encodeURIComponent(name)}/`;
const AHEAD = 8;
const KEPT = 20; // answers that can be taken back without asking the server for their pictures

const queue = []; // showings that come, their pictures on the way or decoded
const past = []; // {id, showing} of answers that can be taken back, the newest last
const outbox = []; // entries that the server has not confirmed
let current = null, session = "", since = 0, pressed = 0, done = false;
let ranks = []; // places in order of preference while ordering
let ordering = task === "best" && localStorage.getItem("t2i-align-label ordering") === "true";
let sending = false, filling = false, failures = 0, progress = null, fault = "";

const elapsed = () => (performance.now() - since) / 1000;
const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");
const stored = (id) => `t2i-align-label ${name} ${session} ${id}`;

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// pictures
async function load(source) {
  try {
    for (let attempt = 0; ; attempt++) {
      let response;
      try {
        response = await fetch(base + source);
      } catch (error) { // the server is away; it comes back
        await new Promise((go) => setTimeout(go, Math.min(500 * 2 ** attempt, 4000)));
        continue;
      }
      if (!response.ok) {
        const told = await response.json().catch(() => ({ error: `the server says ${response.status}` }));
        return { fault: told.error };
      }
      const image = new Image();
      image.src = URL.createObjectURL(await response.blob());
      await image.decode();
      image.className = Math.max(image.naturalWidth, image.naturalHeight) <= 160 ? "tiny" : "";
      image.draggable = false;
      return { image };
    }
  } catch (error) {
    return { fault: `This picture cannot be shown: ${error.message}` };
  }
}

function prepare(showing) {
  showing.pictures = [];
  showing.ready = Promise.all(showing.src.map(load)).then((pictures) => { showing.pictures = pictures; });
  return showing;
}

function release(showing) {
  showing.ready?.then(() => showing.pictures.forEach(({ image }) => image && URL.revokeObjectURL(image.src)));
}

// the server
function held() {
  const waiting = outbox.filter((entry) => !entry.undo).map((entry) => (entry.check ? `${entry.item}.${entry.check}` : `${entry.item}`));
  return [...(current ? [current.key] : []), ...queue.map((showing) => showing.key), ...waiting];
}

async function fill(first = false) {
  if (filling || queue.length >= AHEAD - 2) return;
  filling = true;
  try {
    const response = await fetch(`${base}next?held=${held().join(",")}${first ? "&last=true" : ""}`);
    if (!response.ok) throw new Error((await response.json()).error);
    let told = await response.json();
    failures = 0;
    if (first) {
      session = told.session;
      earlier(told.last);
      told = (await recover()) || told;
    }
    heard(told);
    const known = new Set(held());
    for (const showing of told.items) if (!known.has(showing.key)) queue.push(prepare(showing));
    done = !told.items.length && !queue.length && !outbox.length;
  } catch (error) {
    failures++;
    tell(error.message === "Failed to fetch" ? null : error.message);
  } finally {
    filling = false;
  }
  if (!current) advance();
  if (failures || (!current && !queue.length)) setTimeout(fill, Math.min(1000 * (1 + failures), 5000), !session);
}

function heard(told) {
  progress = told.progress;
  fault = told.fault;
  paint();
}

function earlier(last) { // answers that this page did not see given, which can be taken back too
  const known = new Set(past.map(({ id }) => id));
  const unseen = last.filter(({ id }) => !known.has(id));
  past.unshift(...unseen.map(({ id, ...showing }) => ({ id, showing: { ...showing, late: true } })));
}

async function recover() { // answers that an earlier page of this person, or a browser that was closed, could not send
  const own = `t2i-align-label ${name} ${session} `;
  const kept = Object.keys(localStorage).filter((key) => key.startsWith(own) && !outbox.some((entry) => stored(entry.id) === key));
  const entries = kept.map((key) => JSON.parse(localStorage.getItem(key))).sort((a, b) => a.at - b.at);
  if (!entries.length) return null;
  outbox.unshift(...entries.map(({ at, ...entry }) => entry));
  await send();
  const response = await fetch(`${base}next?held=${held().join(",")}&last=true`);
  if (!response.ok) return null;
  const told = await response.json(); // what was fetched before does not know of these
  earlier(told.last);
  return told;
}

async function send() {
  if (sending || !outbox.length) return;
  sending = true;
  const entries = outbox.slice(0, 50);
  try {
    const response = await fetch(`${base}answers`, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ entries }), keepalive: true,
    });
    const told = await response.json();
    if (!response.ok) throw new Error(told.error);
    failures = 0;
    for (const { id } of entries) {
      const result = told.results[id] || "";
      if (result.startsWith("refused")) tell(`An answer was ${result}`);
      localStorage.removeItem(stored(id));
      outbox.splice(outbox.findIndex((entry) => entry.id === id), 1);
    }
    heard(told);
    fill();
  } catch (error) {
    failures++;
    tell(error instanceof TypeError ? null : error.message);
    setTimeout(send, Math.min(300 * 2 ** failures, 5000));
  } finally {
    sending = false;
  }
  paint();
  if (outbox.length && !failures) send();
}

function post(entry) {
  localStorage.setItem(stored(entry.id), JSON.stringify({ ...entry, at: Date.now() }));
  outbox.push(entry);
  send();
}

// what is on the screen
function tell(message) {
  $("note").textContent = message || "";
  $("note").hidden = !message;
}

function paint() {
  const state = $("state");
  const waiting = outbox.length === 1 ? "1 answer waits" : `${outbox.length} answers wait`;
  state.className = failures || fault ? "warn" : "";
  state.textContent = failures ? `No connection; ${outbox.length ? `${waiting} in this browser` : "trying again"}`
    : fault || (progress && progress.undrawn ? `${progress.undrawn} still being drawn` : outbox.length > 2 ? `${waiting}` : "");
  if (!progress) return;
  const { wanted, pace, own } = progress;
  const all = Math.min(progress.done + outbox.filter((entry) => !entry.undo && !entry.check).length, wanted);
  $("progress").value = wanted ? all / wanted : 0;
  $("count").textContent = `${all} of ${wanted}`;
  const minutes = pace ? Math.ceil(((wanted - all) * pace) / 60) : 0;
  $("pace").textContent = own ? `yours ${own}, ${pace.toFixed(1)} s each${wanted > all ? `, about ${minutes} min left` : ""}` : "";
  $("undo").disabled = !past.length;
}

const glass = '<svg viewBox="0 0 16 16" aria-hidden="true"><circle cx="7" cy="7" r="4.6"/><path d="M10.5 10.5 14 14M7 5v4M5 7h4"/></svg>';

function figures(count) { // made once for a number of pictures; what they hold changes
  const room = $("pictures");
  if (room.childElementCount === count) return [...room.children];
  room.className = `of${count}`;
  room.replaceChildren(...Array.from({ length: count }, (_, at) => {
    const choose = element("button", { type: "button", class: "choose", "aria-label": label(at, count) });
    choose.addEventListener("click", (event) => pick(at + 1, event));
    const enlarge = element("button", { type: "button", class: "enlarge", "aria-label": `Picture ${at + 1} at full size` });
    enlarge.innerHTML = glass;
    enlarge.addEventListener("click", () => zoom(at));
    return element("figure", {}, choose, ...(count > 1 ? [element("span", { class: "number", "aria-hidden": "true" }, `${at + 1}`)] : []), enlarge);
  }));
  return [...room.children];
}

function label(at, count) {
  if (count === 1) return "The picture; enlarge it";
  return task === "pair" ? `Picture ${at + 1} is better` : `Picture ${at + 1} of ${count} is the best`;
}

function show(showing) {
  current = showing;
  const made = figures(showing.src.length);
  showing.pictures.forEach(({ image, fault: wrong }, at) => {
    if (image) image.alt = `Picture ${at + 1}`;
    made[at].firstChild.replaceChildren(image || element("p", {}, wrong));
  });
  $("prompt").textContent = showing.prompt;
  $("live").textContent = showing.prompt;
  const broken = showing.pictures.some((picture) => picture.fault);
  tell(broken ? "It can only be skipped." : null);
  for (const button of document.querySelectorAll("#choices button, .choose")) button.disabled = broken && button.dataset.choice !== "skip";
  document.querySelector("footer").hidden = false;
  ranks = [];
  mark();
  document.body.dataset.item = showing.key;
  document.body.dataset.state = "item";
  since = performance.now();
  const from = pressed;
  pressed = 0;
  if (from) requestAnimationFrame(() => setTimeout(() => performance.measure("next-picture", { start: from, end: performance.now() })));
}

async function advance() {
  const showing = queue.shift();
  if (showing) {
    current = showing;
    if (showing.pictures.length < showing.src.length) {
      delete document.body.dataset.item;
      document.body.dataset.state = "loading";
      await showing.ready;
    }
    if (current === showing) show(showing);
    fill();
    return;
  }
  current = null;
  delete document.body.dataset.item;
  $("pictures").replaceChildren();
  document.querySelector("footer").hidden = true;
  const all = progress && progress.done >= progress.wanted;
  document.body.dataset.state = !done ? "loading" : all ? "done" : "waiting";
  const waits = progress && progress.undrawn ? "Pictures are being drawn …" : "The last items are with other people; this page goes on by itself.";
  $("prompt").textContent = !done ? "Loading …" : all ? "All done. Thank you!" : waits;
  $("live").textContent = $("prompt").textContent;
  fill();
}

// answers
function answer(choice) {
  if (!current || document.body.dataset.item !== current.key) return;
  if (choice !== "skip" && current.pictures.some((picture) => picture.fault)) return;
  const why = [...$("why").querySelectorAll(":checked")].map((box) => { box.checked = false; return box.value; });
  const id = newId();
  past.push({ id, showing: current });
  if (past.length > KEPT) release(past.shift().showing);
  post({ id, session, item: current.item, check: current.check, choice, why, seconds: elapsed() });
  current = null;
  advance();
  paint();
}

function pick(place, event) {
  pressed = event.timeStamp;
  if (!current) return;
  if (task === "pair") answer(place);
  else if (task !== "best") zoom(0);
  else if (!ordering) answer([place]);
  else {
    ranks = ranks.includes(place) ? ranks.filter((other) => other !== place) : [...ranks, place];
    const count = current.src.length;
    if (ranks.length === count - 1) ranks.push(Array.from({ length: count }, (_, at) => at + 1).find((other) => !ranks.includes(other)));
    mark();
  }
}

function mark() { // ranks while ordering
  if (task !== "best") return;
  $("order").setAttribute("aria-pressed", ordering);
  $("done").hidden = !ordering;
  $("done").disabled = !ranks.length;
  [...$("pictures").children].forEach((figure, at) => {
    const rank = ranks.indexOf(at + 1) + 1, number = figure.querySelector(".number");
    number.textContent = rank ? `${rank}${["st", "nd", "rd"][rank - 1] || "th"}` : `${at + 1}`;
    number.classList.toggle("ranked", rank > 0);
    const place = `Picture ${at + 1} of ${ranks.length ? $("pictures").childElementCount : current.src.length}`;
    figure.firstChild.setAttribute("aria-label", ordering ? `${place}, ${rank ? `rank ${rank}` : "not ranked"}` : `${place} is the best`);
  });
}

function order(on) {
  ordering = on;
  ranks = [];
  localStorage.setItem("t2i-align-label ordering", on);
  mark();
}

function undo() {
  const last = past.pop();
  if (!last) return;
  if (current) queue.unshift(current);
  post({ id: newId(), undo: last.id });
  queue.unshift(last.showing.late ? prepare(last.showing) : last.showing);
  delete last.showing.late;
  current = null;
  $("live").textContent = "Taken back.";
  advance();
  paint();
}

// full size
let zoomed = 0;
const whole = new Map(); // of the item that is shown

async function zoom(at) {
  if (!current || !document.body.dataset.item) return;
  const showing = current, dialog = $("zoom"), pane = $("pane"), count = showing.src.length;
  zoomed = (at + count) % count;
  const { scrollLeft, scrollTop } = pane, key = `${showing.key} ${zoomed}`;
  if (!dialog.open) { whole.clear(); dialog.showModal(); pane.focus(); }
  const number = count > 1 ? `Picture ${zoomed + 1} of ${count}` : "Picture";
  $("which").textContent = `${number} …`;
  if (!whole.has(key)) whole.set(key, load(`${showing.src[zoomed]}&full=true`));
  const { image, fault: wrong } = await whole.get(key);
  if (!dialog.open || `${showing.key} ${zoomed}` !== key) return;
  if (image) {
    image.alt = number;
    image.onclick = () => fit($("fit").getAttribute("aria-pressed") !== "true");
  }
  pane.replaceChildren(image || element("p", {}, wrong));
  $("which").textContent = image ? `${number}, ${image.naturalWidth} × ${image.naturalHeight}` : number;
  fit($("fit").getAttribute("aria-pressed") === "true");
  pane.scrollTo(scrollLeft, scrollTop); // the same spot of each, to compare
}

function fit(on) {
  $("fit").setAttribute("aria-pressed", on);
  $("pane").querySelector("img")?.classList.toggle("fit", on);
}

$("zoom").addEventListener("close", () => {
  $("pane").replaceChildren();
  for (const loaded of whole.values()) loaded.then(({ image }) => image && URL.revokeObjectURL(image.src));
  whole.clear();
});

// keys
const CHOICES = {
  pair: { ArrowLeft: 1, 1: 1, ArrowRight: 2, 2: 2, ArrowDown: "tie", 0: "tie", ArrowUp: "both bad", x: "both bad" },
  best: { x: [] },
  thumbs: { ArrowUp: "good", 1: "good", ArrowDown: "bad", 2: "bad" },
  score: { 1: 1, 2: 2, 3: 3, 4: 4, 5: 5 },
}[task];
const TAGS = "qwert";

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if ($("help").open) return;
  if ($("zoom").open) {
    if (key === "z" || key === " ") $("zoom").close();
    else if (key === "f") fit($("fit").getAttribute("aria-pressed") !== "true");
    else if (key === "ArrowLeft" && current.src.length > 1) zoom(zoomed - 1);
    else if (key === "ArrowRight" && current.src.length > 1) zoom(zoomed + 1);
    else if (key >= "1" && key <= `${current.src.length}`) zoom(Number(key) - 1);
    else return;
    event.preventDefault();
    return;
  }
  const focused = event.target.matches("button, input, summary, a");
  if (key === "Tab" || (focused && (key === " " || (key === "Enter" && !ordering)))) return;
  let known = true;
  if (event.repeat) known = key in CHOICES; // a key that is held down answers once
  else if (key === "u" || key === "Backspace") undo();
  else if (key === "z" || key === " ") zoom(0);
  else if (key === "?") $("help").showModal();
  else if (key === "s") { pressed = event.timeStamp; answer("skip"); }
  else if (TAGS.includes(key)) $("why").querySelectorAll("input")[TAGS.indexOf(key)]?.click();
  else if (key in CHOICES) { pressed = event.timeStamp; answer(CHOICES[key]); }
  else if (task === "best" && key === "o") order(!ordering);
  else if (task === "best" && key === "Enter" && ranks.length) { pressed = event.timeStamp; answer(ranks); }
  else if (task === "best" && current && key >= "1" && key <= `${current.src.length}`) pick(Number(key), event);
  else known = false;
  if (known) event.preventDefault();
});

for (const button of document.querySelectorAll("#choices [data-choice]"))
  button.addEventListener("click", (event) => {
    const { choice } = button.dataset;
    pressed = event.timeStamp;
    answer(choice === "none" ? [] : /^\d$/.test(choice) ? Number(choice) : choice);
  });
$("undo").addEventListener("click", undo);
$("keys").addEventListener("click", () => $("help").showModal());
$("help-close").addEventListener("click", () => $("help").close());
$("close").addEventListener("click", () => $("zoom").close());
$("fit").addEventListener("click", () => fit($("fit").getAttribute("aria-pressed") !== "true"));
if (task === "best") {
  $("order").addEventListener("click", () => order(!ordering));
  $("done").addEventListener("click", (event) => { if (ranks.length) { pressed = event.timeStamp; answer(ranks); } });
}
addEventListener("online", () => { failures = 0; send(); fill(); });
setInterval(() => { if (current && !document.hidden) fetch(`${base}next?held=${held().join(",")}`).catch(() => {}); }, 60000); // they stay ours
fill(true);
