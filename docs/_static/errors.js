// A field on the page of errors: paste a message, and only the rows that it matches remain.
document.addEventListener("DOMContentLoaded", () => {
  const title = document.querySelector("section#errors > h1");
  if (!title) return;

  const rows = [...document.querySelectorAll("section#errors tbody tr")].map((row) => {
    const text = row.cells[0].textContent;
    const pattern = text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&").replace(/…/g, ".*");
    return { row, text: row.textContent.toLowerCase(), pattern: new RegExp(pattern, "s") };
  });
  const sections = [...document.querySelectorAll("section#errors > section")];

  const field = document.createElement("input");
  field.type = "search";
  field.className = "error-search";
  field.placeholder = "Paste a message, or type a part of it";
  field.setAttribute("aria-label", field.placeholder);
  title.after(field);

  const filter = () => {
    const given = field.value.trim();
    for (const { row, text, pattern } of rows) {
      row.hidden = given !== "" && !pattern.test(given) && !text.includes(given.toLowerCase());
    }
    for (const section of sections) {
      section.hidden = given !== "" && !section.querySelector("tbody tr:not([hidden])");
    }
  };
  field.addEventListener("input", filter);
  field.value = new URLSearchParams(location.search).get("message") || "";
  filter();
});
