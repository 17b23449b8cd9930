"use strict";
const root = document.documentElement;
document.getElementById("theme").addEventListener("click", () => {
  const now = getComputedStyle(root).colorScheme;
  const isDark = now === "dark" || (now !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
  root.style.colorScheme = isDark ? "light" : "dark";
});
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const rows = [...table.tBodies[0].rows].sort((a, b) =>
        sign * value(a).localeCompare(value(b), "en", { numeric: true }));
      const numbers = rows.map((row) => parseFloat(value(row)));
      if (numbers.some((n) => !isNaN(n)) && rows.every((row) => row.cells[column].dataset.value !== undefined)) {
        const key = (row) => { const n = parseFloat(value(row)); return isNaN(n) ? -Infinity : n; };
        rows.sort((a, b) => sign * (key(a) - key(b)));
      }
      table.tBodies[0].append(...rows);
    });
  });
}
