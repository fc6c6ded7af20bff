// Says what a cell of the chunk map is when it is pointed at, and shows where a listed chunk lies.
for (const article of document.querySelectorAll("article")) {
  const map = article.querySelector("svg.chunks");
  if (!map) continue;
  const data = JSON.parse(article.querySelector("script[type='application/json']").textContent);
  const detail = article.querySelector(".detail");
  const picked = map.querySelector(".picked");
  const hint = detail.textContent;
  const count = (number) => number.toLocaleString("en");

  const describe = (cell) => {
    const first = cell * data.share;
    const last = Math.min(first + data.share, data.chunks) - 1;
    const parts = [first === last
      ? `Chunk ${count(first + 1)} of ${count(data.chunks)}`
      : `Chunks ${count(first + 1)} to ${count(last + 1)} of ${count(data.chunks)}`];
    const entry = data.cells[cell];
    if (!entry) return `${parts[0]}: not looked at`;
    const [name, start, stop, score, order, changed] = entry;
    parts.push(`${data.documents[name]}, characters ${count(start)} to ${count(stop)}`);
    if (score !== null) parts.push(`${first === last ? "gate" : "highest gate score"} ${score.toFixed(3)}`);
    parts.push(order ? `reading ${count(order)} of ${count(data.readings)}` : "not read");
    if (changed) parts.push("changed the notes");
    return parts.join(" · ");
  };

  const show = (cell) => {
    const none = cell === null || cell < 0 || cell * data.share >= data.chunks;
    detail.textContent = none ? hint : describe(cell);
    picked.setAttribute("visibility", none ? "hidden" : "visible");
    if (none) return;
    picked.setAttribute("x", (cell % data.columns) * 10 + 0.5);
    picked.setAttribute("y", Math.floor(cell / data.columns) * 10 + 0.5);
  };

  const cellAt = (event) => {
    const box = map.getBoundingClientRect();
    const scale = (data.columns * 10) / box.width;
    const column = Math.floor(((event.clientX - box.left) * scale) / 10);
    const row = Math.floor(((event.clientY - box.top) * scale) / 10);
    return column < 0 || column >= data.columns ? null : row * data.columns + column;
  };
  map.addEventListener("pointermove", (event) => show(cellAt(event)));
  map.addEventListener("pointerdown", (event) => show(cellAt(event)));
  for (const item of article.querySelectorAll("li[data-cell]")) {
    item.addEventListener("pointerenter", () => show(Number(item.dataset.cell)));
    item.addEventListener("focusin", () => show(Number(item.dataset.cell)));
  }
}
