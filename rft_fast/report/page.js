"use strict";
(async () => {
  const root = document.documentElement;
  const $$ = (selector, from = document) => [...from.querySelectorAll(selector)];
  const ALL = "*";
  let data;  // of the charts

  // --- theme: the system's, until the button is used -----------------------------------------------
  const system = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  let printing = false;
  const remembered = (() => { try { return localStorage.getItem("rft_fast.theme"); } catch { return null; } })();
  if (remembered === "light" || remembered === "dark") root.dataset.theme = remembered;
  const theme = () => printing ? "light" : root.dataset.theme || (system.matches ? "dark" : "light");
  button.addEventListener("click", () => {
    root.dataset.theme = theme() === "dark" ? "light" : "dark";
    try { localStorage.setItem("rft_fast.theme", root.dataset.theme); } catch { /* private windows */ }
    drawAll();
  });
  system.addEventListener("change", () => drawAll());

  // --- what is chosen: selectors and the search of a section, its charts and tables ----------------
  const chosen = (section) =>
    Object.fromEntries($$("select[data-key]", section).map((select) => [select.dataset.key, select.value]));
  const sought = (section) => (section.querySelector("input[type=search]")?.value ?? "").trim().toLowerCase();
  const fits = (row, choice) =>
    Object.entries(choice).every(([key, value]) => value === ALL || !(key in row) || row[key] === value);
  const plural = (count, what) => `${count.toLocaleString("en")} ${what}${count === 1 ? "" : "s"}`;
  function filter(section) {
    const choice = chosen(section), query = sought(section);
    for (const table of $$("table", section)) {
      const rows = [...table.tBodies[0].rows];
      for (const row of rows)
        row.hidden = !fits(JSON.parse(row.dataset.chosen ?? "{}"), choice)
          || !(row.querySelector("code")?.textContent ?? "").toLowerCase().includes(query);
      const shown = rows.filter((row) => !row.hidden).length;
      table.closest(".table").querySelector(".count").textContent =
        shown < rows.length ? `${shown.toLocaleString("en")} of ${plural(rows.length, "row")}` : plural(shown, "row");
    }
    const found = section.querySelector(".found");
    if (found) {
      const layers = new Set($$("tbody code", section).map((code) => code.textContent));
      const count = [...layers].filter((name) => name.toLowerCase().includes(query)).length;
      found.textContent = query ? `${count} of ${plural(layers.size, "layer")} match` : "";
    }
    for (const scroll of $$(".scroll", section)) hint(scroll);
  }
  function update(section) {
    filter(section);
    if (window.Plotly) for (const chart of $$(".chart", section)) draw(chart);
  }

  // --- tables that scroll: shades at the sides with more to see --------------------------------------
  function hint(scroll) {
    const table = scroll.parentElement, room = 2;
    table.classList.toggle("more-right", scroll.scrollLeft + scroll.clientWidth < scroll.scrollWidth - room);
    table.classList.toggle("more-below", scroll.scrollTop + scroll.clientHeight < scroll.scrollHeight - room);
  }
  for (const scroll of $$(".scroll")) scroll.addEventListener("scroll", () => hint(scroll), { passive: true });
  for (const details of $$("details"))
    details.addEventListener("toggle", () => { for (const scroll of $$(".scroll", details)) hint(scroll); });

  // --- tables that sort: by the value of a cell, else by its text; numbers first largest -----------
  for (const head of $$("thead th")) {
    head.firstElementChild.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending"
        || (head.getAttribute("aria-sort") === "none" && head.classList.contains("n"));
      for (const other of head.parentElement.children) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = head.closest("table").tBodies[0];
      const of = (row) => row.cells[head.cellIndex];
      const compare = (a, b) => {
        const [x, y] = [of(a).dataset.value, of(b).dataset.value].map(Number);
        if (Number.isNaN(x) || Number.isNaN(y))
          return of(a).textContent.localeCompare(of(b).textContent, undefined, { numeric: true });
        return x - y || 0;
      };
      body.append(...[...body.rows].sort((a, b) => (down ? compare(b, a) : compare(a, b))));
    });
  }

  // --- words: explained where one points, by the tab key, and by a tap ------------------------------
  const tip = document.getElementById("tip");
  let explained, leaving;
  function explain(target) {
    clearTimeout(leaving);
    if (explained === target) return;
    explained?.removeAttribute("aria-describedby");
    explained = target;
    tip.hidden = !target;
    if (!target) return;
    tip.replaceChildren(...target.dataset.words.split(" ").map((id) => {
      const [name, means] = document.getElementById(id).children;
      const text = document.createElement("p"), strong = document.createElement("strong");
      strong.textContent = name.textContent;
      text.append(strong, " ", means.textContent);
      return text;
    }));
    target.setAttribute("aria-describedby", "tip");
    place(target);
  }
  function place(target) {  // below the word, or above where there is no room
    const box = target.getClientRects()[0], own = tip.getBoundingClientRect();
    const below = box.bottom + own.height + 6 < innerHeight;
    tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - own.width - 8))}px`;
    tip.style.top = `${below ? box.bottom + 4 : Math.max(8, box.top - own.height - 4)}px`;
  }
  const later = () => { clearTimeout(leaving); leaving = setTimeout(() => explain(), 150); };
  const word = (event) => event.target.closest?.("[data-words]");
  document.addEventListener("pointerover", (event) => {
    if (tip.contains(event.target)) clearTimeout(leaving);
    else if (word(event)) explain(word(event));
    else if (explained && explained !== document.activeElement) later();
  });
  document.addEventListener("focusin", (event) => explain(word(event)));
  document.addEventListener("focusout", later);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") explain(); });
  addEventListener("scroll", () => {  // the tab key scrolls to a word, which stays explained
    if (explained && explained === document.activeElement) place(explained); else explain();
  }, { passive: true, capture: true });
  for (const link of $$("a.word")) {
    link.addEventListener("click", (event) => { event.preventDefault(); explain(link); });
  }
  for (const section of $$("section")) {  // a word is a link once in each section; later, it is text
    const known = new Set();
    for (const link of $$("a.word", section)) {
      if (known.has(link.hash)) {
        const text = document.createElement("span");
        text.dataset.words = link.dataset.words;
        text.textContent = link.textContent;
        link.replaceWith(text);
      }
      known.add(link.hash);
    }
  }

  // --- files: tables as they are shown, and rows -----------------------------------------------------
  const quoted = (text) => /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  const inert = (text) => /^[\s']*[=+\-@\uff1d\uff0b\uff0d\uff20]|^[\s']*[\t\r\n]/.test(text) ? `'${text}` : text;
  function tabled(table) {  // [a, b] of an interval in columns of their own
    const rows = [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => [...row.cells]);
    const plain = (text) => text.replace(/\u2212/g, "-").replace(/^\+/, "");
    const parts = (cell) => {
      const found = /^(\S+) \[(\S+), (\S+)\]$/.exec(cell.textContent);
      return found ? found.slice(1).map(plain) : null;
    };
    const lines = [[]];
    for (const _ of rows) lines.push([]);
    $$("thead th", table).forEach((head, column) => {
      const name = head.textContent, wide = rows.some((row) => parts(row[column]));
      lines[0].push(...wide ? [name, `${name}: low`, `${name}: high`] : [name]);
      rows.forEach((row, place) => {
        const cell = row[column], number = cell.classList.contains("n");
        const text = number ? plain(cell.textContent) : inert(cell.textContent);
        lines[place + 1].push(...wide ? parts(cell) ?? [text, "", ""] : [text]);
      });
    });
    return `\ufeff${lines.map((line) => line.map(quoted).join(",")).join("\n")}\n`;
  }
  function save(name, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv;charset=utf-8" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }
  let files;  // name -> text, read when first asked for
  document.addEventListener("click", async (event) => {
    const button = event.target.closest?.("button.save");
    if (!button) return;
    if (button.dataset.table)
      return save(`${button.dataset.table}.csv`, tabled(button.closest(".table").querySelector("table")));
    files ??= JSON.parse(await unpacked("rows"));
    const [first, ...others] = JSON.parse(button.dataset.files).map((name) => files[name]);
    save(button.dataset.name, [first, ...others.map((text) => text.slice(text.indexOf("\n") + 1))].join(""));
  });

  // --- what to look at first: a link that chooses ------------------------------------------------------
  for (const link of $$("a[data-choose]")) {
    link.addEventListener("click", () => {
      const section = document.getElementById(link.hash.slice(1));
      for (const [key, value] of Object.entries(JSON.parse(link.dataset.choose))) {
        const select = $$("select[data-key]", section).find((one) => one.dataset.key === key);
        if (select && [...select.options].some((option) => option.value === value)) select.value = value;
      }
      update(section);
    });
  }

  // --- charts ---------------------------------------------------------------------------------------
  const style = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const faded = (hex, alpha) =>
    `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(",")},${alpha})`;
  const scales = {  // as matplotlib's RdBu_r, its middle the ground of the page
    light: [[0, "#2166ac"], [0.25, "#92c5de"], [0.5, "#f7f7f7"], [0.75, "#f4a582"], [1, "#b2182b"]],
    dark: [[0, "#7fb8ee"], [0.25, "#3b6c9c"], [0.5, "#26262f"], [0.75, "#a8513d"], [1, "#ff9d80"]],
  };
  const TEXTS = new Set(["hovertext", "name", "ticktext", "text", "meta"]);  // people's names, which may begin with @
  function painted(value) {  // tokens -> colours of the theme
    if (typeof value === "string" && value.startsWith("@")) {
      if (value === "@diverging") return scales[theme()];
      const [name, alpha] = value.slice(1).split("/");
      const number = /^c(\d+)$/.exec(name);
      const palette = data.palette[theme()];
      const colour = number ? palette[Number(number[1]) % palette.length] : style(name);
      return alpha ? faded(colour, alpha) : colour;
    }
    if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map(painted);
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, TEXTS.has(key) ? inner : painted(inner)]));
    return value;
  }
  function narrowed(shown, layout, query) {  // to the layers that were searched for, a line each
    const { names, row } = layout.meta ?? {};
    if (!names || !query) return [shown, layout];
    const kept = names.flatMap((name, place) => name.toLowerCase().includes(query) ? [place] : []);
    const place = new Map(kept.map((old, now) => [old, now]));
    const pick = (list, from) => Array.isArray(list) ? from.map((at) => list[at]) : list;
    const traces = shown.map((trace) => {
      if (trace.type === "heatmap") return { ...trace, z: pick(trace.z, kept), hovertext: pick(trace.hovertext, kept) };
      if (trace.mode === "lines") return { ...trace, y: [-0.5, kept.length - 0.5] };  // a rule from top to bottom
      const from = trace.y.flatMap((y, at) => place.has(Math.round(y)) ? [at] : []);
      const { color, symbol } = trace.marker, bars = trace.error_x;
      return {
        ...trace, x: pick(trace.x, from), hovertext: pick(trace.hovertext, from),
        y: from.map((at) => place.get(Math.round(trace.y[at])) + trace.y[at] - Math.round(trace.y[at])),
        marker: { ...trace.marker, color: pick(color, from), symbol: pick(symbol, from) },
        ...bars && { error_x: { ...bars, array: pick(bars.array, from), arrayminus: pick(bars.arrayminus, from) } },
      };
    });
    const yaxis = { ...layout.yaxis, tickvals: kept.map((_, now) => now), ticktext: pick(layout.yaxis.ticktext, kept),
      range: [kept.length - 0.5, -0.5] };
    return [traces, { ...layout, yaxis, height: Math.max(layout.height - row * (names.length - kept.length), 190) }];
  }
  const PIECE = /<[^>]*>|&[a-z#0-9]+;|./gsu;  // a tag, or a character
  const isTag = (piece) => piece.length > 2 && piece.startsWith("<");
  function tail(text, most) {  // the end of a long name, where layers differ
    const pieces = text.match(PIECE) ?? [];
    return pieces.length > most ? `…${pieces.slice(1 - most).join("")}` : text;
  }
  function folded(text, most) {  // long lines in several, as plotly cuts off what leaves the chart
    if (text.length <= most) return text;
    let count = 0;
    return text.match(PIECE).map((piece) => {
      if (piece === "<br>") count = 0;
      if (isTag(piece)) return piece;
      count += 1;
      return count > most ? (count = 1, `<br>${piece}`) : piece;
    }).join("");
  }
  const each = (texts, change) => Array.isArray(texts) ? texts.map((one) => each(one, change)) : texts && change(texts);
  const words = (text) =>  // of a text that plotly would show
    new DOMParser().parseFromString(text.replaceAll("<br>", ", "), "text/html").body.textContent;
  function seen(shown, layout) {  // the highest and the lowest value, in words
    const maps = shown.filter(({ type }) => type === "heatmap");  // beside which marks have no value
    const points = (maps.length ? maps : shown).flatMap(({ type, hovertext, x, y, z }) => !Array.isArray(hovertext) ? []
      : type === "heatmap" ? z.flatMap((line, i) => line.map((value, j) => [value, hovertext[i][j]]))
      : (layout.yaxis?.ticktext ? x : y).map((value, at) => [value, hovertext[at]]));
    const known = points.filter(([value, text]) => Number.isFinite(value) && text);
    if (!known.length) return "No value to show for this choice.";
    const [low, high] = [-1, 1].map((way) => known.reduce((a, b) => way * b[0] > way * a[0] ? b : a));
    return low[0] === high[0] ? `${known.length === 1 ? "One value" : "All values are equal"}: ${words(high[1])}.`
      : `Highest: ${words(high[1])}. Lowest: ${words(low[1])}.`;
  }
  const touch = matchMedia("(pointer: coarse)").matches;
  function draw(chart) {
    const section = chart.closest("section"), choice = chosen(section), known = data.charts[chart.id];
    const chosenTraces = known.traces.filter(({ show }) =>
      Object.entries(show).every(([k, v]) => !(k in choice) || v.includes(choice[k])));
    const [shown, layout] = narrowed(chosenTraces, known.layout, sought(section));
    document.getElementById(`${chart.id}-seen`).textContent = seen(shown, layout);
    const [ink, soft, line, paper] = ["ink", "soft", "line", "paper"].map(style);
    const axis = { color: soft, gridcolor: line, zerolinecolor: line, linecolor: line, zeroline: false, ticks: "",
      title: { font: { size: 12 }, standoff: 8 }, tickfont: { size: 11 }, automargin: true };
    const merged = (own) => ({ ...axis, ...own, title: { ...axis.title, ...own.title }, tickfont: { ...axis.tickfont, ...own.tickfont } });
    const full = painted({
      ...layout, height: layout.height * (printing && layout.height > 500 ? 0.8 : 1), autosize: true, width: chart.clientWidth || undefined,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: style("sans"), size: 12, color: ink },
      xaxis: merged(layout.xaxis), yaxis: merged(layout.yaxis),
      hoverlabel: { bgcolor: paper, bordercolor: line, font: { color: ink, size: 12.5 }, align: "left" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: ink, orientation: "h" },
      dragmode: touch ? false : "zoom",
    });
    const heat = (trace) => trace.type === "heatmap" && trace.colorbar;
    const across = chart.clientWidth || 700, most = Math.floor(across / 8);  // of characters
    if (full.meta?.names) full.yaxis.ticktext = each(full.yaxis.ticktext, (text) => tail(text, Math.floor(across * 0.4 / 6.5)));
    const named = painted(shown).map(({ show, ...trace }) => ({ ...trace,
      ...trace.name && { name: tail(trace.name, Math.floor(most * 0.75)) },
      ...trace.hovertext && { hovertext: each(trace.hovertext, (text) => folded(text, Math.floor(most * 0.9))) } }));
    const drawn = named.map((trace) => heat(trace)
      ? { ...trace, colorbar: { ...trace.colorbar, len: Math.min(1, 300 / layout.height), tickfont: { size: 10, color: soft }, title: { ...trace.colorbar.title, font: { size: 11, color: soft } } } }
      : trace);
    return Plotly.react(chart, drawn, full, {
      displaylogo: false, displayModeBar: printing ? false : touch ? true : "hover", scrollZoom: false,
      // Those that only show: plotly has one that sends the data away.
      modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]],
      toImageButtonOptions: { format: "svg", filename: chart.id },
    });
  }
  const drawAll = () => { if (window.Plotly) for (const chart of $$(".chart")) draw(chart); };

  for (const section of $$("section.part")) {
    filter(section);
    section.addEventListener("change", (event) => {
      if (event.target.matches("select")) update(section);
    });
    section.querySelector("input[type=search]")?.addEventListener("input", () => update(section));
    for (const form of $$("form", section)) form.addEventListener("submit", (event) => event.preventDefault());
  }

  // --- where one is on the page ----------------------------------------------------------------------
  const links = new Map($$("nav a").map((link) => [link.hash.slice(1), link]));
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((entry) => entry.isIntersecting)) {
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-20% 0px -70%" });
  for (const section of $$("section[id]")) watch.observe(section);

  // --- on paper: light, and as wide as it is ------------------------------------------------------------
  let before;
  addEventListener("beforeprint", () => {
    printing = true;
    before = root.dataset.theme;
    root.dataset.theme = "light";
    document.body.style.width = "700px";
    drawAll();
  });
  addEventListener("afterprint", () => {
    printing = false;
    if (before) root.dataset.theme = before; else delete root.dataset.theme;
    document.body.style.width = "";
    drawAll();
  });

  // --- the charts and the library, decompressed ---------------------------------------------------------
  async function unpacked(id) {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }
  try {
    data = JSON.parse(await unpacked("data"));
    const script = document.createElement("script");
    script.textContent = await unpacked("library");
    document.head.append(script);
    drawAll();
    let width = innerWidth;
    addEventListener("resize", () => { if (innerWidth !== width && !printing) { width = innerWidth; drawAll(); } $$(".scroll").forEach(hint); });
  } catch (error) {
    document.getElementById("failed").hidden = false;
    console.error(error);
  }
  root.dataset.ready = "true";
})();
