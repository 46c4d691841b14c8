"use strict";
// Names and paths come out of the data: they are only ever set as text.
const clips = JSON.parse(document.getElementById("clips").textContent);
const $ = id => document.getElementById(id);

function make(name, text, parent, attributes = {}) {
  const node = document.createElement(name);
  node.textContent = text;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  parent.append(node);
  return node;
}

// Tables: a heading sorts, numbers from the largest at first; what is undefined stays at the end.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const numeric = head.hasAttribute("data-numeric"), before = head.getAttribute("aria-sort");
    const up = before === "none" ? !numeric : before === "descending";
    const value = row => row.cells[column].dataset.value;
    const order = (a, b) => numeric ? a - b : a.localeCompare(b);
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      return up ? order(x, y) : order(y, x);
    });
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...rows);
  }));
}

// The confusion matrix: one stop for the tab key, arrow keys to the nearest cell that way.
const cells = [...document.querySelectorAll(".cell")];
const place = cell => cell.dataset.at.split(",").map(Number);
const say = cell => { $("readout").textContent = cell.getAttribute("aria-label"); };

function neighbour(from, down, right) {
  const [row, column] = place(from);
  let best = null, least = Infinity;
  for (const cell of cells) {
    const [r, c] = place(cell);
    const along = down ? (r - row) * down : (c - column) * right, aside = Math.abs(down ? c - column : r - row);
    if (along > 0 && along + 3 * aside < least) { best = cell; least = along + 3 * aside; }
  }
  return best;
}

function choose(key, move) {
  const [truth, answer] = key.split(",").map(Number), list = $("cell-clips"), found = clips.cells[key] || [];
  for (const cell of cells) cell.classList.toggle("chosen", cell.dataset.cell === key);
  $("cell-title").textContent = truth === answer ? `${clips.names[truth]}, rightly named` : `${clips.names[truth]} → ${clips.names[answer]}`;
  list.replaceChildren();
  for (const [path, confidence, start, card, address] of found) {
    const item = make("li", "", list);
    const link = address ?? path.split("/").map(encodeURIComponent).join("/");
    if (clips.base === null) make("bdi", path, item); else make("a", path, item, { href: clips.base + link, dir: "auto" });
    make("small", ` ${start === null ? "" : `from ${start} s `}${confidence === null ? "" : `${Math.round(100 * confidence)}% sure `}`, item);
    if (card !== null) make("a", "listen below", item, { href: `#clip${card}` });
  }
  $("cell-note").textContent = `${found.length} listed, the surest first. ${$("cell-note").dataset.more}`;
  if (move) $("cell-title").focus();
}

cells.forEach((cell, number) => {
  cell.tabIndex = number ? -1 : 0;
  cell.addEventListener("pointerenter", () => say(cell));
  cell.addEventListener("focus", () => say(cell));
  cell.addEventListener("click", () => choose(cell.dataset.cell));
  cell.addEventListener("keydown", event => {
    const way = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key];
    if (event.key === "Enter" || event.key === " ") choose(cell.dataset.cell);
    else if (way) {
      const next = neighbour(cell, ...way);
      if (next) { cell.tabIndex = -1; next.tabIndex = 0; next.focus(); }
    } else return;
    event.preventDefault();
  });
});
for (const link of document.querySelectorAll("[data-go]")) link.addEventListener("click", () => choose(link.dataset.go, true));

// Players: one at a time, with a line that walks over the spectrogram; a press on the spectrogram plays from there.
const players = [...document.querySelectorAll("audio")];
for (const player of players) {
  const picture = player.closest(".card").querySelector(".picture"), head = picture.querySelector(".head");
  const draw = () => {
    head.style.left = `${100 * player.currentTime / Number(picture.dataset.seconds)}%`;
    if (!player.paused) requestAnimationFrame(draw);
  };
  player.addEventListener("play", () => {
    for (const other of players) if (other !== player) other.pause();
    picture.classList.add("playing");
    draw();
  });
  player.addEventListener("ended", () => picture.classList.remove("playing"));
  picture.addEventListener("click", event => {
    const box = picture.getBoundingClientRect();
    player.currentTime = Number(picture.dataset.seconds) * (event.clientX - box.left) / box.width;
    player.play();
  });
}
