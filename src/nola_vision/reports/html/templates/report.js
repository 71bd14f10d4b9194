"use strict";

// Tables of class "sortable": a button in each head sorts the lines, up first, then down; numbers by value.
const number = text => text === "" || text === "-" ? NaN : Number(text.replaceAll(",", ""));

function sort(table, head) {
  const down = head.getAttribute("aria-sort") === "ascending";
  const body = table.tBodies[0];
  const keyed = [...body.rows].map(line => [line.cells[head.cellIndex].textContent.trim(), line]);
  const numeric = keyed.every(([text]) => text === "" || text === "-" || !Number.isNaN(number(text)));
  const compare = (a, b) => numeric ? number(a) - number(b) : a.localeCompare(b);
  const absent = text => text === "" || text === "-"; // last in both directions
  keyed.sort(([a], [b]) => absent(a) - absent(b) || (down ? -1 : 1) * (absent(a) ? 0 : compare(a, b)));
  body.append(...keyed.map(([, line]) => line));
  for (const other of table.tHead.querySelectorAll("[aria-sort]")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const head of table.tHead.querySelectorAll("th")) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(table, head));
    head.append(button);
  }
}

// A misclassified image opens in the dialog; the arrow keys show the others of its gallery, Escape closes.
const dialog = document.querySelector("dialog");
let shown = null;

function show(photo) {
  shown = photo;
  dialog.querySelector(".view").replaceChildren(...[...photo.children].map(child => child.cloneNode(true)));
  if (!dialog.open) dialog.showModal();
}

function step(by) {
  const photos = [...shown.parentElement.children];
  show(photos[(photos.indexOf(shown) + by + photos.length) % photos.length]);
}

for (const photo of document.querySelectorAll(".photo")) photo.addEventListener("click", () => show(photo));
for (const button of dialog.querySelectorAll("button[value]")) {
  button.addEventListener("click", () => button.value === "close" ? dialog.close() : step(Number(button.value)));
}
dialog.addEventListener("keydown", event => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (by) { event.preventDefault(); step(by); }
});
dialog.addEventListener("close", () => shown?.focus());

// What is printed is all there is, but for very long lists of runs.
addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details:not(.long)")) fold.open = true;
});
