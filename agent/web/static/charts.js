/* Charts over uPlot. Of load points: lines through what was measured well, hollow markers for what
   was not, error bars, bounds, vertical marks and shaded brackets. Of time: lines with gaps.

   A chart is described by a plain object (see `specs.js` for how a sweep becomes one, `views.js`
   for the agent's series):

     {id, title, unit, format, summary, simulated, tall,
      x: {label, name, values, log, whole?,       values ascend; whole: ticks are integers
          time?, from?, to?, step?},              time: values are unix seconds, from–to is shown
      y: {max?},                          a fixed top, such as 1 for a ratio
      series: [{key, label, color, dash?, width?, values, ci?: [[lo, hi] | null],
                scatter?}],               scatter: markers alone, no line through them
      valid: [bool], met: [bool | null], notes: [text],       one for each x
      hollow?,                            what a point that is not valid is called, else so
      lines: [{y, label, color?}], marks: [{x, label, color}], bands: [{lo, hi, label, color?}]}

   Colours are names of CSS custom properties, looked up at every draw: a change of theme needs a
   redraw and nothing else. All text goes through textContent or the canvas, never through markup.
*/
"use strict";
window.servefitCharts = (() => {
  const mounted = new Map();
  const BRIDGED_S = 60; // a shorter silence is between two samples, a longer one is a gap
  const FONT = '12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';
  const LOG_X_SPAN = 8; // a load axis that spans this factor is logarithmic
  const LOG_Y_SPAN = 12;
  const GIBIBYTES = Array.from({ length: 30 }, (_, i) => 2 ** (i + 20));
  const FAR_BOUND = 2.5; // a bound this far above the data would flatten it: named, not drawn

  // ------------------------------------------------------------------------------ numbers as text

  const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

  /** Three to four significant digits, thousands grouped, never an exponent. */
  function number(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size >= 1000 || Number.isInteger(value)) return grouped.format(value);
    if (size >= 100) return value.toFixed(0);
    return String(Number(value.toPrecision(3)));
  }

  const FORMATS = {
    number: (v) => number(v),
    ms: (v) => (v === null || v === undefined ? "–" : `${number(v)} ms`),
    ratio: (v) => (v === null || v === undefined ? "–" : `${number(v * 100)} %`),
    watt: (v) => (v === null || v === undefined ? "–" : `${number(v)} W`),
    joule: (v) => (v === null || v === undefined ? "–" : `${number(v)} J`),
    change: (v) => (v === null || v === undefined ? "–" : `${v > 0 ? "+" : ""}${number(v)} %`),
    bytes: (v) => (v === null || v === undefined ? "–" : `${number(v / 2 ** 30)} GiB`),
  };

  const TICKS = {
    ...FORMATS,
    ms: (v) => (v >= 1000 ? `${number(v / 1000)} s` : `${number(v)} ms`),
  };

  const text = (spec, value) => FORMATS[spec.format](value);

  const dates = (options) => new Intl.DateTimeFormat("en-GB", options);
  const CLOCK = dates({ hour: "2-digit", minute: "2-digit" });
  const SECONDS = dates({ hour: "2-digit", minute: "2-digit", second: "2-digit" });
  const DAY = dates({ day: "numeric", month: "short" });

  /** An instant of a chart, in the time zone of whoever looks. */
  function instant(x, unix_s) {
    const at = new Date(unix_s * 1000);
    return `${DAY.format(at)}, ${(x.step < 60 ? SECONDS : CLOCK).format(at)}`;
  }

  /** A tick: the time of day, and at midnight the day. */
  function tickTime(unix_s) {
    const at = new Date(unix_s * 1000);
    return at.getHours() + at.getMinutes() + at.getSeconds() ? CLOCK.format(at) : DAY.format(at);
  }

  const place = (spec, i) => (spec.x.time
    ? instant(spec.x, spec.x.values[i]) : `${spec.x.name} ${number(spec.x.values[i])}`);

  // ---------------------------------------------------------------------------------------- ranges

  const finite = (values) => values.filter((v) => v !== null && Number.isFinite(v));

  function drawnValues(spec) {
    const ends = (s) => (s.ci ?? []).flatMap((ci) => ci ?? []);
    return finite(spec.series.flatMap((s) => [...s.values, ...ends(s)]));
  }

  /** Wide ranges of load are read in doublings, narrow ones in steps. */
  function wantsLogX(values) {
    return values.length > 1 && values[0] > 0 && values.at(-1) / values[0] >= LOG_X_SPAN;
  }

  function wantsLogY(spec) {
    const values = drawnValues(spec);
    if (spec.format !== "ms" || values.length < 2) return false;
    return Math.min(...values) > 0 && Math.max(...values) / Math.min(...values) >= LOG_Y_SPAN;
  }

  function rangeX({ values, log, time, from, to }) {
    if (time) return [from, to];
    const [lo, hi] = [values[0], values.at(-1)];
    if (log) return [lo / 1.2, hi * 1.2];
    if (lo === hi) return [0, 2 * hi || 1];
    const pad = (hi - lo) * 0.05;
    return [Math.max(0, lo - pad), hi + pad];
  }

  /** The next 1, 2 or 5 times a power of ten, outwards. */
  function nice(value, up) {
    const decade = 10 ** Math.floor(Math.log10(value));
    const steps = [1, 2, 5, 10].map((s) => s * decade);
    return up ? steps.find((s) => s >= value * 0.9999) : steps.findLast((s) => s <= value * 1.0001);
  }

  function boundInSight(spec, line) {
    return line.y <= FAR_BOUND * Math.max(...drawnValues(spec), 0);
  }

  function rangeY(spec, log) {
    const values = drawnValues(spec);
    const bounds = spec.lines.filter((line) => boundInSight(spec, line)).map((line) => line.y);
    const top = Math.max(...values, ...bounds);
    if (log) return [nice(Math.min(...values, ...bounds), false), nice(top * 1.05, true)];
    const least = Math.min(0, ...values);
    if (least < 0) return [least * 1.08, top > 0 ? top * 1.08 : -least * 0.08];
    return [0, spec.y?.max ?? (top > 0 ? top * 1.08 : 1)];
  }

  // --------------------------------------------------------------------------------------- drawing

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  /** Runs `draw` in canvas pixels, whatever alignment the axes have left behind. */
  function drawing(u, draw) {
    u.ctx.save();
    u.ctx.textAlign = "left";
    u.ctx.textBaseline = "alphabetic";
    draw(u.ctx, uPlot.pxRatio);
    u.ctx.restore();
  }

  const px = (u, x) => u.valToPos(x, "x", true);
  const py = (u, y) => u.valToPos(y, "y", true);

  function segment(ctx, x0, y0, x1, y1) {
    ctx.beginPath();
    ctx.moveTo(x0, y0);
    ctx.lineTo(x1, y1);
    ctx.stroke();
  }

  function drawBands(u, spec) {
    drawing(u, (ctx) => {
      for (const band of spec.bands) {
        ctx.fillStyle = color(band.color ?? "--band");
        const left = band.lo === null ? u.bbox.left : px(u, band.lo);
        const right = band.hi === null ? u.bbox.left + u.bbox.width : px(u, band.hi);
        ctx.fillRect(left, u.bbox.top, right - left, u.bbox.height);
      }
    });
  }

  function drawLines(u, spec) {
    drawing(u, (ctx, ratio) => {
      ctx.lineWidth = 1.25 * ratio;
      ctx.font = FONT.replace("12px", `${11 * ratio}px`);
      for (const line of spec.lines.filter((l) => boundInSight(spec, l))) {
        ctx.strokeStyle = ctx.fillStyle = color(line.color ?? "--slo");
        const y = py(u, line.y);
        ctx.setLineDash([6 * ratio, 4 * ratio]);
        segment(ctx, u.bbox.left, y, u.bbox.left + u.bbox.width, y);
        ctx.fillText(line.label, u.bbox.left + 6 * ratio, y - 4 * ratio);
      }
    });
  }

  /** Vertical marks; their names stand in rows above the plot, where no data can be under them, and
      in front of all lines. */
  function drawMarks(u, spec) {
    drawing(u, (ctx, ratio) => {
      ctx.font = FONT.replace("12px", `600 ${12 * ratio}px`);
      const placed = spec.marks.map((mark, row) => ({ ...mark, x: px(u, mark.x),
        y: u.bbox.top - (8 + 16 * (spec.marks.length - 1 - row)) * ratio }));
      ctx.lineWidth = 1.25 * ratio;
      ctx.setLineDash([2 * ratio, 3 * ratio]);
      for (const mark of placed) {
        ctx.strokeStyle = color(mark.color);
        segment(ctx, mark.x, mark.y, mark.x, u.bbox.top + u.bbox.height);
      }
      ctx.lineWidth = 5 * ratio;
      ctx.lineJoin = "round";
      ctx.setLineDash([]);
      for (const { x, y, label, color: name } of placed) {
        const width = ctx.measureText(label).width;
        const fits = x + width + 6 * ratio < u.ctx.canvas.width;
        const at = [label, fits ? x + 5 * ratio : x - width - 5 * ratio, y + 3 * ratio];
        ctx.strokeStyle = color("--card");
        ctx.strokeText(...at);
        ctx.fillStyle = color(name);
        ctx.fillText(...at);
      }
    });
  }

  function drawErrorBars(u, series) {
    drawing(u, (ctx, ratio) => {
      ctx.strokeStyle = color(series.color);
      ctx.lineWidth = 1.25 * ratio;
      series.ci.forEach((ci, i) => {
        if (!ci) return;
        const [x, lo, hi, cap] = [px(u, u.data[0][i]), py(u, ci[0]), py(u, ci[1]), 4 * ratio];
        segment(ctx, x, lo, x, hi);
        segment(ctx, x - cap, lo, x + cap, lo);
        segment(ctx, x - cap, hi, x + cap, hi);
      });
    });
  }

  const DIAMOND = [[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]];

  function outline(ctx, x, y, r, diamond) {
    ctx.beginPath();
    if (!diamond) ctx.arc(x, y, r, 0, 2 * Math.PI);
    else DIAMOND.forEach(([a, b]) => ctx.lineTo(x + a * r, y + b * r));
    ctx.closePath();
  }

  /** Round: good. Diamond: the SLO was missed. Hollow: the measurement is not valid. */
  function drawMarkers(u, spec, series) {
    drawing(u, (ctx, ratio) => {
      ctx.lineWidth = 1.5 * ratio;
      series.values.forEach((value, i) => {
        if (value === null) return;
        const missed = spec.showsMet && spec.met[i] === false;
        const stroke = color(missed ? "--slo" : series.color);
        outline(ctx, px(u, u.data[0][i]), py(u, value), (spec.tall ? 4 : 2.75) * ratio, missed);
        ctx.strokeStyle = spec.valid[i] && spec.tall ? color("--card") : stroke;
        ctx.fillStyle = spec.valid[i] ? stroke : color("--card");
        ctx.fill();
        ctx.stroke();
      });
    });
  }

  // ----------------------------------------------------------------------------------------- uPlot

  /** The axis is as wide as its longest label, so that no number is cut. */
  function axisSize(u, values, index) {
    if (!values?.length) return 34;
    u.ctx.save();
    u.ctx.font = u.axes[index].font[0];
    const widest = Math.max(...values.map((v) => u.ctx.measureText(v ?? "").width));
    u.ctx.restore();
    return Math.ceil(widest / uPlot.pxRatio) + 14;
  }

  /** Powers of two inside the range: the steps in which people raise the load. */
  function doublings(lo, hi) {
    const first = Math.ceil(Math.log2(lo));
    const count = Math.floor(Math.log2(hi)) - first + 1;
    return Array.from({ length: count }, (_, i) => 2 ** (first + i));
  }

  /** 1, 2, 5, 10, 20 … inside the range, or the powers of ten alone where those are too many. */
  function decimals(lo, hi) {
    const from = Math.floor(Math.log10(lo));
    const count = Math.ceil(Math.log10(hi)) - from + 1;
    const decades = Array.from({ length: count }, (_, i) => from + i);
    const steps = decades.length > 4 ? [1] : [1, 2, 5];
    const all = decades.flatMap((d) => steps.map((s) => Number(`${s}e${d}`)));
    return all.filter((v) => v >= lo * 0.999 && v <= hi * 1.001);
  }

  /** Drops labels, not grid lines, where a narrow screen has no room for each. */
  function thinned(u, splits) {
    const room = Math.max(1, Math.floor(u.bbox.width / uPlot.pxRatio / 30));
    const step = Math.ceil(splits.length / room);
    return splits.map((v, i) => (i % step === 0 ? number(v) : ""));
  }

  function axes(spec, logY) {
    const common = {
      font: FONT,
      stroke: () => color("--ink-2"),
      grid: { stroke: () => color("--grid"), width: 1 },
      ticks: { show: false },
    };
    const x = {
      ...common, size: 24, gap: 6,
      label: spec.x.label || undefined, labelFont: FONT, labelSize: 18, labelGap: 0,
    };
    if (spec.x.time) {
      x.values = (u, splits) => splits.map(tickTime);
      x.space = 64;
    } else if (spec.x.log) {
      x.splits = (u) => doublings(u.scales.x.min, u.scales.x.max);
      x.values = thinned;
      x.filter = (u, splits) => splits;
    } else {
      x.values = (u, splits) => splits.map(number);
      x.space = 64;
      if (spec.x.whole) x.incrs = [1, 2, 5].flatMap((s) => [0, 1, 2, 3, 4].map((d) => s * 10 ** d));
    }
    const tick = TICKS[spec.format];
    const y = {
      ...common, size: axisSize, gap: 6, space: 38,
      values: (u, splits) => splits.map((v) => (v === null ? "" : tick(v))),
    };
    if (spec.format === "bytes") y.incrs = GIBIBYTES;
    if (logY) {
      y.splits = (u) => decimals(u.scales.y.min, u.scales.y.max);
      y.filter = (u, splits) => splits;
    }
    return [x, y];
  }

  /** The line's data: what is not valid is left out and bridged, never a corner of the curve, and
      repeats of one load count once, by their mean. */
  function lineValues(spec, series) {
    const xs = spec.x.values;
    if (spec.x.time) return bridged(series.values, BRIDGED_S / spec.x.step);
    const good = xs.map((_, i) => spec.valid[i] && series.values[i] !== null);
    return xs.map((x, i) => {
      const same = xs.flatMap((other, j) => (other === x && good[j] ? [j] : []));
      if (same[0] !== i) return null;
      return same.reduce((total, j) => total + series.values[j], 0) / same.length;
    });
  }

  /** uPlot breaks a line at null and goes on over undefined: so a gap stays one, and the silence
      between two samples is none. */
  function bridged(values, most) {
    const line = [...values];
    let last = -1;
    values.forEach((value, i) => {
      if (value === null) return;
      if (last >= 0 && i - last - 1 <= most) line.fill(undefined, last + 1, i);
      last = i;
    });
    return line;
  }

  function lineOptions(spec, series) {
    return {
      ...(series.scatter ? { paths: () => null } : {}),
      label: series.label,
      stroke: () => color(series.color),
      width: series.width ?? 1.75,
      dash: series.dash,
      spanGaps: !spec.x.time,
      points: { show: false },
    };
  }

  function options(spec, host) {
    const logY = wantsLogY(spec);
    return {
      ...sizeOf(spec, host),
      padding: [spec.marks.length ? 10 + 16 * spec.marks.length : 10, spec.x.time ? 22 : 14, 0, 2],
      legend: { show: false },
      cursor: {
        y: false,
        drag: { x: false, y: false },
        points: { show: false },
        sync: { key: spec.x.time ? "servefit-time" : "servefit-load", setSeries: false },
      },
      scales: {
        x: { time: spec.x.time === true, distr: spec.x.log ? 3 : 1, log: 2, range: () => rangeX(spec.x) },
        y: { distr: logY ? 3 : 1, log: 10, range: () => rangeY(spec, logY) },
      },
      axes: axes(spec, logY),
      series: [{}, ...spec.series.map((series) => lineOptions(spec, series))],
      hooks: {
        drawAxes: [(u) => drawBands(u, spec), (u) => drawLines(u, spec), (u) => drawMarks(u, spec)],
        draw: [(u) => drawPoints(u, spec)],
        setCursor: [(u) => showTip(u, spec, host)],
      },
    };
  }

  function drawPoints(u, spec) {
    for (const series of spec.series) {
      if (series.ci) drawErrorBars(u, series);
      if (!spec.x.time) drawMarkers(u, spec, series);
    }
  }

  function sizeOf(spec, host) {
    return { width: Math.max(200, host.clientWidth), height: spec.tall ? host.clientHeight : 216 };
  }

  // -------------------------------------------------------------------------- elements and tooltip

  /** element("p", {class: "note"}, "text", child …): text is always text. */
  function element(name, attributes = {}, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }

  function tipLines(spec, i) {
    const rows = spec.series
      .filter((s) => s.values[i] !== null)
      .map((s) => {
        const ci = s.ci?.[i];
        const interval = ci ? ` (95 %: ${number(ci[0])} – ${number(ci[1])})` : "";
        return { label: s.label, value: text(spec, s.values[i]) + interval };
      });
    const state = [];
    if (spec.met[i] !== null) state.push(spec.met[i] ? "SLO met" : "SLO missed");
    if (!spec.valid[i]) {
      state.push(`${spec.hollow ?? "not valid"}: ${spec.notes[i] || "no reason given"}`);
    }
    return { head: place(spec, i), rows, state };
  }

  /** All that was measured at one load, repeats and runs beside each other among it. */
  function alike(spec, i) {
    if (spec.x.time) return [i];
    return spec.x.values.map((_, j) => j).filter((j) => spec.x.values[j] === spec.x.values[i]);
  }

  function fillTip(tip, lines) {
    const body = lines.flatMap(({ rows, state }) => [
      ...rows.map(({ label, value }) =>
        element("div", { class: "row" }, element("span", {}, label), element("b", {}, value))),
      ...state.map((line) => element("div", { class: "state" }, line)),
    ]);
    tip.replaceChildren(element("div", { class: "head" }, lines[0].head), ...body);
  }

  /** Only the chart under the pointer or the focus speaks; the others show the crosshair alone.
      The tip keeps out of the way: beside the level, and in the half that its point is not in. */
  function showTip(u, spec, host, walked = null) {
    const i = walked ?? u.cursor.idx;
    const tip = host.querySelector(".tip");
    const awake = host.matches(":hover") || host === document.activeElement;
    tip.hidden = !(awake && Number.isInteger(i) && u.cursor.left >= 0);
    if (tip.hidden) return;
    fillTip(tip, (walked === null ? alike(spec, i) : [i]).map((j) => tipLines(spec, j)));
    const x = u.valToPos(spec.x.values[i], "x") + u.over.offsetLeft;
    const left = x + 14 + tip.offsetWidth > host.clientWidth ? x - 14 - tip.offsetWidth : x + 14;
    tip.style.left = `${Math.max(0, left)}px`;
    const first = spec.series.find((s) => s.values[i] !== null);
    const high = u.valToPos(first?.values[i] ?? 0, "y") < u.over.clientHeight / 2;
    const top = high ? u.over.clientHeight - tip.offsetHeight - 8 : 8;
    tip.style.top = `${Math.max(0, u.over.offsetTop + top)}px`;
  }

  /** Left and right walk the levels and are spoken through the page's status line; Escape ends.
      The place is kept here and not read from the cursor, which cannot tell repeats apart. */
  function walkByKeys(u, spec, host) {
    let at = -1;
    const leave = () => { at = -1; u.setCursor({ left: -10, top: -10 }); };
    host.addEventListener("blur", leave);
    host.addEventListener("keydown", (event) => {
      if (event.key === "Escape") leave();
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const places = spec.x.values.map((_, i) => i).filter((i) => isKnown(spec, i));
      const next = step > 0 ? places.find((i) => i > at)
        : places.findLast((i) => at < 0 || i < at);
      at = next ?? (at < 0 ? places.at(-1) : at);
      u.setCursor({ left: u.valToPos(spec.x.values[at], "x"), top: 10 }, true);
      showTip(u, spec, host, at);
      say(tipText(tipLines(spec, at)));
    });
  }

  /** An instant of which nothing is known is passed by; a load that failed is worth a word. */
  const isKnown = (spec, i) => !spec.x.time || spec.series.some((s) => s.values[i] !== null);

  const tipText = ({ head, rows, state }) =>
    [head, ...rows.map((r) => `${r.label} ${r.value}`), ...state].join(", ");

  function say(message) {
    const status = document.getElementById("status");
    if (status) status.textContent = message;
  }

  // ---------------------------------------------------------------------------------------- legend

  function swatch(kind, name) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 18 10");
    svg.setAttribute("aria-hidden", "true");
    svg.setAttribute("class", `swatch ${kind}`);
    const shapes = { line: "M0 5H18", dash: "M0 5H18", dot: "M9 1.5a3.5 3.5 0 1 1-.01 0z",
      hollow: "M9 1.5a3.5 3.5 0 1 1-.01 0z", diamond: "M9 .5L13.5 5L9 9.5L4.5 5z",
      bar: "M9 1V9M6 1H12M6 9H12", band: "M0 0H18V10H0z" };
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", shapes[kind]);
    path.style.setProperty("--swatch", `var(${name})`);
    svg.append(path);
    return svg;
  }

  function legendEntries(spec) {
    const main = spec.series[0]?.color;
    const kind = (s) => (s.scatter ? "dot" : s.dash ? "dash" : "line");
    const entries = spec.series.map((s) => [kind(s), s.color, s.label]);
    if (spec.series.some((s) => s.ci?.some(Boolean))) entries.push(["bar", main, "95 % interval"]);
    if (spec.showsMet && spec.met.includes(true)) entries.push(["dot", main, "SLO met"]);
    if (spec.showsMet && spec.met.includes(false)) entries.push(["diamond", "--slo", "SLO missed"]);
    if (spec.valid.includes(false)) entries.push(["hollow", main, spec.hollow ?? "not valid"]);
    for (const band of spec.bands) entries.push(["band", band.color ?? "--band", band.label]);
    for (const line of spec.lines) {
      const far = boundInSight(spec, line) ? "" : " (above the scale)";
      entries.push(["dash", line.color ?? "--slo", line.label + far]);
    }
    return entries;
  }

  function caption(spec) {
    const head = element("div", { class: "title" }, element("b", {}, spec.title));
    if (spec.unit) head.append(" ", element("span", { class: "unit" }, spec.unit));
    if (spec.note) head.append(" ", element("span", { class: "pill" }, spec.note));
    const badge = element("span", { class: "badge simulated" }, "simulated");
    if (spec.simulated) head.append(" ", badge);
    const legend = element("ul", { class: "legend" });
    for (const [kind, name, label] of legendEntries(spec)) {
      legend.append(element("li", {}, swatch(kind, name), label));
    }
    return element("figcaption", {}, head, legend);
  }

  // ----------------------------------------------------------------------------------- the outside

  const hasValues = (spec) => drawnValues(spec).length > 0;

  /** Puts the chart into `grid` as a figure, in the place of one of the same id. A chart without a
      single value is one line of text. */
  function mount(grid, spec) {
    const kind = spec.tall ? "chart tall" : "chart";
    const figure = element("figure", { class: kind, id: `chart-${spec.id}` });
    const old = document.getElementById(figure.id);
    if (old) old.replaceWith(figure);
    else grid.append(figure);
    unmount(spec.id);
    if (!hasValues(spec)) {
      figure.append(element("figcaption", {}, `${spec.title}: not measured.`));
      return;
    }
    const spoken = { role: "img", tabindex: "0", "aria-label": spec.summary };
    const host = element("div", { class: "plot", ...spoken });
    figure.append(caption(spec), host);
    const plot = new uPlot(options(spec, host), lines(spec), host);
    host.append(element("div", { class: "tip", hidden: "" }));
    walkByKeys(plot, spec, host);
    const resized = new ResizeObserver(() => plot.setSize(sizeOf(spec, host)));
    mounted.set(spec.id, { spec, plot, host, resized });
    resized.observe(host);
  }

  const lines = (spec) => [spec.x.values, ...spec.series.map((s) => lineValues(spec, s))];

  function unmount(id) {
    const one = mounted.get(id);
    if (!one) return;
    one.resized.disconnect();
    one.plot.destroy();
    mounted.delete(id);
  }

  /** Takes every chart out of `grid`. */
  function clear(grid) {
    for (const [id, { host }] of mounted) if (grid.contains(host)) unmount(id);
    grid.replaceChildren();
  }

  /** What was laid out when the chart was made; where it changes the chart is made anew. */
  const frameOf = (spec) => JSON.stringify([hasValues(spec), spec.simulated, wantsLogY(spec), spec.x.log,
    spec.note ?? "", spec.marks.length, spec.series.map((s) => s.key), legendEntries(spec)]);

  /** Like `mount`; a chart that is there already keeps its focus and takes the new numbers. */
  function show(grid, spec) {
    const one = mounted.get(spec.id);
    if (!one?.host.isConnected || frameOf(one.spec) !== frameOf(spec)) return mount(grid, spec);
    Object.assign(one.spec, spec);
    one.host.setAttribute("aria-label", spec.summary);
    one.plot.setData(lines(spec));
  }

  /** Draws everything again in the colours and at the size of now. */
  function redraw() {
    for (const { spec, plot, host } of mounted.values()) {
      plot.setSize(sizeOf(spec, host));
      plot.redraw(false, true);
    }
  }

  /** Paper is light whatever the screen is, and narrower: canvases are drawn again for it. What is
      folded lies open there, and is folded again afterwards. */
  function onPaper(printing) {
    document.documentElement.classList.toggle("paper", printing);
    const folded = printing ? "details:not([open])" : "details[data-folded]";
    for (const details of document.querySelectorAll(folded)) {
      details.open = printing;
      details.toggleAttribute("data-folded", printing);
    }
    redraw();
  }

  /** What each chart shows, for tests and for people at the console. */
  function data() {
    const shown = ([id, { spec, plot }]) => [id, {
      x: spec.x.values,
      log: { x: spec.x.log, y: plot.scales.y.distr === 3 },
      series: Object.fromEntries(spec.series.map((s) => [s.key, s.values])),
      ci: Object.fromEntries(spec.series.filter((s) => s.ci).map((s) => [s.key, s.ci])),
      drawn: plot.data.slice(1).map((values) => [...values]),
      valid: spec.valid, met: spec.met, lines: spec.lines, marks: spec.marks, bands: spec.bands,
    }];
    return Object.fromEntries([...mounted].map(shown));
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("beforeprint", () => onPaper(true));
  addEventListener("afterprint", () => onPaper(false));

  return { mount, show, clear, redraw, data, number, element, say, wantsLogX, hasValues };
})();
