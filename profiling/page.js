// Draws the page's plots in its own colors, again when those change, and as wide as paper while it is printed.
(() => {
  "use strict";
  const PAPER = 680; // pixels of a page of A4 or letter between its margins
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const root = document.documentElement;
  const touch = matchMedia("(pointer: coarse)").matches;
  // Plotly would offer to upload the data to its makers' cloud.
  const config = {
    responsive: true,
    displaylogo: false,
    showSendToCloud: false,
    plotlyServerURL: "",
    modeBarButtonsToRemove: ["sendChartToCloud", "select2d", "lasso2d", "autoScale2d"],
  };

  const colored = (value, style) => {
    if (typeof value === "string") {
      return value.startsWith("var(--") ? style.getPropertyValue(value.slice(4, -1)).trim() : value;
    }
    if (Array.isArray(value)) return value.map((one) => colored(one, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, colored(one, style)]));
  };

  const common = {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: "var(--fg)", family: "system-ui, sans-serif", size: 12 },
    hoverlabel: { bgcolor: "var(--card)", bordercolor: "var(--muted)", font: { color: "var(--fg)", size: 12 }, align: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: "var(--muted)", activecolor: "var(--fg)" },
    hovermode: "closest",
    showlegend: false,
    uirevision: "kept", // zoom survives new colors
    dragmode: touch ? false : "zoom", // a finger scrolls the page
  };

  // Plotly makes every bar a whole pixel wide at least, so that rows of short spans would all look busy. Spans are
  // therefore drawn as areas, whose edges blend; the bars are there to be pointed at, and are not seen.
  const areas = (bars) => {
    const x = [], y = [];
    bars.base.forEach((start, i) => {
      const end = start + bars.x[i], low = bars.y[i] - bars.width / 2, high = bars.y[i] + bars.width / 2;
      x.push(start, end, end, start, start, null);
      y.push(low, low, high, high, low, null);
    });
    const line = { width: 0, simplify: false };
    const area = { type: "scatter", mode: "lines", fill: "toself", fillcolor: bars.marker.color, hoverinfo: "skip" };
    return { ...area, x, y, line, visible: bars.visible };
  };
  const drawn = (data) => {
    const spans = data.filter((trace) => trace.meta === "spans");
    const pointed = data.map((t) => (t.meta === "spans" ? { ...t, marker: { color: "rgba(0,0,0,0)" } } : t));
    return [...pointed, ...spans.map(areas)];
  };

  const draw = (id, width) => {
    const { data, layout } = figures[id];
    const style = getComputedStyle(root);
    const size = width ? { width, autosize: false } : { autosize: true };
    // Too small for buttons, or with nothing to zoom; else they have a margin of their own.
    const bare = document.getElementById(id).clientHeight < 200 || (layout.xaxis?.fixedrange && layout.yaxis?.fixedrange);
    const options = bare ? { ...config, displayModeBar: false } : config;
    const margin = { ...layout.margin, t: Math.max(layout.margin?.t ?? 0, bare ? 0 : 30) };
    Plotly.react(id, colored(drawn(data), style), colored({ ...common, ...layout, ...size, margin }, style), options);
  };
  const drawAll = (width) => Object.keys(figures).forEach((id) => draw(id, width));

  // The library lies in the page compressed; an element of our own runs it, since the page's policy allows no eval.
  const unpacked = async () => {
    const packed = atob(document.getElementById("library").textContent);
    const bytes = Uint8Array.from(packed, (character) => character.charCodeAt(0));
    const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(plain).text();
    document.head.append(script);
  };
  const listen = () => {
    for (const button of document.querySelectorAll(".legend button")) {
      button.addEventListener("click", () => {
        const shown = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", String(shown));
        const { data } = figures[button.dataset.plot];
        const group = (trace, i) => trace.legendgroup ?? i; // as a line and its band
        const own = group(data[button.dataset.trace], Number(button.dataset.trace));
        data.filter((trace, i) => group(trace, i) === own).forEach((trace) => { trace.visible = shown; });
        draw(button.dataset.plot);
      });
    }
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll());
    addEventListener("beforeprint", () => {
      root.classList.add("print");
      drawAll(PAPER);
    });
    addEventListener("afterprint", () => {
      root.classList.remove("print");
      drawAll();
    });
  };
  const trouble = (error) => {
    const place = document.getElementById("trouble");
    place.textContent = `The plots cannot be drawn (${error}): a browser of 2023 or later can.`;
    place.hidden = false;
  };

  // One plot a task: the first are there, and the page scrolls, while the others are drawn.
  const drawInTurn = async () => {
    for (const id of Object.keys(figures)) {
      draw(id);
      await new Promise((done) => setTimeout(done));
    }
  };

  unpacked().then(drawInTurn).then(() => {
    listen();
    root.dataset.drawn = Math.round(performance.now()); // in ms since the page was opened
  }).catch(trouble);
})();
