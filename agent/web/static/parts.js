/* The parts of the agent's page that are no charts, built from its answers. Text is always text. */
"use strict";
window.servefitParts = (() => {
  const { element, number } = window.servefitCharts;
  const { when } = window.servefitViews;
  const words = window.servefitWords;
  const DAYS = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"];
  const UNITS = { concurrency: "requests at once", rps: "requests/s" };

  const known = (value) => value !== null && value !== undefined;
  /** What stands between backticks is code. */
  const prose = (text) => text.split(/`([^`]+)`/).map((part, i) =>
    (i % 2 ? element("code", {}, part) : part));

  /** A name that does not turn round what stands beside it, whichever way it is written. */
  const isolated = (name) => `\u2068${name}\u2069`;

  const percent = (value) => `${number(value * 100)} %`;
  const named = (finding) => words.findings[finding] ?? [finding, "neutral"];

  // --------------------------------------------------------------------------------------- verdict

  /** The one number that decides: demand over capacity, else the capacity. [number, what it is] */
  function decides({ ratio, capacity }) {
    if (ratio) {
      const sure = known(ratio.lo) && known(ratio.hi)
        ? `, between ${percent(ratio.lo)} and ${percent(ratio.hi)} (95 %)` : "";
      return [percent(ratio.value), `of the capacity is asked for${sure}`];
    }
    const value = capacity?.value ?? capacity?.lo;
    if (!known(value)) return null;
    const least = known(capacity.value) ? "" : "≥ ";
    return [`${least}${number(value)}`, `${UNITS[capacity.unit] ?? capacity.unit}: the capacity`];
  }

  /** What to do, with what, what that saves, how sure it is and what it costs now: always open. */
  function advice(rows) {
    if (!rows.length) return [];
    return [element("dl", { class: "advice" }, ...rows.map(([name, text]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, text))))];
  }

  function why(verdict) {
    const { reasons = [], recommendation, missing = [], cost = {} } = verdict;
    const items = [
      ...reasons.map((one) => [words.reasons[one.code] ?? one.code, one.because]),
      ["Confirm with", recommendation?.confirm_with && element("code", {}, recommendation.confirm_with)],
      ["Overturned by", recommendation?.overturned_by],
      ...missing.map((line) => ["Missing", element("span", {}, ...prose(line))]),
      ["Prices (indicative)", cost.prices],
    ].filter(([, text]) => text);
    if (!items.length) return [];
    const list = items.map(([name, text]) =>
      element("li", {}, element("b", {}, `${name}: `), text));
    return [element("details", {}, element("summary", {}, "Why, and what would change it"),
      element("ul", {}, ...list))];
  }

  /** One assessment as a card. */
  function verdictCard({ scope, at_unix_s, verdict, advice: rows }) {
    const [name, tone] = named(verdict.finding);
    const sure = verdict.confidence;
    const limited = sure.limited_by ? `, limited by ${isolated(sure.limited_by)}` : "";
    const number_ = decides(verdict);
    return element("article", { class: `card verdict ${tone}` },
      element("span", { class: "pill finding" }, name), " ",
      element("code", { class: "note" }, verdict.finding), " ",
      element("span", { class: "note" }, scope),
      element("div", { class: "top" },
        element("div", { class: "words" },
          element("p", { class: "sentence" }, verdict.summary),
          element("p", { class: "sure" }, "Confidence ", element("b", {}, sure.level), limited,
            ` · ${when(at_unix_s)}`)),
        ...(number_ ? [element("p", { class: "number" }, element("b", {}, number_[0]),
          element("span", {}, number_[1]))] : [])),
      ...advice(rows), ...why(verdict));
  }

  const SEVERITY = ["bad", "warn", "info", "neutral", "good"];
  const severity = ({ verdict }) => SEVERITY.indexOf(named(verdict.finding)[1]);

  const asked = ({ verdict }) => verdict.ratio?.value ?? -1;

  /** The newest of each scope, the worst and the fullest first. */
  function newest(assessments) {
    const scopes = new Map();
    for (const one of assessments) if (!scopes.has(one.scope)) scopes.set(one.scope, one);
    return [...scopes.values()].sort(
      (a, b) => severity(a) - severity(b) || asked(b) - asked(a));
  }

  const NONE = "No verdict yet: the agent gives one every hour, unless [assess] every says otherwise.";

  const UNFOLDED = 3; // cards of many servers would push the curve out of sight

  /** `4 more: 3 × Right size, 1 × Idle` */
  function more(rest) {
    const counts = new Map();
    for (const { verdict } of rest) {
      const [name] = named(verdict.finding);
      counts.set(name, (counts.get(name) ?? 0) + 1);
    }
    const told = [...counts].map(([name, count]) => `${count} × ${name}`);
    return `${rest.length} more: ${told.join(", ")}`;
  }

  /** A card for each scope, the worst first; of many the others are folded. */
  function verdicts(assessments) {
    const all = newest(assessments);
    if (!all.length) {
      return [element("article", { class: "card verdict neutral" },
        element("p", { class: "sentence" }, NONE))];
    }
    const unfolded = all.length > UNFOLDED + 1 ? UNFOLDED : all.length;
    const cards = all.slice(0, unfolded).map(verdictCard);
    const rest = all.slice(unfolded);
    if (!rest.length) return cards;
    return [...cards, element("details", { class: "more" }, element("summary", {}, more(rest)),
      ...rest.map(verdictCard))];
  }

  // ---------------------------------------------------------------------------------------- tables

  const LONG = 40; // characters of a name that may be broken

  const kindOf = (value) =>
    (typeof value === "string" && value.length > LONG ? { class: "line" } : {});

  const cellOf = (value) =>
    value instanceof Node ? value : document.createTextNode(known(value) ? String(value) : "–");

  /** rows: [[header, cell …] …]; a cell is text, an element, or [class, text]. */
  function table(caption, heads, rows) {
    const made = rows.map(([first, ...rest]) => element("tr", {},
      element("th", { scope: "row", ...kindOf(first) }, cellOf(first)),
      ...rest.map((cell) => (Array.isArray(cell)
        ? element("td", { class: cell[0] }, cellOf(cell[1]))
        : element("td", kindOf(cell), cellOf(cell))))));
    if (!made.length) {
      made.push(element("tr", {}, element("td", { colspan: String(heads.length) }, "none yet")));
    }
    const columns = heads.map((head) => element("th", { scope: "col" }, head));
    return element("table", {},
      element("caption", {}, element("b", {}, caption)),
      element("thead", {}, element("tr", {}, ...columns)), element("tbody", {}, ...made));
  }

  /** `changes`: verdicts in a row that say the same are one, as the last of them said it. */
  function history(changes) {
    const rows = changes.map(({ scope, at_unix_s, since_unix_s, verdicts, verdict }) => {
      const [name, tone] = named(verdict.finding);
      const [since, until] = [since_unix_s, at_unix_s].map(when);
      return [since === until ? since : `${since} to ${until}`, scope,
        element("span", { class: `pill ${tone}` }, name), number(verdicts),
        verdict.ratio ? percent(verdict.ratio.value) : null, verdict.confidence.level,
        ["said", verdict.summary]];
    });
    const heads = ["When", "Of", "Finding", "Verdicts", "Of capacity", "Confidence",
      "As it was said last"];
    return table("What was found, the newest first", heads, rows);
  }

  // ---------------------------------------------------------------------------------------- health

  function state(sampler) {
    if (!sampler) return element("span", { class: "pill neutral" }, "not sampled");
    const [tone, text] = sampler.ok ? ["good", "answers"] : ["bad", "does not answer"];
    return element("span", { class: `pill ${tone}` }, text);
  }

  /** What stands at the top of the page, far above the tables: who or what is not well. */
  function unwell({ samplers, store, outbox }) {
    const silent = samplers.filter((one) => !one.ok).map((one) => one.name);
    const told = silent.length > 2 ? `${silent.length} of ${samplers.length}`
      : silent.map(isolated).join(" and ");
    return [
      told && `${told} ${silent.length > 1 ? "do" : "does"} not answer`,
      (store.error || !store.ready) && "the store is not written",
      outbox.last_error && "nothing is exported",
    ].filter(Boolean).join(" · ");
  }

  const age = (seconds) => (known(seconds) ? `${number(Math.round(seconds))} s ago` : "never");

  function host(url) {
    try {
      return new URL(url).host;
    } catch {
      return null;
    }
  }

  /** A server's name; one without hardware is told as such. */
  function nameOf({ name, simulated }) {
    const badge = element("span", { class: "badge simulated" }, "simulated");
    return simulated ? element("span", {}, name, " ", badge) : name;
  }

  function serverRows({ servers, samplers, gpus }) {
    const names = new Map(gpus.map((gpu) => [gpu.uuid, gpu.name]));
    return servers.map((one) => {
      const sampler = samplers.find(({ name }) => name === one.name);
      const on = one.gpus.map((uuid) => `${names.get(uuid) ?? "GPU"} ${uuid.slice(0, 12)}`);
      return [nameOf(one), state(sampler), host(one.url), one.service, one.model, one.engine,
        ["line", on.join(", ") || null], ["line", one.missing.join(", ") || null]];
    });
  }

  function gpuRows({ servers, gpus }) {
    return gpus.map((gpu) => {
      const on = servers.filter((one) => one.gpus.includes(gpu.uuid)).map((one) => one.name);
      const memory = known(gpu.memory_total_bytes)
        ? `${number(gpu.memory_total_bytes / 2 ** 30)} GiB` : null;
      return [gpu.name, element("code", {}, gpu.uuid), memory, ["line", on.join(", ") || null]];
    });
  }

  function ownRows({ samplers, store, outbox }) {
    const rows = samplers.map((one) => [one.name, state(one), age(one.age_s), number(one.errors),
      ["line", one.line]]);
    const pill = (good) => element("span", { class: `pill ${good ? "good" : "bad"}` },
      good ? "well" : "not well");
    const behind = `${number(store.writer_lag_s)} s behind`;
    rows.push(["store", pill(store.ready && !store.error), behind, number(store.readings_dropped),
      ["line", store.error ?? `${number(store.bytes / 1e6)} MB`]]);
    rows.push(["export", pill(!outbox.last_error), `${number(outbox.pending)} waiting`,
      number(outbox.dropped), ["line", outbox.last_error ?? null]]);
    return rows;
  }

  /** Three tables, and what the agent notes about itself. */
  function health(status) {
    const tables = [
      table("Servers", ["Server", "State", "Address", "Service", "Model", "Engine", "GPUs",
        "Series missing"], serverRows(status)),
      table("GPUs", ["GPU", "UUID", "Memory", "Servers"], gpuRows(status)),
      table("The agent", ["Part", "State", "Newest", "Errors", "Said"], ownRows(status)),
    ];
    const boxes = tables.map((one) => element("div", { class: "card scroll", tabindex: "0",
      role: "region", "aria-label": one.caption.textContent }, one));
    return [...boxes, ...status.notes.map((note) =>
      element("p", { class: "card notice" }, note))];
  }

  // -------------------------------------------------------------------------------------- the week

  const hour = (h) => String(h).padStart(2, "0");

  function weekCell(days, d, h, { rate, unitText, against }) {
    const { value, share, max } = days[d][h];
    const most = known(max) && !rate ? `, at most ${number(max)}` : "";
    const said = share === null ? "not observed"
      : `${number(value)} ${unitText}${most}, ${percent(share)} of ${against}`;
    const place = `${DAYS[d]} ${hour(h)}:00`;
    const cell = element("td", { title: `${place}: ${said}` },
      element("span", { class: "unseen" }, said));
    if (share !== null) cell.dataset.step = share >= 1 && against === "the capacity" ? "over"
      : String(Math.min(9, Math.floor(share * 10)));
    return cell;
  }

  /** `week` of servefitViews; `capacity` null where it is not known. */
  function weekTable({ rate, full, zone, days }, capacity, window_s) {
    const unitText = rate ? "requests/s" : "requests in flight";
    const against = capacity ? "the capacity" : "the busiest hour";
    const full_ = full ? ` (${number(full)} ${unitText})` : "";
    const caption = element("caption", {}, element("b", {}, "Demand by the hour of the week"),
      ` as a share of ${against}${full_}; mean of each hour over ${number(window_s / 86400)} days, `
      + `${zone}. The stronger the colour, the fuller${capacity ? "; red is beyond it" : ""}; grey: not observed.`);
    const heads = Array.from({ length: 24 }, (_, h) => element("th", { scope: "col" }, hour(h)));
    const rows = days.map((cells, d) => element("tr", {},
      element("th", { scope: "row" }, DAYS[d]),
      ...cells.map((_, h) => weekCell(days, d, h, { rate, unitText, against }))));
    const corner = element("td", { class: "corner" });
    return element("table", { class: "week" }, caption,
      element("thead", {}, element("tr", {}, corner, ...heads)), element("tbody", {}, ...rows));
  }

  return { verdicts, newest, history, health, unwell, weekTable, prose, isolated };
})();
