"use strict";
(() => {
  const report = JSON.parse(document.getElementById("report-data").textContent);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const byId = (id) => document.getElementById(id);
  all(".live").forEach((part) => (part.hidden = false));

  // Filters. An element without a value for a filter, such as a panel over all tasks, is never hidden by it.
  const form = byId("filters");
  const filtered = all("main [data-selector]");
  const oracles = byId("oracles");
  const chosen = (key) => (form.elements[key] ? form.elements[key].value : "");
  function filter() {
    let rows = 0;
    for (const part of filtered) {
      const excluded = ["task", "selector", "k", "calibrated"].some((key) => {
        const wanted = chosen(key), own = part.dataset[key];
        return wanted !== "" && own !== undefined && own !== "" && own !== wanted;
      });
      const oracle = part.classList.contains("oracle") && !oracles.checked;
      part.hidden = excluded || oracle;
      if (part.tagName === "TR" && !part.hidden) rows += 1;
    }
    byId("rows").textContent = `${rows} rows`;
    const arm = chosen("arm");
    document.body.classList.toggle("emphasis", arm !== "");
    if (arm !== "") all(".mark[data-arm], tr[data-arm]").forEach((mark) => mark.classList.toggle("on", mark.dataset.arm === arm));
    else all("tr.on").forEach((row) => row.classList.remove("on"));
  }
  form.addEventListener("change", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  oracles.addEventListener("change", filter);
  document.addEventListener("click", (event) => {
    const mark = event.target.closest(".mark[data-arm]");
    const select = form.elements.arm;
    if (!mark || !select || ![...select.options].some((option) => option.value === mark.dataset.arm)) return;
    select.value = select.value === mark.dataset.arm ? "" : mark.dataset.arm;
    filter();
  });

  // Sorting: numbers by data-sort, texts alphabetically. Cells without a number are last in both directions.
  const table = byId("arms");
  all("th", table).forEach((head, column) => {
    head.addEventListener("click", () => {
      // The first click on a column of numbers sorts in descending order, on a column of text in ascending order.
      const descending = head.getAttribute("aria-sort") === "ascending" || (!head.hasAttribute("aria-sort") && !head.classList.contains("text"));
      all("th", table).forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const body = table.tBodies[0];
      const keyed = [...body.rows].map((row) => {
        const cell = row.cells[column];
        if (head.classList.contains("text")) return [cell.textContent, row];
        return [cell.dataset.sort === undefined ? null : Number(cell.dataset.sort), row];
      });
      keyed.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null);
        const order = typeof a === "string" ? a.localeCompare(b) : a - b;
        return descending ? -order : order;
      });
      body.append(...keyed.map(([, row]) => row));
    });
  });

  // Demonstrations. Everything from data is inserted as text, never as markup.
  const shades = ["label0", "label1", "label2", "label3", "label4", "label5", "label6"];
  const element = (tag, text, kind) => {
    const node = document.createElement(tag);
    if (text !== undefined && text !== null) node.textContent = text;
    if (kind) node.className = kind;
    return node;
  };
  const fill = (select, texts) => {
    select.replaceChildren(...texts.map((text, value) => Object.assign(element("option", text), { value })));
  };
  const row = (cells, tag = "td") => {
    const line = element("tr");
    line.append(...cells.map((cell) => {
      if (cell instanceof Node) { const holder = element(tag, null, "text"); holder.append(cell); return holder; }
      return element(tag, cell, typeof cell === "number" ? "" : "text");
    }));
    return line;
  };
  const views = report.demonstrations;
  const [cellPick, setPick, itemPick] = ["view-cell", "view-set", "view-item"].map(byId);
  const cells = new Map(report.cells.map((cell) => [cell.id, cell]));

  function drawOrder(order, demos, labels) {
    if (!order) return element("span", "depends on the query", "muted");
    const line = element("span");
    for (const place of order) {
      const chip = element("span", place + 1, "place");
      const label = demos[place] && demos[place].label;
      const index = labels.indexOf(label);
      if (index >= 0) chip.style.borderBottomColor = `var(--${shades[index] || "rest"})`;
      chip.title = demos[place] ? [demos[place].id, label].filter(Boolean).join(": ") : "";
      line.append(chip);
    }
    return line;
  }
  function demosOf(set, item) {
    if (!set.demo_ids_of_item) return set.demos;
    return set.demo_ids_of_item[item].map((id) => ({ id, label: null, tokens: null }));
  }
  // The prompt in blocks: the demonstrations in order, then the test item. Results of older versions have no texts.
  let blocks = null;
  function drawPrompt(name, order, demos, cell, view, set, item) {
    const texts = report.texts[cell.task];
    const words = order && order.map((place) => demos[place] && texts.demos[demos[place].id]);
    const question = texts.items[view.items[item]];
    const known = Boolean(words) && question !== undefined && words.every((text) => text !== undefined);
    if (known !== blocks) byId("view-whole").open = !known;
    blocks = known;
    // The text before the first demonstration, such as instructions; empty if the prompt does not contain the demonstration verbatim.
    const first = known && set.random_orders[0] && demosOf(set, 0)[set.random_orders[0][0]];
    const place = first ? set.prompt.indexOf(texts.demos[first.id]) : -1;
    const lead = place > 0 ? set.prompt.slice(0, place).trim() : "";
    byId("view-shown").textContent = known ? `Prompt: ${name}, ${view.items[item]}` : "Prompt";
    byId("view-blocks").replaceChildren(...(known ? [...(lead ? [[lead, null]] : []), ...words.map((text, place) => [text, demos[order[place]]]), [question, null]] : []).map(([text, demo]) => {
      const block = element("pre", text, demo ? "block" : "block query");
      const index = demo ? cell.labels.indexOf(demo.label) : -1;
      if (index >= 0) block.style.borderLeftColor = `var(--${shades[index] || "rest"})`;
      if (demo) block.title = demo.id;
      return block;
    }));
  }
  // The order whose prompt is displayed.
  let selected = null;
  function draw() {
    const view = views[cellPick.value], cell = cells.get(view.cell);
    const set = view.sets[setPick.value], item = Number(itemPick.value) || 0;
    const demos = demosOf(set, item);
    byId("view-demos").replaceChildren(
      row(["", "id", "label", "tokens"], "th"),
      ...demos.map((demo, place) => row([drawOrder([place], demos, cell.labels), demo.id, demo.label ?? "–", demo.tokens ?? "–"])));
    byId("view-prompt").textContent = set.prompt;
    const kinds = new Map(cell.arms.map((arm) => [arm.name, arm]));
    const named = Object.entries(set.orders).map(([name, order]) =>
      [name, order || (set.order_of_item && set.order_of_item[name] ? set.order_of_item[name][item] : null)]);
    const random = set.random_orders.map((order, number) => [`random order ${number + 1}`, order]);
    const every = new Map([...random, ...named]);
    if (!every.has(selected)) selected = random[0][0];
    const orderRow = ([name, order]) => {
      const line = row([name, drawOrder(order, demos, cell.labels)]);
      const button = element("button", name, "pick");
      button.type = "button";
      button.disabled = !order;
      button.setAttribute("aria-pressed", String(name === selected));
      button.addEventListener("click", () => {
        selected = name;
        draw();
        all("#view-orders .pick, #view-random .pick").find((other) => other.textContent === name).focus();
      });
      line.cells[0].replaceChildren(button);
      if (kinds.get(name) && kinds.get(name).kind === "oracle") line.className = "oracle";
      return line;
    };
    byId("view-orders").replaceChildren(row(["orderer", "first to last"], "th"), ...named.map(orderRow));
    byId("view-random").replaceChildren(...random.map(orderRow));
    drawPrompt(selected, every.get(selected), demos, cell, view, set, item);
  }
  function pickCell() {
    const view = views[cellPick.value];
    fill(setPick, view.sets.map((set, number) => `${number + 1} (seed ${set.seed})`));
    fill(itemPick, view.items.map((id, number) => `${id}: ${view.gold[number]}`));
    draw();
  }
  if (views.length) {
    fill(cellPick, views.map((view) => view.cell));
    cellPick.addEventListener("change", pickCell);
    [setPick, itemPick].forEach((pick) => pick.addEventListener("change", draw));
    pickCell();
  }

  // Downloads
  const files = { "report.json": report, "demonstrations.json": { demonstrations: report.demonstrations, texts: report.texts } };
  all("button[data-download]").forEach((button) => button.addEventListener("click", () => {
    const name = button.dataset.download;
    const link = element("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(files[name], null, 1)], { type: "application/json" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }));
  filter();
})();
