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

  // --- what is chosen: selectors of a section, its charts and tables -------------------------------
  const chosen = (section) =>
    Object.fromEntries($$("select[data-key]", section).map((select) => [select.dataset.key, select.value]));
  const fits = (row, choice) =>
    Object.entries(choice).every(([key, value]) => value === ALL || !(key in row) || row[key] === value);
  function filter(section) {
    const choice = chosen(section);
    for (const row of $$("tr[data-chosen]", section)) row.hidden = !fits(JSON.parse(row.dataset.chosen), choice);
  }

  // --- tables that sort: by the value of a cell, else by its text; numbers first largest -----------
  for (const head of $$("th")) {
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

  // --- charts ---------------------------------------------------------------------------------------
  const style = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const faded = (hex, alpha) =>
    `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(",")},${alpha})`;
  const scales = {  // as matplotlib's RdBu_r, its middle the ground of the page
    light: [[0, "#2166ac"], [0.25, "#92c5de"], [0.5, "#f7f7f7"], [0.75, "#f4a582"], [1, "#b2182b"]],
    dark: [[0, "#7fb8ee"], [0.25, "#3b6c9c"], [0.5, "#26262f"], [0.75, "#a8513d"], [1, "#ff9d80"]],
  };
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
      return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, painted(inner)]));
    return value;
  }
  const touch = matchMedia("(pointer: coarse)").matches;
  function draw(chart) {
    const { traces, layout } = data.charts[chart.id];
    const choice = chosen(chart.closest("section"));
    const shown = traces.filter(({ show }) => Object.entries(show).every(([k, v]) => !(k in choice) || v.includes(choice[k])));
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
    const drawn = painted(shown).map(({ show, ...trace }) => heat(trace)
      ? { ...trace, colorbar: { ...trace.colorbar, tickfont: { size: 10, color: soft }, title: { ...trace.colorbar.title, font: { size: 11, color: soft } } } }
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
      if (!event.target.matches("select")) return;
      filter(section);
      if (window.Plotly) for (const chart of $$(".chart", section)) draw(chart);
    });
    for (const form of $$("form", section)) form.addEventListener("submit", (event) => event.preventDefault());
  }

  // --- where one is on the page ----------------------------------------------------------------------
  const links = new Map($$("nav a").map((link) => [link.hash.slice(1), link]));
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((entry) => entry.isIntersecting)) {
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-20% 0px -70%" });
  for (const section of $$("section[id]")) seen.observe(section);

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
    addEventListener("resize", () => { if (innerWidth !== width && !printing) { width = innerWidth; drawAll(); } });
  } catch (error) {
    document.getElementById("failed").hidden = false;
    console.error(error);
  }
  root.dataset.ready = "true";
})();
