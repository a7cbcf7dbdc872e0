// What a report does in a browser: tables that sort and filter, trials that open, curves and coordinates to read.
// Without it the page has all tables and figures. Texts of studies are only ever set as text, never as markup.
"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const KEY = `ebft-study:${location.pathname}`;
const state = Object.assign(
  { metric: data.metrics?.[0]?.name, hidden: [], words: "", zoom: null, bands: true, tables: {}, open: [] }, restored());
document.documentElement.classList.add("js");

function restored() {
  try { return JSON.parse(sessionStorage.getItem(KEY)) ?? {}; } catch { return {}; }
}
function keep() {
  try { sessionStorage.setItem(KEY, JSON.stringify(state)); } catch { /* a page from a file may have no storage */ }
}
function make(name, attributes = {}, ...children) {
  const isSvg = name.startsWith("svg:");
  const element = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key.startsWith("--")) element.style.setProperty(key, value);
    else if (value !== false && value !== null) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}
const button = (words, onclick, more = {}) => make("button", { type: "button", onclick, ...more }, words);
const matches = (words, wanted) => wanted.toLowerCase().split(/\s+/).every((word) => words.toLowerCase().includes(word));
const shown = (value) => value === null ? "–" : String(Number(value.toPrecision(4))).replace("-", "−");

// --- tables ----------------------------------------------------------------------------------------------------

function numberOf(words) {
  const plain = words.replace(/[\u202f\u00a0]/g, "").replace("−", "-").trim();
  const spans = [...plain.matchAll(/(\d+(?:\.\d+)?) ?(h|min|s)\b/g)];
  if (spans.length) return spans.reduce((sum, [, n, unit]) => sum + n * { h: 3600, min: 60, s: 1 }[unit], 0);
  return Number(plain.match(/^[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?/i)?.[0] ?? NaN);
}

function sortable(table) {
  const name = table.dataset.table, body = table.tBodies[0], headers = [...table.tHead.rows[0].cells];
  const remembered = (state.tables[name] ??= { words: "", status: "", column: null, descending: false });
  const rows = [...body.rows], status = headers.findIndex((header) => header.textContent.trim() === "Status");
  const counted = make("span", { role: "status", class: "count" });

  function filter() {
    close(body);
    let number = 0;
    for (const row of rows) {
      const fits = matches(row.textContent, remembered.words)
        && (!remembered.status || row.cells[status].textContent.trim() === remembered.status);
      row.hidden = !fits;
      number += fits;
    }
    counted.textContent = number === rows.length ? `${rows.length} rows` : `${number} of ${rows.length} rows`;
    keep();
  }
  function sort() {
    close(body);
    const { column, descending } = remembered;
    headers.forEach((header, k) =>
      header.setAttribute("aria-sort", k !== column ? "none" : descending ? "descending" : "ascending"));
    if (column === null || column >= headers.length) return;
    const keyed = rows.map((row) => ({ row, words: row.cells[column].textContent.trim() }))
      .map((each) => ({ ...each, number: numberOf(each.words), missing: each.words === "–" || each.words === "" }));
    const numeric = keyed.every((each) => each.missing || !Number.isNaN(each.number));
    keyed.sort((a, b) => a.missing - b.missing || (descending ? -1 : 1)
      * (numeric ? a.number - b.number : a.words.localeCompare(b.words, undefined, { numeric: true })) || 0);
    body.append(...keyed.map((each) => each.row));
    keep();
  }
  headers.forEach((header, column) => {
    const words = header.textContent.trim();
    header.replaceChildren(button(words, () => {
      remembered.descending = remembered.column === column && !remembered.descending;
      remembered.column = column;
      sort();
    }, { class: "sort" }));
  });
  const search = make("input", { type: "search", placeholder: "words", "aria-label": `Filter the table ${name}`,
    oninput: () => { remembered.words = search.value; filter(); } });
  search.value = remembered.words;
  const controls = make("div", { class: "controls" }, make("label", {}, "Filter ", search));
  if (status >= 0) {
    const values = [...new Set(rows.map((row) => row.cells[status].textContent.trim()))].sort();
    const select = make("select", { "aria-label": `Status of the table ${name}`,
      onchange: () => { remembered.status = select.value; filter(); } },
      make("option", { value: "" }, "all"), ...values.map((value) => make("option", { value }, value)));
    select.value = values.includes(remembered.status) ? remembered.status : (remembered.status = "");
    controls.append(make("label", {}, "Status ", select));
  }
  controls.append(counted);
  table.closest(".scroll").before(controls);
  if (name === "trials") rows.forEach(openable);
  sort();
  filter();
  if (name === "trials") state.open.forEach((trial) => rows.find((row) => row.dataset.trial === trial)?.toggle?.());
}

// --- details of a trial ----------------------------------------------------------------------------------------

function close(body) {
  for (const row of body.querySelectorAll("tr.details")) row.previousElementSibling?.toggle?.();
}

function openable(row) {
  const trial = row.cells[0].textContent.trim(), about = data.trials[trial];
  if (!about) return;
  row.dataset.trial = trial;
  const id = `details-${trial}`;
  const opener = button(trial, () => {
    row.toggle();
    state.open = [...document.querySelectorAll("tr.details")].map((each) => each.previousElementSibling.dataset.trial);
    keep();
  }, { class: "open", "aria-expanded": "false", title: "Settings, events, samples and checkpoints" });
  row.cells[0].replaceChildren(opener);
  row.toggle = () => {
    const isOpen = opener.getAttribute("aria-expanded") === "true";
    opener.setAttribute("aria-expanded", String(!isOpen));
    if (isOpen) { opener.removeAttribute("aria-controls"); row.nextElementSibling.remove(); return; }
    opener.setAttribute("aria-controls", id);
    row.after(make("tr", { class: "details" }, make("td", { colspan: row.cells.length, id }, details(trial, about))));
  };
}

function small(caption, header, lines, numbers = []) {
  const cells = (kind, values) => values.map((value, k) => make(kind, numbers.includes(k) ? { class: "number" } : {}, value));
  return make("table", { class: "small" }, make("caption", {}, caption), make("thead", {}, make("tr", {}, ...cells("th", header))),
    make("tbody", {}, ...lines.map((line) => make("tr", {}, ...cells("td", line)))));
}

function details(trial, about) {
  const found = make("div", { class: "inner" }, make("h4", {}, `${trial}: ${about.configuration}`));
  const places = [["Last checkpoint", about.checkpoint], ["Best checkpoint by the objective", about.best]].filter(([, path]) => path);
  if (places.length) {
    found.append(make("dl", {}, ...places.flatMap(([name, path]) => [make("dt", {}, name), make("dd", {}, make("code", {}, path))])));
  }
  if (about.differs.length) {
    found.append(small(`Settings that differ from those of ${about.reference}`, ["Setting", "This trial", about.reference], about.differs));
  }
  if (about.events.length) found.append(small("Events", ["Time (UTC)", "Event", "Message"], about.events));
  about.samples.forEach((prompt, k) => found.append(sampled(prompt, k + 1)));
  if (!about.samples.length) found.append(make("p", { class: "quiet" }, "The page has no samples of this trial; results/samples may."));
  return found;
}

function sampled(prompt, number) {
  const models = make("div", { class: "models" }, ...prompt.models.map(([name, completions]) =>
    make("div", {}, make("b", {}, name), ...completions.map(([words, reward]) =>
      make("pre", { title: `reward ${reward}` }, words)))));
  return make("section", {}, make("h5", {}, `Prompt ${number}`), make("pre", {}, prompt.context),
    make("p", { class: "quiet" }, "Ground truth"), make("pre", {}, prompt.truth), models);
}

// --- which configurations are shown ------------------------------------------------------------------------------

const redraws = [];
const redraw = () => { keep(); redraws.forEach((draw) => draw()); };
const isShown = (label) => !state.hidden.includes(label) && matches(label, state.words);

function chooser() {
  const list = make("div", { class: "names", role: "group", "aria-label": "Configurations" });
  const search = make("input", { type: "search", placeholder: "words", "aria-label": "Filter configurations",
    oninput: () => { state.words = search.value; redraw(); } });
  search.value = state.words;
  const toggles = data.configurations.map((c) => {
    const toggle = button("", () => {
      state.hidden = state.hidden.includes(c.label) ? state.hidden.filter((each) => each !== c.label) : [...state.hidden, c.label];
      redraw();
    }, { class: "name", "--hue": c.color, onpointerenter: () => point(c.label), onfocus: () => point(c.label), onpointerleave: () => point(null), onblur: () => point(null) });
    toggle.append(swatch(c), c.label);
    list.append(toggle);
    return [c.label, toggle];
  });
  redraws.push(() => toggles.forEach(([label, toggle]) => {
    toggle.setAttribute("aria-pressed", String(!state.hidden.includes(label)));
    toggle.hidden = !matches(label, state.words);
  }));
  const all = (hidden) => () => { state.hidden = hidden ? data.configurations.map((c) => c.label) : []; redraw(); };
  return make("div", { class: "chooser" }, make("div", { class: "controls" }, make("label", {}, "Configurations ", search),
    button("Show all", all(false)), button("Hide all", all(true))), list);
}

function swatch(c) {
  const line = make("svg:line", { x1: 0, x2: 22, y1: 5, y2: 5, "stroke-dasharray": c.dash, class: "curve" });
  return make("svg:svg", { width: 22, height: 10, "aria-hidden": "true" }, line);
}

let pointed = null;
function point(label) {
  if (label === pointed) return;
  pointed = label;
  for (const line of document.querySelectorAll("[data-label]")) {
    line.classList.toggle("pointed", line.dataset.label === label);
    line.classList.toggle("faint", label !== null && line.dataset.label !== label);
  }
}

// --- curves ------------------------------------------------------------------------------------------------------

function ticks(low, high, number) {
  const rough = (high - low) / number || 1, base = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * base).find((each) => each >= rough);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}

function curves(place) {
  const note = make("p", { role: "status", class: "reading" });
  const canvas = make("div", { class: "canvas" });
  const select = make("select", { "aria-label": "Metric", onchange: () => { state.metric = select.value; redraw(); } },
    ...data.metrics.map((each) => make("option", { value: each.name }, each.title)));
  if (!data.metrics.some((each) => each.name === state.metric)) state.metric = data.metrics[0].name;
  select.value = state.metric;
  const bands = make("input", { type: "checkbox", onchange: () => { state.bands = bands.checked; redraw(); } });
  bands.checked = state.bands;
  const zoom = (factor) => () => {
    const [low, high] = span(), middle = (low + high) / 2, half = (high - low) / 2 * factor;
    const [first, last] = extent();
    state.zoom = half * 2 >= last - first ? null : [Math.max(first, middle - half), Math.min(last, middle + half)];
    redraw();
  };
  place.append(make("div", { class: "controls" }, make("label", {}, "Metric ", select), make("label", {}, bands, " lowest to highest seed"),
    button("Zoom in", zoom(0.5)), button("Zoom out", zoom(2)), button("Reset zoom", () => { state.zoom = null; redraw(); })), canvas, note);

  const lines = () => data.configurations.filter((c) => c.curves[state.metric] && isShown(c.label)).flatMap((c) => {
    const curve = c.curves[state.metric];
    const means = curve.x ? [{ c, x: curve.x, y: curve.mean, low: curve.low, high: curve.high, n: curve.n }] : [];
    return [...means, ...(curve.open ?? []).map((each) => ({ c, x: each.x, y: each.y, trial: each.trial }))];
  });
  const extent = () => {
    const steps = data.configurations.flatMap((c) => { const curve = c.curves[state.metric]; return curve ? [...(curve.x ?? []), ...(curve.open ?? []).flatMap((each) => each.x)] : []; });
    return [Math.min(...steps), Math.max(...steps)];
  };
  const span = () => state.zoom ?? extent();
  const words = (line, k) => {
    const range = line.trial ? `trial ${line.trial}, not finished` : `${shown(line.low[k])} to ${shown(line.high[k])} over ${line.n[k]} seed${line.n[k] > 1 ? "s" : ""}`;
    return `${line.c.label}, step ${line.x[k]}: ${shown(line.y[k])} (${range})`;
  };
  let cursor = null;

  function draw() {
    const metric = data.metrics.find((each) => each.name === state.metric), all = lines();
    const width = Math.max(280, canvas.clientWidth || 600), height = Math.min(380, Math.max(240, width * 0.5));
    const left = 58, right = 10, top = 12, bottom = 40;
    const [from, to] = span();
    const inside = all.flatMap((line) => line.x.flatMap((x, k) => x < from || x > to || line.y[k] === null ? [] : state.bands && line.low ? [line.low[k], line.high[k]] : [line.y[k]])).filter((v) => v !== null);
    let low = Math.min(...inside), high = Math.max(...inside);
    if (!inside.length) [low, high] = [0, 1];
    const margin = (high - low || Math.abs(high) || 1) * 0.05;
    [low, high] = [low - margin, high + margin];
    const px = (x) => left + (x - from) / (to - from || 1) * (width - left - right);
    const py = (y) => height - bottom - (y - low) / (high - low) * (height - top - bottom);
    const title = `${metric.title} over steps: ${all.length} line${all.length === 1 ? "" : "s"}. Arrow keys read values, plus and minus zoom.`;
    const chart = make("svg:svg", { viewBox: `0 0 ${width} ${height}`, width, height, tabindex: 0, role: "application", "aria-label": title, class: "chart" });
    const clip = make("svg:clipPath", { id: "inside" }, make("svg:rect", { x: left, y: top, width: width - left - right, height: height - top - bottom }));
    chart.append(make("svg:defs", {}, clip));
    for (const tick of ticks(low, high, height / 60)) {
      chart.append(make("svg:line", { x1: left, x2: width - right, y1: py(tick), y2: py(tick), class: "grid" }),
        make("svg:text", { x: left - 6, y: py(tick) + 4, "text-anchor": "end" }, shown(tick)));
    }
    for (const tick of ticks(from, to, width / 110)) {
      chart.append(make("svg:text", { x: px(tick), y: height - bottom + 16, "text-anchor": "middle" }, shown(tick)));
    }
    chart.append(make("svg:text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, "optimizer step"),
      make("svg:text", { x: -(top + height - bottom) / 2, y: 12, transform: "rotate(-90)", "text-anchor": "middle" }, metric.unit || metric.title));
    const drawn = make("svg:g", { "clip-path": "url(#inside)" });
    chart.append(drawn);
    const path = (line, values) => line.x.map((x, k) => values[k] === null ? null : `${px(x).toFixed(1)},${py(values[k]).toFixed(1)}`).filter(Boolean);
    for (const line of all) {
      if (state.bands && line.low) {
        const band = [...path(line, line.low), ...path(line, line.high).reverse()];
        drawn.append(make("svg:polygon", { points: band.join(" "), class: "band", "--hue": line.c.color, "data-label": line.c.label }));
      }
    }
    for (const line of all) {
      drawn.append(make("svg:polyline", { points: path(line, line.y).join(" "), class: line.trial ? "curve thin" : "curve", "stroke-dasharray": line.c.dash, "--hue": line.c.color, "data-label": line.c.label }));
      if (line.x.length === 1 && line.y[0] !== null) drawn.append(make("svg:circle", { cx: px(line.x[0]), cy: py(line.y[0]), r: 3, class: "dot", "--hue": line.c.color, "data-label": line.c.label }));
    }
    const mark = make("svg:circle", { r: 5, class: "mark", visibility: "hidden" }), tip = make("div", { class: "tip", hidden: true });
    const brush = make("svg:rect", { y: top, height: height - top - bottom, class: "brush", visibility: "hidden" });
    chart.append(mark, brush);
    const points = all.flatMap((line) => line.x.flatMap((x, k) => x < from || x > to || line.y[k] === null ? [] : [{ line, k, x: px(x), y: py(line.y[k]) }]));

    function show(found) {
      mark.setAttribute("visibility", found ? "visible" : "hidden");
      tip.hidden = !found;
      point(found ? found.line.c.label : null);
      if (!found) return;
      mark.setAttribute("cx", found.x);
      mark.setAttribute("cy", found.y);
      mark.style.setProperty("--hue", found.line.c.color);
      tip.textContent = words(found.line, found.k);
      const scale = chart.clientWidth / width || 1;
      const room = Math.min(260, width * 0.6);
      tip.style.maxWidth = `${room}px`;
      tip.style.left = `${Math.min(Math.max(0, found.x * scale - room / 2), Math.max(0, canvas.clientWidth - room))}px`;
      tip.style.top = `${found.y * scale + 12}px`;
    }
    const at = (event) => {
      const box = chart.getBoundingClientRect();
      return [(event.clientX - box.left) * width / box.width, (event.clientY - box.top) * height / box.height];
    };
    const nearest = (x, y) => points.reduce((found, each) => {
      const distance = (each.x - x) ** 2 + (each.y - y) ** 2;
      return distance < (found?.distance ?? 60 ** 2) ? { ...each, distance } : found;
    }, null);
    let start = null;
    chart.addEventListener("pointerdown", (event) => { if (event.pointerType === "mouse") { start = at(event)[0]; chart.setPointerCapture(event.pointerId); } });
    chart.addEventListener("pointermove", (event) => {
      const [x, y] = at(event);
      if (start === null) { show(nearest(x, y)); return; }
      brush.setAttribute("x", Math.min(start, x));
      brush.setAttribute("width", Math.abs(x - start));
      brush.setAttribute("visibility", "visible");
    });
    chart.addEventListener("pointerup", (event) => {
      const [x] = at(event), began = start;
      start = null;
      brush.setAttribute("visibility", "hidden");
      if (began === null || Math.abs(x - began) < 8) return;
      const step = (pixels) => from + (Math.min(Math.max(pixels, left), width - right) - left) / (width - left - right) * (to - from);
      state.zoom = [step(Math.min(began, x)), step(Math.max(began, x))];
      redraw();
    });
    chart.addEventListener("pointerleave", () => { if (start === null) show(null); });
    chart.addEventListener("dblclick", () => { state.zoom = null; redraw(); });
    chart.addEventListener("keydown", (event) => {
      const change = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (change && all.length) {
        const line = Math.min(Math.max(0, (cursor?.line ?? 0) + (cursor ? change[0] : 0)), all.length - 1);
        const last = all[line].x.length - 1, k = Math.min(Math.max(0, (cursor?.k ?? last) + (cursor ? change[1] : 0)), last);
        cursor = { line, k };
        note.textContent = words(all[line], k);
        show({ line: all[line], k, x: px(all[line].x[k]), y: py(all[line].y[k] ?? low) });
      } else if (event.key === "+" || event.key === "-") zoom(event.key === "+" ? 0.5 : 2)();
      else if (event.key === "0" || event.key === "Escape") { state.zoom = null; redraw(); }
      else return;
      event.preventDefault();
      if (!change) canvas.querySelector(".chart").focus();
    });
    chart.addEventListener("blur", () => show(null));
    cursor = null;
    note.textContent = all.length ? "" : "No configuration is shown.";
    canvas.replaceChildren(chart, tip);
  }
  redraws.push(draw);
  let width = 0;
  new ResizeObserver(() => { if (canvas.clientWidth !== width) { width = canvas.clientWidth; draw(); } }).observe(canvas);
}

// --- parallel coordinates ----------------------------------------------------------------------------------------

function coordinates(place, group) {
  const canvas = make("div", { class: "canvas" }), note = make("p", { role: "status", class: "reading" });
  if (group.label) place.append(make("h4", {}, group.label));
  place.append(canvas, note);
  function draw() {
    const width = Math.max(300, canvas.clientWidth || 600), height = 300, left = 54, right = 64, top = 14, bottom = 34;
    const px = (k) => left + k / (group.axes.length - 1) * (width - left - right), py = (h) => height - bottom - h * (height - top - bottom);
    const visible = group.lines.filter((line) => isShown(line.label));
    const chart = make("svg:svg", { viewBox: `0 0 ${width} ${height}`, width, height, tabindex: 0, role: "application", class: "chart",
      "aria-label": `Settings and ${data.objective} of ${visible.length} configurations, the best first. Arrow keys read them.` });
    const read = (line) => `${line.label}: ${data.objective} ${shown(line.value)}`;
    const tell = (line) => { note.textContent = line ? read(line) : ""; point(line ? line.label : null); };
    for (const line of [...visible].reverse()) {
      const points = line.at.map((h, k) => `${px(k).toFixed(1)},${py(h).toFixed(1)}`).join(" ");
      const rank = group.lines.indexOf(line) / Math.max(1, group.lines.length - 1);
      chart.append(make("svg:polyline", { points, class: "curve", "data-label": line.label, "--hue": `hsl(${210 - 170 * rank} 70% 40%)` }),
        make("svg:polyline", { points, class: "reach", onpointerenter: () => tell(line), onpointerleave: () => tell(null) }, make("svg:title", {}, read(line))));
    }
    group.axes.forEach((name, k) => {
      const last = k === group.axes.length - 1;
      chart.append(make("svg:line", { x1: px(k), x2: px(k), y1: top, y2: height - bottom, class: "axis" }),
        make("svg:text", { x: px(k), y: height - 10, "text-anchor": last ? "end" : k ? "middle" : "start", dx: last ? right - 4 : k ? 0 : 4 - left }, name));
      for (const [h, label] of group.ticks[k]) {
        chart.append(make("svg:text", { x: px(k) + (last ? 5 : -5), y: py(h) + 4, "text-anchor": last ? "start" : "end", class: "value" }, label));
      }
    });
    let at = -1;
    chart.addEventListener("keydown", (event) => {
      const change = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
      if (!change || !visible.length) return;
      at = Math.min(Math.max(0, at + change), visible.length - 1);
      tell(visible[at]);
      event.preventDefault();
    });
    chart.addEventListener("blur", () => tell(null));
    canvas.replaceChildren(chart);
  }
  redraws.push(draw);
  let width = 0;
  new ResizeObserver(() => { if (canvas.clientWidth !== width) { width = canvas.clientWidth; draw(); } }).observe(canvas);
}

// --- the page of a study that runs -------------------------------------------------------------------------------

function live(body) {
  const told = document.getElementById("live");
  async function poll() {
    try {
      const answer = await fetch(body.dataset.live, { cache: "no-store" });
      if (!answer.ok) throw new Error(String(answer.status));
      const { version } = await answer.json();
      told.textContent = "live";
      const isTyping = document.activeElement?.matches("input, select");
      if (version !== body.dataset.version && !isTyping && !document.hidden) { keep(); location.reload(); return; }
    } catch { told.textContent = "the server does not answer"; }
    setTimeout(poll, 1000 * Number(body.dataset.seconds));
  }
  poll();
}

document.querySelectorAll("table[data-table]").forEach(sortable);
const explorer = document.getElementById("explorer");
if (explorer && data.metrics?.length) { curves(explorer); explorer.append(chooser()); }
const parallel = document.getElementById("coordinates");
if (parallel) data.coordinates.forEach((group) => coordinates(parallel, group));
redraw();
document.querySelectorAll(".scroll").forEach((each) => { each.tabIndex = 0; });
if (document.body.dataset.live) live(document.body);
})();
