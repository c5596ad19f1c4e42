/* From what the agent answers to descriptions of charts (see charts.js), and to the week's cells. */
"use strict";
window.servefitViews = (() => {
  const { number, wantsLogX } = window.servefitCharts;
  const specs = window.servefitSpecs;
  const { reasons } = window.servefitWords;

  // --------------------------------------------------------------------------------------- in time

  const DASHED = { dash: [2, 3] };
  const percentiles = (metric) => [50, 95, 99].map(
    (p) => [`${metric}_p${p}_ms`, `p${p}`, `--p${p}`]);

  /** [id, title, unit, format, [[metric, label, color, more?] …], more?] */
  const CHARTS = [
    ["load", "Requests in flight", "mean", "number", [
      ["requests_running", "running", "--s1"], ["requests_waiting", "waiting", "--s2"]]],
    ["rate", "Requests finished", "per second", "number", [
      ["requests_per_s", "requests/s", "--s1"]]],
    ["tokens", "Tokens", "per second", "number", [
      ["output_tokens_per_s", "output", "--s1"], ["prompt_tokens_per_s", "prompt", "--s2"]]],
    ["ttft", "Time to first token", "TTFT", "ms", percentiles("ttft")],
    ["itl", "Inter-token latency", "ITL", "ms", percentiles("itl")],
    ["kv", "KV cache in use", "share of capacity", "ratio", [
      ["kv_usage_ratio", "mean", "--s3"]], { y: { max: 1 } }],
    ["memory", "GPU memory", "all GPUs", "bytes", [
      ["gpu_memory_used_bytes", "used", "--s3"],
      ["gpu_memory_total_bytes", "in all", "--s3", DASHED]]],
    ["busy", "GPUs busy", "share of time", "ratio", [
      ["gpu_utilization_ratio", "mean", "--s4"]], { y: { max: 1 } }],
    ["power", "Power", "all GPUs", "watt", [["gpu_power_w", "power", "--s4"]]],
    ["energy", "Energy", "per output token", "joule", [
      ["energy_j_per_output_token", "J per token", "--s4"]]],
  ];
  const METRICS = [...new Set(CHARTS.flatMap(([, , , , made]) => made.map(([name]) => name)))];
  const ofGpu = (name) => name.startsWith("gpu_") || name.startsWith("energy_");
  const OF_GPUS = METRICS.filter(ofGpu);
  const OF_SERVERS = METRICS.filter((name) => !ofGpu(name));

  const day = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "short" });
  const when = (unix_s) => day.format(new Date(unix_s * 1000));

  /** Newest, mean and highest of each series in words: what the picture shows at a glance. */
  function summarize(title, unit, from, to, series) {
    const told = series.flatMap(({ label, values }) => {
      const known = values.filter((v) => v !== null);
      if (!known.length) return [];
      const mean = known.reduce((a, b) => a + b, 0) / known.length;
      return [`${label}: ${number(known.at(-1))} newest, ${number(mean)} on average, ` +
        `${number(Math.max(...known))} highest.`];
    });
    return `${title}, ${unit}, from ${when(from)} to ${when(to)}. ${told.join(" ") || "No data."}`;
  }

  /** `table` as /api/v1/table answers; `slos` of the servers shown, a line each; `simulated`: any of
      them is. */
  function timeCharts(table, slos, simulated = false) {
    const { from_s: from, step_s: step, metrics } = table;
    const count = metrics[METRICS[0]].values.length;
    const times = Array.from({ length: count }, (_, i) => from + i * step);
    const to = from + Math.max(1, count) * step;
    const blank = (value) => times.map(() => value);
    return CHARTS.map(([id, title, unit, format, made, more = {}]) => {
      const series = made.map(([key, label, color, extra]) =>
        ({ key, label, color, width: 1.5, values: metrics[key].values, ...extra }));
      const bounds = slos.filter((slo) => slo.metric === id);
      const label = (slo) => `SLO ${slo.statistic} < ${number(slo.bound_ms)} ms`;
      return {
        id, title, unit, format, series, simulated,
        x: { time: true, values: times, from, to, step, label: "", name: "" },
        valid: blank(true), met: blank(null), notes: blank(""), showsMet: false,
        lines: bounds.map((slo) => ({ y: slo.bound_ms, label: label(slo) })),
        marks: [], bands: [], summary: summarize(title, unit, from, to, series), ...more,
      };
    });
  }

  // ------------------------------------------------------------------------------------- the curve

  const orNull = (value) => value ?? null;

  /** An axis that holds the loads of the sweep and those of production: each row from one of them. */
  function together(base, points) {
    const rows = [
      ...base.x.values.map((x, i) => ({ x, level: i })),
      ...points.map((point) => ({ x: point.concurrency, point })),
    ].sort((a, b) => a.x - b.x);
    const ofLevel = (values, other) =>
      rows.map(({ level }) => (level === undefined ? other : orNull(values[level])));
    const ofPoint = (pick) => rows.map(({ point }) => (point ? orNull(pick(point)) : null));
    return { rows, ofLevel, ofPoint };
  }

  /** The sweep's chart with production's points in it; `pick` and `ci` take a point's numbers. */
  function withProduction(spec, points, pick, ci, more = {}) {
    const { rows, ofLevel, ofPoint } = together(spec, points);
    const series = spec.series.map((s) =>
      ({ ...s, values: ofLevel(s.values, null), ...(s.ci ? { ci: ofLevel(s.ci, null) } : {}) }));
    if (points.some((point) => orNull(pick(point)) !== null)) {
      series.push({ key: "production", label: "production, by itself", color: "--s2",
        scatter: true, values: ofPoint(pick), ci: ofPoint(ci) });
    }
    const values = rows.map(({ x }) => x);
    const seen = points.length ? ` Production showed ${points.length} points of its own.` : "";
    return { ...spec, ...more, series, x: { ...spec.x, values, log: wantsLogX(values) },
      valid: ofLevel(spec.valid, true), met: ofLevel(spec.met, null),
      notes: ofLevel(spec.notes, ""),
      summary: spec.summary.replace(" The table of all levels holds the numbers.", "") + seen };
  }

  const unmeasured = (id, title, unit, format, more = {}) => ({
    id, title, unit, format, series: [], simulated: false, showsMet: false, lines: [], marks: [],
    bands: [], valid: [], met: [], notes: [], summary: `${title} against concurrency.`,
    x: { values: [], label: "concurrency, streams", name: "concurrency" }, ...more });

  /** A sweep in an open loop has no axis of concurrency: production cannot be drawn into it. */
  const byConcurrency = (sweep) => sweep.levels.some((level) => level.concurrency != null);

  /** `31 hours`: as a person says how long something was watched. */
  function lasting(seconds) {
    const units = [["days", 86400], ["hours", 3600], ["minutes", 60], ["seconds", 1]];
    const [name, length] = units.find(([, one]) => seconds >= 2 * one) ?? units.at(-1);
    return `${number(Math.round(seconds / length))} ${name}`;
  }

  /** Where production lives: what was in flight over the window, and what is now. */
  function life(pattern, now) {
    const seen = pattern?.concurrency;
    const known = seen && seen.p50 !== null && seen.p99 !== null && seen.p99 > 0;
    const label = known && `production: ${number(seen.p50)} to ${number(seen.p99)} in flight ` +
      `(p50 to p99 of ${lasting(pattern.covered_s)})`;
    return {
      bands: known ? [{ lo: seen.p50, hi: seen.p99, label, color: "--now" }] : [],
      marks: now === null ? [] : [{ x: now, label: `now ${number(now)}`, color: "--s2" }],
    };
  }

  /** `curves` as /api/v1/curve answers, `pattern` may still be missing, `now` is in flight now. */
  function curveChart(curves, pattern, now) {
    const sweep = curves.measured?.sweep;
    const { points } = curves.passive;
    const alone = unmeasured("curve", "Throughput", "output tokens/s against load", "number",
      { tall: true });
    const base = sweep ? specs.curve(sweep, reasons) : alone;
    if (sweep && !byConcurrency(sweep)) return base;
    const spec = withProduction(base, points, (p) => p.output_tokens_per_s,
      (p) => p.output_tokens_per_s_ci95);
    if (!spec.x.values.length) return spec;
    const { bands, marks } = life(pattern, now);
    const [lo, hi] = [spec.x.values[0], spec.x.values.at(-1)];
    const inside = (x) => Math.min(hi, Math.max(lo, x));
    const shown = bands.map((band) => ({ ...band, lo: inside(band.lo), hi: inside(band.hi) }));
    const nowIn = marks.filter(({ x }) => x > 0).map((mark) => ({ ...mark, x: inside(mark.x) }));
    return { ...spec, bands: [...spec.bands, ...shown], marks: [...spec.marks, ...nowIn],
      summary: [spec.summary, ...bands.map((band) => `${band.label}.`),
        ...marks.map((mark) => `${mark.label}.`)].join(" ") };
  }

  /** TTFT and ITL against concurrency, with the SLO's line: what makes the capacity what it is. */
  function latencyCharts(curves) {
    const sweep = curves.measured?.sweep;
    if (!sweep || !byConcurrency(sweep)) return [];
    return specs.latencies(sweep).filter(({ id }) => id === "ttft" || id === "itl").map((spec) =>
      withProduction(spec, curves.passive.points, (p) => p[`${spec.id}_ms`]?.p95, () => null,
        { id: `curve-${spec.id}`, title: `${spec.title} against load` }));
  }

  // -------------------------------------------------------------------------------------- the week

  /** What the servers together hold: by the verdict (of one replica, each the same), else null. */
  function capacityOf(verdict) {
    const { unit, value, lo } = verdict?.capacity ?? {};
    const known = value ?? lo;
    if (!known || !["concurrency", "rps"].includes(unit)) return null;
    return { unit, value: known * (verdict.demand?.replicas ?? 1) };
  }

  /** How many whole hours the zone of whoever looks is ahead; null where it is no whole number. */
  function ahead() {
    const hours = -new Date().getTimezoneOffset() / 60;
    return Number.isInteger(hours) ? hours : null;
  }

  /** Seven days of 24 cells {demand, share, most, covered_s}; shares of the capacity, or where that
      is not known of the busiest hour. The pattern's hours are UTC. */
  function week(pattern, capacity, hoursAhead = ahead()) {
    const rate = capacity?.unit === "rps";
    const demand = (cell) => (rate ? cell.requests_per_s : cell.mean);
    const known = pattern.profile.map(demand).filter((v) => v !== null);
    const full = capacity?.value ?? Math.max(0, ...known);
    const at = (hour) => pattern.profile[(((hour - (hoursAhead ?? 0)) % 168) + 168) % 168];
    const cell = (hour) => {
      const value = orNull(demand(at(hour)));
      return { value, share: value === null || !full ? null : value / full, max: at(hour).max };
    };
    return {
      rate, full, zone: hoursAhead === null ? "UTC" : "your time",
      days: Array.from({ length: 7 }, (_, d) =>
        Array.from({ length: 24 }, (_, h) => cell(d * 24 + h))),
    };
  }

  return { METRICS, OF_GPUS, OF_SERVERS, timeCharts, curveChart, latencyCharts, capacityOf, week, when };
})();
