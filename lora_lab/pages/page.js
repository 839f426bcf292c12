"use strict";
(() => {
  const FIRST = 40; // rows of a table that are shown before a button is pressed
  const make = (tag, name, text) => Object.assign(document.createElement(tag), { className: name, textContent: text || "" });
  const press = (text, act) => {
    const button = make("button", "plain", text);
    button.type = "button";
    button.addEventListener("click", () => act(button));
    return button;
  };

  // light or dark, beyond what the system asks for
  const root = document.documentElement;
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const theme = press(dark() ? "Light" : "Dark", (button) => {
    root.dataset.theme = dark() ? "light" : "dark";
    button.textContent = dark() ? "Light" : "Dark";
  });
  theme.classList.add("theme");
  document.body.append(theme);

  // tables: sorted by a heading, filtered by a text, the rest at a press
  const compare = new Intl.Collator("en", { numeric: true }).compare;
  for (const table of document.querySelectorAll("table.data")) {
    const body = table.tBodies[0];
    const all = [...body.rows];
    let rows = all, whole = all.length <= FIRST + 10, wanted = "";
    const tools = make("div", "tools");
    const count = make("span", "", "");
    const rest = make("p", "cut", "");
    const said = make("span", "", "");
    const more = press("", () => { whole = true; show(); });
    rest.append(said, " ", more);
    const show = () => {
      const left = rows.filter((row) => !wanted || row.textContent.toLowerCase().includes(wanted));
      const kept = new Set(whole || wanted ? left : left.slice(0, FIRST));
      for (const row of all) row.hidden = !kept.has(row);
      count.textContent = wanted ? `${left.length} of ${all.length} rows` : "";
      rest.hidden = kept.size === left.length;
      said.textContent = `${kept.size} of ${left.length} rows.`;
      more.textContent = `Show all ${left.length}`;
    };
    if (all.length > 5) {
      const filter = make("input", "");
      filter.type = "search";
      filter.placeholder = "Filter rows";
      filter.setAttribute("aria-label", "Filter rows");
      filter.addEventListener("input", () => { wanted = filter.value.trim().toLowerCase(); show(); });
      tools.append(filter, count);
      table.parentNode.before(tools);
      table.parentNode.after(rest);
    }
    [...table.tHead.rows[0].cells].forEach((heading, place) => {
      const button = make("span", "", heading.textContent); // Chromium paints no <button> in headings that pages repeat
      button.setAttribute("role", "button");
      button.tabIndex = 0;
      heading.textContent = "";
      heading.append(button);
      button.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        button.click();
      });
      button.addEventListener("click", () => {
        const down = heading.getAttribute("aria-sort") === "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        heading.setAttribute("aria-sort", down ? "descending" : "ascending");
        const value = (row) => row.cells[place].dataset.value;
        rows = [...all].sort((one, two) => {
          const [a, b] = [value(one), value(two)];
          if (a !== undefined && b !== undefined) return down ? b - a : a - b;
          if ((a === undefined) !== (b === undefined)) return a === undefined ? 1 : -1; // what is no number comes last
          const order = compare(one.cells[place].textContent, two.cells[place].textContent);
          return down ? -order : order;
        });
        body.append(...rows);
        show();
      });
    });
    show();
  }

  // values of figures, at once and beside the pointer
  const tip = make("div", "tip");
  tip.hidden = true;
  document.body.append(tip);
  for (const title of document.querySelectorAll(".values title")) {
    title.parentNode.dataset.tip = title.textContent;
    title.remove();
  }
  document.addEventListener("pointermove", (event) => {
    const text = event.target.dataset && event.target.dataset.tip;
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
    tip.style.top = `${event.clientY + 16 + height > innerHeight ? event.clientY - height - 10 : event.clientY + 16}px`;
  });

  for (const block of document.querySelectorAll(".command")) {
    block.append(press("Copy", async (button) => {
      const code = block.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
      } catch {
        getSelection().selectAllChildren(code);
        document.execCommand("copy");
      }
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    }));
  }

  // on paper, what was asked and where it comes from is open
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.about:not([open])")];
    for (const part of opened) part.open = true;
  });
  addEventListener("afterprint", () => { for (const part of opened) part.open = false; });
})();
