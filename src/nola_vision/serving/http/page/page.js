// Adapters with search, an image, and the answers of the chosen adapters side by side. Names are untrusted text: they
// are only ever set as text.
"use strict";

const SHOWN = 50; // names in the list; the search finds the others
const MOST = 12; // adapters at once
const BASE = "__base__";
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;

const $ = (id) => document.getElementById(id);
const printable = (text) => text.replace(UNSEEN, (one) => "\\u" + one.charCodeAt(0).toString(16).padStart(4, "0"));

/** An element with text or children. */
function make(tag, content = [], attributes = {}) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...[content].flat());
  return element;
}

let key = ""; // the API key, in this page only
let image = null; // the file or blob
let page = { ids: [], total: 0, text: "" };
const chosen = new Map(); // name -> its answer: null while it is asked for

/** A request without the service's key. */
class Refused extends Error {}

/** What a route answers. Throws an Error with the service's reason. */
async function ask(path, options = {}) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch {
    throw new Error("The service does not answer. Is it still running?");
  }
  const answer = await response.json().catch(() => ({}));
  if (response.status === 401) {
    const given = "Authorization" in headers;
    if (!given || headers.Authorization === `Bearer ${key}`) showKey(given); // else it is of a key before
    throw new Refused(given ? "The service does not accept this API key." : "The service needs its API key.");
  }
  if (!response.ok) throw new Error(answer.error ?? `HTTP status ${response.status}`);
  return answer;
}

// --- the API key

function showKey(wrong) {
  if (!$("key").hidden) return;
  $("key-text").setAttribute("aria-invalid", wrong);
  $("key-note").textContent = wrong ? "The service does not accept this key: enter another." : "";
  $("key").hidden = false;
  $("key-text").focus();
}

$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key-text").value.trim();
  $("key-text").value = "";
  $("key").hidden = true;
  search();
  for (const [id, result] of [...chosen]) if (result?.refused) answer(id);
});

// --- the list

let latest = 0;
async function search() {
  const number = ++latest;
  const text = $("search").value.trim();
  try {
    // one more than is shown: the backbone is in the list, and has no classes
    const found = await ask(`v1/models?limit=${SHOWN + 1}&search=${encodeURIComponent(text)}`);
    if (number !== latest) return;
    const adapters = found.data.filter((one) => one.id !== BASE);
    const hasBase = adapters.length < found.data.length;
    page = { ids: adapters.slice(0, SHOWN).map((one) => one.id), total: found.total - (hasBase ? 1 : 0), text };
    if (found.data.length) $("backbone").textContent = `Backbone: ${printable(found.data[0].root)}`;
    showList();
  } catch (problem) {
    if (number === latest) $("count").textContent = problem.message;
  }
}

function showList() {
  const { ids, total, text } = page;
  const of = total.toLocaleString("en");
  $("count").textContent =
    total === 0 && text === "" ? "The service has no adapters." :
    total === 0 ? "No adapter has this in its name." :
    ids.length < total ? `The first ${ids.length} of ${of}: search for others.` :
    total === 1 ? "1 adapter" : `${of} adapters`;
  $("list").replaceChildren(...ids.map((id) => {
    const box = make("input", [], { type: "checkbox" });
    box.checked = chosen.has(id);
    box.addEventListener("change", () => (box.checked ? choose(id, box) : drop(id)));
    return make("li", make("label", [box, make("bdi", printable(id))]));
  }));
}

function choose(id, box) {
  if (chosen.size >= MOST) {
    box.checked = false;
    $("hint").textContent = `At most ${MOST} adapters at once: remove one first.`;
    return;
  }
  chosen.set(id, null);
  answer(id);
}

function drop(id) {
  chosen.delete(id);
  showList();
  showAnswers();
}

let timer = 0;
$("search").addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(search, 150);
});

// --- the image

function take(file) {
  if (!file) return;
  image = file;
  URL.revokeObjectURL($("preview").src);
  $("preview").src = URL.createObjectURL(file);
  $("preview").hidden = false;
  $("drop-text").textContent = printable(file.name ?? "pasted image");
  for (const id of chosen.keys()) answer(id);
}

$("preview").addEventListener("error", () => ($("preview").hidden = true)); // such as HEIC: the service may read it
$("file").addEventListener("change", () => take($("file").files[0]));
document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData?.files ?? [];
  if (file) take(file);
});
for (const kind of ["dragover", "dragleave", "drop"])
  document.addEventListener(kind, (event) => {
    event.preventDefault(); // the browser would open the file
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") take(event.dataTransfer.files[0]);
  });

// --- the answers

async function answer(id) {
  const asked = image;
  if (chosen.has(id)) chosen.set(id, null);
  showAnswers();
  if (!asked) return;
  let result;
  try {
    result = { labels: await ask(`models/${encodeURIComponent(id)}`, {
      method: "POST", body: asked, headers: { "Content-Type": "application/octet-stream" },
    }) };
  } catch (problem) {
    result = { problem: problem.message, refused: problem instanceof Refused };
  }
  if (asked !== image || !chosen.has(id)) return; // another image since, or removed
  chosen.set(id, result);
  showAnswers();
}

function showAnswers() {
  const waiting = [...chosen.values()].filter((one) => one === null).length;
  $("hint").textContent =
    !chosen.size && !image ? "Choose an image and one or more adapters." :
    !chosen.size ? "Choose one or more adapters." :
    !image ? "Choose an image." :
    waiting ? "Asking…" : `Answers of ${chosen.size} ${chosen.size === 1 ? "adapter" : "adapters"}`;
  $("answers").replaceChildren(...[...chosen].map(([id, result]) => card(id, result)));
}

function card(id, result) {
  const remove = make("button", "Remove", { type: "button", "aria-label": `Remove ${printable(id)}` });
  remove.addEventListener("click", () => {
    drop(id);
    ($("answers").querySelector("button") ?? $("search")).focus();
  });
  const body =
    result === null ? make("p", image ? "…" : "No image yet") :
    result.problem ? make("p", printable(result.problem), { class: "problem" }) :
    table(id, result.labels);
  return make("li", [make("div", [make("h3", make("bdi", printable(id))), remove], { class: "top" }), body]);
}

function table(id, labels) {
  const rows = labels.map(({ label, score }) => {
    const bar = make("span", [], { class: "bar", "aria-hidden": "true" });
    bar.style.width = `${100 * score}%`;
    const name = make("th", [make("bdi", printable(label)), bar], { scope: "row" });
    return make("tr", [name, make("td", `${(100 * score).toFixed(1)} %`)]);
  });
  return make("table", [make("caption", `Labels and scores of ${printable(id)}`), make("tbody", rows)]);
}

showAnswers();
search();
