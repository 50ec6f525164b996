"use strict";
(() => {
  // Sorting: every sortable heading becomes a button; rows without numbers stay last.
  const key = (row, column, numeric) => {
    const cell = row.cells[column];
    const value = cell && cell.dataset.value;
    if (value === undefined || value === "") return null;
    return numeric ? Number(value) : value;
  };
  const sort = (heading, column) => {
    const body = heading.closest("table").tBodies[0];
    const numeric = heading.dataset.sort === "number";
    const descending = heading.getAttribute("aria-sort") === "ascending";
    for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const rows = [...body.rows].map((row) => ({ row, value: key(row, column, numeric) }));
    rows.sort((a, b) => {
      if (a.value === null || b.value === null) return (a.value === null) - (b.value === null);
      const order = numeric ? a.value - b.value : a.value.localeCompare(b.value, "en", { numeric: true });
      return descending ? -order : order;
    });
    body.append(...rows.map((item) => item.row));
  };
  for (const heading of document.querySelectorAll("th[data-sort]")) {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "Sort";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => sort(heading, heading.cellIndex));
  }

  // Filters: hidden without scripts, so the page is whole either way.
  const form = document.querySelector(".filters");
  if (!form) return;
  form.hidden = false;
  const prompts = [...document.querySelectorAll(".prompt")];
  const normal = (text) => text.normalize("NFKC").toLowerCase();
  for (const prompt of prompts) {
    prompt.words = normal(prompt.querySelector("blockquote").textContent);
    prompt.cards = [...prompt.querySelectorAll(".card")];
    for (const card of prompt.cards) card.words = normal(card.querySelector(".text").textContent);
  }
  // Worst first: prompts by the mean distance of the texts shown, and in each the farthest text after the baseline's.
  const distance = (card) => Number(card.dataset.distance);
  const mean = (prompt) => {
    const cards = prompt.cards.filter((card) => !card.hidden && !card.classList.contains("baseline"));
    return cards.reduce((sum, card) => sum + distance(card), 0) / (cards.length || 1);
  };
  const place = (parent, items) => {
    const moved = items.some((item, index) => parent.children[index] !== item);
    if (moved) parent.append(...items);
    return moved;
  };
  const arrange = () => {
    const worst = form.elements.order.value === "worst";
    const ordered = worst ? [...prompts].sort((a, b) => mean(b) - mean(a)) : prompts;
    if (prompts.length === 0) return;
    const moved = place(prompts[0].parentElement, ordered);
    if (moved && worst) ordered[0].open = true;
    const first = (card) => Number(card.classList.contains("baseline"));
    for (const prompt of prompts) {
      const cards = [...prompt.cards];
      if (worst) cards.sort((a, b) => first(b) - first(a) || distance(b) - distance(a));
      if (place(prompt.querySelector(".cards"), cards) || moved) scrollToMarks(prompt);
    }
  };
  const apply = () => {
    const wanted = new Set([...form.querySelectorAll("[name=variant]:checked")].map((box) => box.value));
    const rank = form.elements.prompt.value;
    const search = normal(form.elements.search.value.trim());
    let shown = 0;
    for (const prompt of prompts) {
      let cards = 0;
      const inPrompt = prompt.words.includes(search);
      for (const card of prompt.cards) {
        card.hidden = !wanted.has(card.dataset.variant) || !(inPrompt || card.words.includes(search));
        cards += !card.hidden;
      }
      prompt.hidden = (rank !== "" && prompt.dataset.rank !== rank) || cards === 0;
      if (!prompt.hidden && (rank !== "" || search !== "")) prompt.open = true;
      shown += !prompt.hidden;
    }
    arrange();
    form.querySelector("output").textContent = `${shown} of ${prompts.length} prompts shown`;
  };
  // A long text scrolls to where it parts from the baseline.
  const scrollToMarks = (prompt) => {
    if (!prompt.open) return;
    for (const mark of prompt.querySelectorAll(".card .mark")) {
      const text = mark.closest(".text");
      text.scrollTop = Math.max(0, mark.offsetTop - text.clientHeight / 3);
    }
  };
  for (const prompt of prompts) {
    prompt.addEventListener("toggle", () => scrollToMarks(prompt));
    scrollToMarks(prompt);
  }
  const openAll = (open) => prompts.forEach((prompt) => { prompt.open = open; });
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.elements.open.addEventListener("click", () => openAll(true));
  form.elements.close.addEventListener("click", () => openAll(false));
  apply();
})();
