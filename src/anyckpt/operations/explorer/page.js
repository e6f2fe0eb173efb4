"use strict";
(() => {
  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  };
  const kept = (name, value) => {
    try {
      if (value === undefined) return localStorage.getItem(name);
      localStorage.setItem(name, value);
    } catch { /* a page without storage forgets */ }
    return null;
  };

  // -- light and dark ------------------------------------------------------------------------------------------
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const stored = kept("anyckpt-theme");
  if (stored === "dark" || stored === "light") document.documentElement.dataset.theme = stored;
  const theme = make("button", {type: "button"});
  const themed = () => {
    theme.textContent = isDark() ? "Light" : "Dark";
    theme.setAttribute("aria-label", `Use ${isDark() ? "light" : "dark"} colours`);
    paint();
  };
  theme.addEventListener("click", () => {
    const chosen = isDark() ? "light" : "dark";
    document.documentElement.dataset.theme = chosen;
    kept("anyckpt-theme", chosen);
    themed();
  });
  system.addEventListener("change", themed);
  document.querySelector("nav ul").append(make("li", {}, theme));

  // -- tables that are searched and sorted ---------------------------------------------------------------------
  const STEP = 100;
  const FEW = 12;
  const searches = new Map();

  // whether the parts of a word, between stars, are in a text one after another
  const has = (text, parts) => {
    let from = 0;
    for (const part of parts) {
      const at = text.indexOf(part, from);
      if (at < 0) return false;
      from = at + part.length;
    }
    return true;
  };

  const explore = table => {
    const what = table.dataset.explore;
    const heads = [...table.tHead.rows[0].cells];
    const numeric = heads.map(head => head.classList.contains("number"));
    const body = table.tBodies[0];
    const original = [...body.rows];
    const texts = new Map();
    for (const row of original) {
      texts.set(row, [...row.cells].map(cell => cell.textContent).join(" ").toLowerCase());
      [...row.cells].forEach((cell, i) => { if (i) cell.dataset.label = heads[i].textContent; });
    }
    let ordered = original, column = -1, down = false, most = STEP;
    const search = make("input", {type: "search", placeholder: "words, or * for anything", autocomplete: "off", spellcheck: "false"});
    const order = make("select");
    order.append(new Option("as listed", "-1"));
    heads.forEach((head, i) => order.append(new Option(head.textContent, String(i))));
    const direction = make("button", {type: "button"});
    const count = make("span", {role: "status"});
    const tools = make("div", {class: "tools", role: "search", "aria-label": what},
      make("label", {}, `Search ${what}`, search), make("label", {}, "Sort by", order), direction, count);
    tools.hidden = original.length <= FEW;
    table.before(tools);
    const scroll = make("div", {class: "scroll"});
    table.before(scroll);
    scroll.append(table);
    const more = make("button", {type: "button"});
    scroll.after(more);

    const key = (row, i) => {
      const cell = row.cells[i];
      if (!numeric[i]) return cell.textContent;
      const value = Number(cell.dataset.key ?? cell.textContent.replaceAll(",", ""));
      return cell.textContent === "" || Number.isNaN(value) ? null : value;
    };
    const compare = (a, b) => {
      if (a === null || b === null) return a === b ? 0 : a === null ? 1 : -1;
      const sign = down ? -1 : 1;
      return sign * (typeof a === "number" ? a - b : a.localeCompare(b, "en", {numeric: true}));
    };
    const sorted = () => {
      heads.forEach((head, i) => head.setAttribute("aria-sort", i !== column ? "none" : down ? "descending" : "ascending"));
      order.value = String(column);
      direction.textContent = down ? "Largest first" : "Smallest first";
      direction.hidden = column < 0;
      ordered = column < 0 ? original
        : original.map(row => [key(row, column), row]).sort(([a], [b]) => compare(a, b)).map(([, row]) => row);
      shown();
    };
    const shown = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean).map(word => word.split("*"));
      const found = ordered.filter(row => words.every(parts => has(texts.get(row), parts)));
      body.replaceChildren(...found.slice(0, most));
      count.textContent = `${found.length.toLocaleString("en")} of ${original.length.toLocaleString("en")} ${what}`;
      more.hidden = found.length <= most;
      more.textContent = `Show ${Math.min(found.length - most, 10 * STEP).toLocaleString("en")} more`;
    };
    heads.forEach((head, i) => {
      const button = make("button", {type: "button"}, head.textContent);
      button.addEventListener("click", () => {
        if (column === i) down = !down;
        else [column, down] = [i, numeric[i]];
        sorted();
      });
      head.replaceChildren(button);
    });
    order.addEventListener("change", () => { column = Number(order.value); down = numeric[column] ?? false; sorted(); });
    direction.addEventListener("click", () => { down = !down; sorted(); });
    search.addEventListener("input", () => { most = STEP; shown(); });
    search.addEventListener("keydown", event => { if (event.key === "Escape") { search.value = ""; shown(); } });
    more.addEventListener("click", () => { most += 10 * STEP; shown(); });
    searches.set(table, search);
    sorted();
  };
  document.querySelectorAll("table[data-explore]").forEach(explore);

  const find = text => {
    const table = document.querySelector("#tensors table");
    const search = table && searches.get(table);
    if (!search) return;
    search.value = text;
    search.dispatchEvent(new Event("input"));
    search.scrollIntoView({block: "center"});
    search.focus({preventScroll: true});
  };
  document.addEventListener("click", event => {
    const box = event.target.closest("[data-find]");
    if (box) find(box.dataset.find);
  });
  document.addEventListener("keydown", event => {
    const typing = event.target.closest("input, select, textarea");
    if (event.key !== "/" || typing || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    find("");
  });

  // -- one of several, such as bytes or parameters -------------------------------------------------------------
  document.querySelectorAll("[data-either]").forEach(group => {
    const choices = group.querySelectorAll("input[type=radio]");
    const update = () => choices.forEach(choice => {
      document.getElementById(choice.value).hidden = !choice.checked;
    });
    choices.forEach(choice => choice.addEventListener("change", update));
    group.hidden = false;
    update();
  });

  // -- pictures ------------------------------------------------------------------------------------------------
  const roots = [];
  const narrow = matchMedia("(max-width: 46rem)");
  narrow.addEventListener("change", () => paint());
  function paint() {
    const style = getComputedStyle(document.documentElement);
    const colour = name => style.getPropertyValue(name).trim();
    const [text, line] = [colour("--text"), colour("--line")];
    for (const root of roots) for (const model of root.references()) {
      const set = {};
      for (const property of Object.keys(model.attributes)) {
        if (/(label|title|major_label|axis_label)_text_color$/.test(property)) set[property] = text;
        else if (/^(axis|major_tick|minor_tick|grid|outline|bar)_line_color$/.test(property)) set[property] = line;
        else if (/^(background|border)_fill_color$/.test(property)) set[property] = null;
      }
      if ("major_label_text_font_size" in model.attributes) set.major_label_text_font_size = narrow.matches ? "8px" : "11px";
      if (Object.keys(set).length) model.setv(set);
    }
  }

  const drawn = (root, ident) => {
    const figure = document.getElementById(ident).closest("figure");
    const chosen = [...figure.querySelectorAll("select")];
    const legend = [...figure.querySelectorAll(".legend button")];
    const update = () => {
      const off = new Set(legend.filter(one => one.getAttribute("aria-pressed") === "false").map(one => one.value));
      const values = chosen.map(select => select.value);
      for (const model of root.references()) {
        if (!model.tags?.length || !("glyph" in model.attributes)) continue;
        const [series, ...choices] = model.tags;
        model.visible = !off.has(series) && choices.every((choice, i) => choice === values[i]);
      }
      for (const one of legend) {
        const stacks = one.dataset.with;
        one.hidden = stacks !== undefined && !values.includes(stacks);
      }
    };
    chosen.forEach(select => select.addEventListener("change", update));
    legend.forEach(one => one.addEventListener("click", () => {
      one.setAttribute("aria-pressed", String(one.getAttribute("aria-pressed") !== "true"));
      update();
    }));
    update();
  };

  const draw = async () => {
    const items = JSON.parse(document.getElementById("drawings").textContent);
    if (items.length) Bokeh.logger.set_level("warn");
    for (const item of items) {
      const views = await Bokeh.embed.embed_item(item);
      const root = [...views][0].model;
      roots.push(root);
      drawn(root, item.target_id);
    }
    themed();
    document.documentElement.dataset.drawn = String(items.length);
  };
  themed();
  draw();
})();
