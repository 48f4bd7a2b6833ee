"use strict";
// Headings of tables become buttons that sort; without this script the tables stand as they are.
for (const table of document.querySelectorAll("table:not(.text)")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const key = (row, i) => {
    const cell = row.cells[i], value = cell.dataset.v;
    return value === undefined ? cell.textContent.trim() : Number(value);
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const missing = (row) => row.cells[i].classList.contains("none");
      const rows = [...body.rows].sort((a, b) =>
        missing(a) !== missing(b) ? missing(a) - missing(b) : (down ? -1 : 1) * compare(key(a, i), key(b, i)));
      body.append(...rows);
    });
  });
}
