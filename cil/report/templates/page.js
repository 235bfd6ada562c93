"use strict";

// Sort a table by the column of the heading that was pressed; pressed again, the other way round.
function sortBy(table, header) {
  const first = header.dataset.first;
  const other = first === "ascending" ? "descending" : "ascending";
  const direction = header.getAttribute("aria-sort") === first ? other : first;
  const sign = direction === "ascending" ? 1 : -1;
  const column = header.cellIndex;
  const value = (row) => row.cells[column].dataset.value;
  const compare = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (column === 0) return sign * x.localeCompare(y, "en", { numeric: true });
    if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y); // what has no number comes last
    return sign * (x - y);
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  for (const each of table.tHead.rows[0].cells) each.setAttribute("aria-sort", "none");
  header.setAttribute("aria-sort", direction);
  const heading = header.textContent.trim();
  document.getElementById("sorted").textContent = `Sorted by ${heading}, ${direction}.`;
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const header of table.tHead.rows[0].cells) {
    header.querySelector("button").addEventListener("click", () => sortBy(table, header));
  }
}

// A link to a method's runs unfolds them.
function unfold(hash) {
  const target = document.getElementById(hash.slice(1));
  if (target && target.tagName === "DETAILS") target.open = true;
}
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='#']");
  if (link) unfold(link.hash);
});
unfold(location.hash);
