/* Two sweeps and what changed between them, to descriptions of charts (see charts.js): both curves
   in one, a point for each level of either; and the change of each figure with its interval. */
"use strict";
window.servefitBeside = ({ a, b, pairs, names }) => {
  const { number, wantsLogX } = window.servefitCharts;
  const { frame, capacityAt, kneeAt, leastOf, atLeast, METRICS } = window.servefitSpecs;
  const RUNS = [["A", "--s1"], ["B", "--s2"]];
  const CHANGES = [ // the first of each line that was measured
    ["output_tokens_per_s", "request_throughput"],
    ["ttft_ms.p95", "ttft_ms.mean"],
    ["itl_ms.p95", "tpot_ms.mean"],
    ["e2e_ms.p95", "e2e_ms.mean"],
  ];
  const UNTOLD = "not told from noise";
  const orNull = (value) => value ?? null;

  const sweeps = [a, b];
  const first = frame(a);
  const frames = [first, frame(b, first.mode)];
  const levels = frames.flatMap((one, run) => one.levels.map((level, i) => ({
    run, level, x: one.x.values[i], valid: one.valid[i], note: one.notes[i],
  }))).sort((one, other) => one.x - other.x);
  const unit = first.mode === "rate" ? " requests/s" : "";

  function base() {
    const values = levels.map((one) => one.x);
    return {
      x: { ...first.x, values, log: wantsLogX(values) },
      simulated: frames.some((one) => one.simulated),
      valid: levels.map((one) => one.valid), notes: levels.map((one) => one.note),
      met: levels.map(() => null), showsMet: false, lines: [], marks: [], bands: [],
    };
  }

  /** One run's line; at the other one's levels it has no point. */
  function line(run, key, label, pick, more = {}) {
    const [name, color] = RUNS[run];
    const own = (f) => levels.map((one) => (one.run === run ? orNull(f(one.level)) : null));
    return { key: `${name}_${key}`, label: `${name}: ${label}`, color, values: own(pick), ...more,
      ...(more.ci ? { ci: own(more.ci) } : {}) };
  }

  const both = (make) => RUNS.map((_, run) => make(run));

  function told(spec) {
    const parts = spec.series.map((s) => {
      const known = s.values.filter((value, i) => value !== null && spec.valid[i]);
      if (!known.length) return `${s.label}: no valid measurement`;
      return `${s.label}: ${number(known[0])} at first, ${number(known.at(-1))} at last`;
    });
    const said = [...parts, ...spec.marks.map((mark) => mark.label)].join(". ");
    return `${spec.title}, A and B beside each other. ${said}. The tables hold the numbers.`;
  }

  const withSummary = (spec) => ({ ...spec, summary: told(spec) });

  // ------------------------------------------------------------------------------------ the curves

  /** Where each run's SLO capacity is; where there is none, its knee. */
  function marks() {
    return both((run) => {
      const capacity = capacityAt(sweeps[run], frames[run]);
      const x = capacity ?? kneeAt(sweeps[run], frames[run]);
      const [name, color] = RUNS[run];
      const what = capacity === null ? `knee ${atLeast(sweeps[run])}`
        : `SLO capacity ${leastOf(sweeps[run])}`;
      return { x, label: `${name}: ${what}${number(x)}${unit}`, color };
    }).filter((mark) => mark.x !== null);
  }

  function curve() {
    const tokens = levels.some(({ level }) => level.output_tokens_per_s);
    const [key, label] = tokens
      ? ["output_tokens_per_s", "output tokens/s"] : ["request_throughput", "requests/s"];
    return withSummary({
      ...base(), id: "curve", title: "Throughput", unit: `${label} against load`, tall: true,
      format: "number", marks: marks(),
      series: both((run) => line(run, key, label, (l) => l[key],
        { width: 2.25, ci: (l) => l[`${key}_ci95`] })),
    });
  }

  function latency(metric) {
    const [title, short] = METRICS[metric];
    const field = `${metric}_ms`;
    const slos = a.slo.filter((s) => s.metric === metric && b.slo.some((t) =>
      t.metric === metric && t.statistic === s.statistic && t.bound_ms === s.bound_ms));
    const bound = (s) => `SLO ${s.statistic} < ${number(s.bound_ms)} ms`;
    return withSummary({
      ...base(), id: metric, title, unit: short, format: "ms",
      lines: slos.map((s) => ({ y: s.bound_ms, label: bound(s) })),
      series: ["p50", "p95"].flatMap((name) => both((run) => line(run, name, name,
        (l) => l[field]?.[name], name === "p50" ? { dash: [6, 3] } : {}))),
    });
  }

  // ----------------------------------------------------------------------------------- the changes

  /** Loads of the charts' mode that were measured in both, with what changed there. */
  const common = pairs.filter((pair) => pair.mode === first.mode)
    .sort((one, other) => one.load - other.load);
  const changeOf = (pair, metric) => pair.changes.find((one) => one.metric === metric);

  function change(metrics) {
    const metric = metrics.find((name) => common.some((pair) => changeOf(pair, name)));
    if (!metric) return null;
    const found = common.map((pair) => changeOf(pair, metric));
    const name = names[metric];
    const values = common.map((pair) => pair.load);
    const key = metric.replace(".", "_");
    const series = {
      key, label: "change", color: "--s3", scatter: true,
      values: found.map((one) => orNull(one?.change_percent)),
      ci: found.map((one) => orNull(one?.ci95_percent)),
    };
    const said = found.map((one, i) => (one?.change_percent == null ? null
      : `${number(one.change_percent)} % at ${number(values[i])}${one.distinguishable ? "" : `, ${UNTOLD}`}`));
    return {
      ...base(), x: { ...first.x, values, log: wantsLogX(values) },
      id: `change-${key}`, title: `Change of ${name}`, unit: "B against A, %", format: "change",
      valid: found.map((one) => one?.distinguishable === true),
      notes: found.map((one) => one?.note ?? (one?.p_adjusted == null ? "" : `p ${number(one.p_adjusted)}`)),
      met: values.map(() => null), hollow: UNTOLD,
      lines: [{ y: 0, label: "as A", color: "--ink-3" }], series: [series],
      summary: `Change of ${name}, B against A. ${said.filter(Boolean).join(". ")}.`,
    };
  }

  return {
    curve: [curve()],
    change: CHANGES.map(change).filter(Boolean),
    latency: ["ttft", "itl", "e2e"].map(latency),
  };
};
