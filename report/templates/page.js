"use strict";
// Names and paths come from the data: they are only ever set as text.
const clips = JSON.parse(document.getElementById("clips").textContent);
const $ = id => document.getElementById(id);

function append(name, text, parent, attributes = {}) {
  const node = document.createElement(name);
  node.textContent = text;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  parent.append(node);
  return node;
}

// Tables: a heading sorts, numbers in falling order first; undefined values stay at the end.
function compareRows(a, b, column, numeric, ascending) {
  const x = a.cells[column].dataset.value, y = b.cells[column].dataset.value;
  if (x === "" || y === "") return (x === "") - (y === "");
  const order = numeric ? x - y : x.localeCompare(y);
  return ascending ? order : -order;
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const numeric = head.hasAttribute("data-numeric"), before = head.getAttribute("aria-sort");
    const ascending = before === "none" ? !numeric : before === "descending";
    const rows = [...body.rows].sort((a, b) => compareRows(a, b, column, numeric, ascending));
    for (const each of heads) each.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    body.append(...rows);
  }));
}

// The confusion matrix: one stop for the tab key; arrow keys move to the nearest cell that way.
const cells = [...document.querySelectorAll(".cell")];
const position = cell => cell.dataset.at.split(",").map(Number);
const showCell = cell => { $("readout").textContent = cell.getAttribute("aria-label"); };

function neighbour(from, down, right) {
  const [row, column] = position(from);
  let nearest = null, least = Infinity;
  for (const cell of cells) {
    const [r, c] = position(cell);
    const along = down ? (r - row) * down : (c - column) * right;
    const aside = Math.abs(down ? c - column : r - row);
    if (along > 0 && along + 3 * aside < least) { nearest = cell; least = along + 3 * aside; }
  }
  return nearest;
}

function listClip([path, confidence, start, card, address]) {
  const item = append("li", "", $("cell-clips"));
  if (clips.base === null) append("bdi", path, item);
  else {
    const link = address ?? path.split("/").map(encodeURIComponent).join("/");
    append("a", path, item, { href: clips.base + link, dir: "auto" });
  }
  const from = start === null ? "" : `from ${start} s `;
  const sure = confidence === null ? "" : `${Math.round(100 * confidence)}% confidence `;
  append("small", ` ${from}${sure}`, item);
  if (card !== null) append("a", "listen below", item, { href: `#clip${card}` });
}

function choose(key, moveFocus) {
  const [truth, predicted] = key.split(",").map(index => clips.names[index]);
  const listed = clips.cells[key] || [];
  for (const cell of cells) cell.classList.toggle("chosen", cell.dataset.cell === key);
  const title = truth === predicted ? `${truth}, correct` : `${truth} → ${predicted}`;
  $("cell-title").textContent = title;
  $("cell-clips").replaceChildren();
  listed.forEach(listClip);
  $("cell-note").textContent = `${listed.length} listed, most confident first.`;
  if (moveFocus) $("cell-title").focus();
}

cells.forEach((cell, number) => {
  cell.tabIndex = number ? -1 : 0;
  cell.addEventListener("pointerenter", () => showCell(cell));
  cell.addEventListener("focus", () => showCell(cell));
  cell.addEventListener("click", () => choose(cell.dataset.cell));
  cell.addEventListener("keydown", event => {
    const ways = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] };
    if (!(event.key in ways)) return;  // Enter and space click a button anyway
    event.preventDefault();
    const next = neighbour(cell, ...ways[event.key]);
    if (next) { cell.tabIndex = -1; next.tabIndex = 0; next.focus(); }
  });
});
for (const link of document.querySelectorAll("[data-go]")) {
  link.addEventListener("click", () => choose(link.dataset.go, true));
}

// Pointing at a spectrogram shows time and frequency below it.
const mels = $("listen")?.dataset.hertz.split(" ").filter(Boolean).map(Number) ?? [];
for (const picture of document.querySelectorAll(".picture")) {
  const line = picture.closest(".card").querySelector(".pointed");
  const seconds = Number(picture.dataset.seconds);
  picture.addEventListener("pointermove", event => {
    const box = picture.getBoundingClientRect();
    const across = (event.clientX - box.left) / box.width;
    const up = 1 - (event.clientY - box.top) / box.height;
    const mel = Math.max(0, Math.min(mels.length - 1, Math.floor(up * mels.length)));
    const hertz = mels.length ? `, ${(mels[mel] / 1000).toFixed(2)} kHz` : "";
    line.textContent = `${(across * seconds).toFixed(2)} s${hertz}`;
  });
  picture.addEventListener("pointerleave", () => { line.textContent = ""; });
}

// Players: one at a time, with a line that moves over the spectrogram.
// A click on it plays from there.
const players = [...document.querySelectorAll("audio")];
for (const player of players) {
  const picture = player.closest(".card").querySelector(".picture");
  const head = picture.querySelector(".head"), seconds = Number(picture.dataset.seconds);
  const draw = () => {
    head.style.left = `${100 * player.currentTime / seconds}%`;
    if (!player.paused) requestAnimationFrame(draw);
  };
  player.addEventListener("play", () => {
    for (const each of players) if (each !== player) each.pause();
    picture.classList.add("playing");
    draw();
  });
  player.addEventListener("ended", () => picture.classList.remove("playing"));
  picture.addEventListener("click", event => {
    const box = picture.getBoundingClientRect();
    player.currentTime = seconds * (event.clientX - box.left) / box.width;
    player.play();
  });
}
