/* From a sweep, as `--json` writes it, to descriptions of charts (see charts.js). */
"use strict";
window.servefitSpecs = (() => {
  const { number, wantsLogX } = window.servefitCharts;
  const RAMP = {
    p50: "--p50", mean: "--p50", p90: "--p95", p95: "--p95", p99: "--p99", max: "--p99",
  };
  const METRICS = {
    ttft: ["Time to first token", "TTFT"],
    ttfo: ["Time to first output", "TTFO, after reasoning"],
    itl: ["Inter-token latency", "ITL"],
    tpot: ["Time per output token", "TPOT, per request"],
    e2e: ["End to end", "E2E"],
  };

  const orNull = (value) => value ?? null;
  const isValid = (level) => level.measurement?.valid ?? true;
  const sum = (values) => values.reduce((a, b) => a + b, 0);

  const modeOf = (l) => (l.mode === "rate" || l.concurrency == null ? "rate" : "concurrency");

  function mainMode(sweep) {
    const valid = sweep.levels.filter(isValid);
    const sound = valid.length ? valid : sweep.levels;
    const rates = sound.filter((l) => modeOf(l) === "rate");
    return 2 * rates.length > sound.length ? "rate" : "concurrency";
  }

  /** The levels on one axis: those of the sweep's main mode, ascending. The table has them all. */
  function ordered(sweep, mode) {
    const load = (l) => (mode === "rate" ? l.offered_rps : l.concurrency);
    const levels = sweep.levels.filter((l) => modeOf(l) === mode && load(l) != null);
    levels.sort((a, b) => load(a) - load(b));
    return { mode, levels, values: levels.map(load) };
  }

  /** What all charts of a sweep have in common. */
  function frame(sweep, mode = mainMode(sweep)) {
    const { levels, values } = ordered(sweep, mode);
    const rate = mode === "rate";
    return {
      mode, levels, simulated: sweep.run.simulated === true,
      x: {
        values, log: wantsLogX(values), whole: !rate,
        label: rate ? "offered rate, requests/s" : "concurrency, streams",
        name: rate ? "offered requests/s" : "concurrency",
      },
      valid: levels.map(isValid),
      met: levels.map((l) => orNull(l.slo_met)),
      notes: levels.map((l) => (l.measurement?.reasons ?? []).join("; ")),
      showsMet: false, lines: [], marks: [], bands: [],
    };
  }

  const seriesOf = (base, key, label, color, pick, more = {}) =>
    ({ key, label, color, values: base.levels.map((l) => orNull(pick(l))), ...more });

  function span(base) {
    const { values, name } = base.x;
    const bad = base.valid.filter((ok) => !ok).length;
    return `${values.length} levels, ${name} ${number(values[0])} to ${number(values.at(-1))}` +
      (bad ? `, ${bad} of them not valid` : "");
  }

  const closing = (base) =>
    `${base.simulated ? " Simulated." : ""} The table of all levels holds the numbers.`;

  /** First, highest and last valid value of the most telling series, in words. */
  function summarize(base, title, series, unit, more = []) {
    const known = series.values.filter((v, i) => v !== null && base.valid[i]);
    if (!known.length) return `${title}: no valid measurement.`;
    return `${title} over ${span(base)}. ${series.label}: ${number(known[0])} at first, ` +
      `${number(known.at(-1))} at last, highest ${number(Math.max(...known))} ${unit}.` +
      more.filter(Boolean).map((part) => ` ${part}.`).join("") + closing(base);
  }

  // ------------------------------------------------------------------------------------- the curve

  /** Knees carry a concurrency; on an axis of rates the place is the level nearest in output. */
  function kneeAt(sweep, base) {
    const knee = sweep.curve.knee;
    if (!knee) return null;
    if (base.mode === "concurrency") return knee.concurrency;
    if (!knee.output_tokens_per_s) return null;
    const off = base.levels.map((l) => isValid(l)
      ? Math.abs((l.output_tokens_per_s ?? Infinity) - knee.output_tokens_per_s) : Infinity);
    return orNull(base.x.values[off.indexOf(Math.min(...off))]);
  }

  function capacityAt(sweep, base) {
    const capacity = sweep.curve.slo_capacity;
    return capacity ? orNull(base.mode === "rate" ? capacity.rps : capacity.concurrency) : null;
  }

  /** A lower bound where nothing broke the SLO; where nothing surely held it, no bound at all. */
  function leastOf(sweep) {
    const capacity = sweep.curve.slo_capacity;
    if (!capacity || capacity.bracketed) return "";
    return orNull(capacity.lo) === null ? "not surely " : "≥ ";
  }

  /** The knee of a curve that still rises is only known to be no lower. */
  const atLeast = (sweep) => (sweep.curve.saturated === false ? "≥ " : "");

  function marksOf(sweep, base) {
    const [knee, capacity] = [kneeAt(sweep, base), capacityAt(sweep, base)];
    const marks = [];
    const unit = base.mode === "rate" ? " requests/s" : "";
    const least = leastOf(sweep);
    if (knee !== null) {
      const label = `knee ${atLeast(sweep)}${number(knee)}${unit}`;
      marks.push({ x: knee, label, color: "--knee" });
    }
    if (capacity !== null) {
      const label = `SLO capacity ${least}${number(capacity)}${unit}`;
      marks.push({ x: capacity, label, color: "--capacity" });
    }
    return marks;
  }

  function bandsOf(sweep) {
    const capacity = sweep.curve.slo_capacity;
    const [lo, hi] = [orNull(capacity?.lo), orNull(capacity?.hi)];
    if (hi === null) return []; // never broken: the capacity is only known to be at least `lo`
    const known = lo === null ? `below ${number(hi)}` : `between ${number(lo)} and ${number(hi)}`;
    return [{ lo, hi, label: `SLO capacity ${known}` }];
  }

  /** Output tokens/s; for embeddings and reranking, which have none, requests/s. */
  function throughput(base) {
    if (!base.levels.some((l) => l.output_tokens_per_s)) {
      return seriesOf(base, "request_throughput", "requests/s", "--s1",
        (l) => l.request_throughput,
        { width: 2.25, ci: base.levels.map((l) => orNull(l.request_throughput_ci95)) });
    }
    return seriesOf(base, "output_tokens_per_s", "output tokens/s", "--s1",
      (l) => l.output_tokens_per_s,
      { width: 2.25, ci: base.levels.map((l) => orNull(l.output_tokens_per_s_ci95)) });
  }

  function curve(sweep, labels) {
    const base = frame(sweep);
    const rate = throughput(base);
    const marks = marksOf(sweep, base);
    const limit = labels[sweep.curve.limit] ?? sweep.curve.limit;
    const spec = {
      ...base, id: "curve", title: "Throughput", unit: `${rate.label} against load`, tall: true,
      format: "number", series: [rate], marks, bands: bandsOf(sweep), showsMet: true,
      note: limit ? `limit: ${limit}` : "",
    };
    spec.summary = summarize(base, "Throughput", rate, rate.label,
      [...marks.map((m) => m.label), limit && `Limit: ${limit}`]);
    return spec;
  }

  // --------------------------------------------------------------------------------------- latency

  /** p50, p95, p99, and whatever other statistic the SLO speaks of. */
  function statistics(slos) {
    const wanted = new Set(["p50", "p95", "p99", ...slos.map((s) => s.statistic)]);
    return Object.keys(RAMP).filter((name) => wanted.has(name));
  }

  const DASH = { mean: [2, 3], p90: [6, 3], max: [2, 3] };

  function latency(sweep, metric) {
    const base = frame(sweep);
    const [title, short] = METRICS[metric];
    const slos = sweep.slo.filter((s) => s.metric === metric);
    const field = `${metric}_ms`;
    const series = statistics(slos).map((name) =>
      seriesOf(base, name, name, RAMP[name], (l) => l[field]?.[name], { dash: DASH[name] }));
    if (metric === "ttft" && base.mode === "rate") {
      series.push(seriesOf(base, "due_p95", "p95 from due", "--s2",
        (l) => l.ttft_from_due_ms?.p95, { dash: [4, 3] }));
    }
    const bound = (s) => `SLO ${s.statistic} < ${number(s.bound_ms)} ms`;
    const lines = slos.map((s) => ({ y: s.bound_ms, label: bound(s) }));
    const told = series.find((s) => s.key === (slos[0]?.statistic ?? "p95"));
    return {
      ...base, id: metric, title, unit: short, format: "ms", series, lines,
      summary: summarize(base, title, told, "ms", lines.map((l) => l.label)),
    };
  }

  function latencies(sweep) {
    const asked = sweep.slo.map((s) => s.metric);
    const metrics = Object.keys(METRICS).filter(
      (m) => ["ttft", "itl", "e2e"].includes(m) || asked.includes(m));
    return metrics.map((m) => latency(sweep, m));
  }

  // ------------------------------------------------------------------------------ server and power

  function simple(sweep, id, title, unit, format, series, more = {}) {
    const base = frame(sweep);
    const made = series.map(([key, label, color, pick, extra]) =>
      seriesOf(base, key, label, color, pick, extra));
    return { ...base, id, title, unit, format, series: made, ...more,
      summary: summarize(base, title, made[0], unit) };
  }

  function kv(sweep) {
    return simple(sweep, "kv", "KV cache in use", "share of capacity", "ratio", [
      ["kv_usage_mean", "mean", "--s3", (l) => l.server?.kv_usage_mean],
      ["kv_usage_max", "max", "--s3", (l) => l.server?.kv_usage_max, { dash: [2, 3] }],
    ], { y: { max: 1 } });
  }

  function queue(sweep) {
    return simple(sweep, "queue", "Running and waiting", "requests, mean", "number", [
      ["running_mean", "running", "--s1", (l) => l.server?.running_mean],
      ["waiting_mean", "waiting", "--s2", (l) => l.server?.waiting_mean],
    ]);
  }

  /** Watts of all GPUs together; null unless every one of them was read. */
  function watts(level) {
    const read = (level.gpu ?? []).map((g) => orNull(g.power_w_mean));
    return read.length && !read.includes(null) ? sum(read) : null;
  }

  function power(sweep) {
    return simple(sweep, "power", "Power", "W, all GPUs, mean", "watt",
      [["power_w", "power", "--s4", watts]]);
  }

  function energy(sweep) {
    return simple(sweep, "energy", "Energy", "J per output token", "joule",
      [["energy_j_per_output_token", "J per token", "--s4", (l) => l.energy_j_per_output_token]]);
  }

  return {
    curve, latencies, frame, capacityAt, kneeAt, leastOf, atLeast, METRICS,
    places: ({ sweep, labels }) => ({
      curve: [curve(sweep, labels)],
      latency: latencies(sweep),
      server: [kv(sweep), queue(sweep)],
      energy: [power(sweep), energy(sweep)],
    }),
  };
})();
