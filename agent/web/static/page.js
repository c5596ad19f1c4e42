/* The agent's page: asks for what is shown, shows it, follows the agent's events.

   What is shown stands in the address (`#range=24h&server=chat`), so that a link is a view. A token,
   where the agent wants one, is asked for once and kept for this tab alone. */
"use strict";
(() => {
  const charts = window.servefitCharts;
  const views = window.servefitViews;
  const parts = window.servefitParts;

  /** Steps are those of a tier of the store wherever a range has one: 1 min, 1 h. */
  const RANGES = {
    "15m": { s: 900, step: 5, name: "15 minutes" },
    "1h": { s: 3600, step: 20, name: "1 hour" },
    "6h": { s: 6 * 3600, step: 60, name: "6 hours" },
    "24h": { s: 86400, step: 300, name: "24 hours" },
    "7d": { s: 7 * 86400, step: 3600, name: "7 days" },
    "30d": { s: 30 * 86400, step: 3 * 3600, name: "30 days" },
    "90d": { s: 90 * 86400, step: 6 * 3600, name: "90 days" },
  };
  const DEFAULT_RANGE = "1h";
  const WINDOW = "7d"; // of the curve that production shows, and of the week: takes seconds
  const GLANCE = "1h"; // of the first look at the curve
  const OFTEN_S = 60; // a step may be long, what is newest in it is looked at this often
  const SELDOM_S = 60; // health and verdict
  const RARELY_S = 900; // curve and week
  const AGAIN_S = 10; // what did not come
  const WAIT_MS = [1000, 2000, 5000, 15000, 30000]; // before the events are asked for again
  const SILENT_MS = 15000; // events come every two seconds
  const ANSWER_MS = 30000; // the agent gives up a question after ten seconds

  const byId = (id) => document.getElementById(id);
  const grid = (place) => document.querySelector(`[data-charts="${place}"]`);

  /** What the page knows; replaced as a whole when another view is opened. */
  let view = null;

  // ------------------------------------------------------------------------------------ the address

  function chosen() {
    const given = new URLSearchParams(location.hash.slice(1));
    const range = Object.hasOwn(RANGES, given.get("range")) ? given.get("range") : DEFAULT_RANGE;
    const kind = ["server", "service"].find((name) => given.get(name));
    return { range, who: kind ? { [kind]: given.get(kind) } : {} };
  }

  function link(range, who) {
    return `#${new URLSearchParams({ range, ...who })}`;
  }

  // --------------------------------------------------------------------------------------- to ask

  const TOKEN = "servefit-token";
  let unlocked = null; // a promise while the token is being asked for

  function askForToken(refused) {
    unlocked ??= new Promise((resolve) => {
      const form = byId("lock");
      form.hidden = false;
      byId("token").focus();
      form.onsubmit = (event) => {
        event.preventDefault();
        sessionStorage.setItem(TOKEN, byId("token").value.trim());
        byId("token").value = "";
        form.hidden = true;
        unlocked = null;
        resolve();
      };
    });
    byId("refused").textContent = refused ? "The agent did not take that token." : "";
    return unlocked;
  }

  /** What a browser says of an address that does not answer differs, and tells nobody anything. */
  function silence(error) {
    const late = error.name === "TimeoutError";
    return new Error(late ? `no answer within ${ANSWER_MS / 1000} s` : "the agent does not answer");
  }

  /** The answer to a question; `signal` is made for each attempt. Throws an Error with the agent's
      own line, and its status. */
  async function asked(path, signal = () => AbortSignal.timeout(ANSWER_MS)) {
    for (;;) {
      const token = sessionStorage.getItem(TOKEN);
      const headers = token ? { Authorization: `Bearer ${token}` } : {};
      const answer = await fetch(path, { signal: signal(), headers, cache: "no-store" })
        .catch((error) => { throw silence(error); });
      if (answer.status === 401) {
        await askForToken(token !== null && token === sessionStorage.getItem(TOKEN));
      } else if (answer.ok) {
        return answer;
      } else {
        const said = await answer.json().catch(() => ({}));
        const error = new Error(said.error ?? `${path}: ${answer.status}`);
        throw Object.assign(error, { status: answer.status });
      }
    }
  }

  async function ask(name, parameters = {}) {
    const query = new URLSearchParams(parameters).toString();
    return (await asked(`/api/v1/${name}${query ? `?${query}` : ""}`)).json();
  }

  const troubles = new Map();

  /** One line for each thing that does not come; it goes when that comes again. */
  function trouble(what, error) {
    if (error) troubles.set(what, `${what}: ${error.message}`);
    else troubles.delete(what);
    const line = byId("trouble");
    const text = [...troubles.values()].join(" · ");
    line.hidden = !text;
    if (line.textContent !== text) line.textContent = text; // spoken when it changes
  }

  const missed = (...names) => names.some((name) => troubles.has(name));

  /** Runs `work` for the view of now; what comes for a view that is gone is dropped. */
  async function load(what, work) {
    const mine = view;
    try {
      const show = await work();
      if (mine !== view) return;
      show();
      trouble(what, null);
    } catch (error) {
      if (mine === view) trouble(what, error);
    }
  }

  // ------------------------------------------------------------------------------------- over time

  const aligned = (unix_s, step) => Math.floor(unix_s / step) * step;

  /** All series from an instant on, up to now: two questions, which the store answers side by side. */
  async function table(from, to) {
    const { range, who } = view;
    const halves = await Promise.all([views.OF_SERVERS, views.OF_GPUS].map((names) => ask("table", {
      metrics: names.join(","), from: String(from), to: String(to), step: String(range.step),
      ...who })));
    return { ...halves[0], metrics: Object.assign({}, ...halves.map((half) => half.metrics)) };
  }

  /** The table with its newest steps replaced, and as long as it was asked to be. */
  function spliced(old, fresh, from) {
    const kept = Math.max(0, (fresh.from_s - old.from_s) / old.step_s);
    const drop = Math.max(0, (from - old.from_s) / old.step_s);
    const metrics = Object.fromEntries(Object.entries(old.metrics).map(([name, column]) => {
      const values = [...column.values.slice(0, kept), ...fresh.metrics[name].values];
      return [name, { ...column, values: values.slice(drop) }];
    }));
    return { ...old, from_s: old.from_s + drop * old.step_s, metrics };
  }

  async function series(now, newest = false) {
    const { s, step } = view.range;
    const from = aligned(now - s, step);
    const old = newest ? view.table : null;
    const begin = old ? Math.max(from, aligned(view.drawnAt - OFTEN_S, step) - step) : from;
    const fresh = await table(begin, now);
    const gap = old && fresh.from_s > old.from_s + old.metrics[views.OF_SERVERS[0]].values.length * step;
    return () => {
      view.table = old && !gap ? spliced(old, fresh, from) : fresh;
      view.drawnAt = now;
      const specs = views.timeCharts(view.table, slos(), servers().some((one) => one.simulated));
      for (const spec of specs) charts.show(grid("time"), spec);
      if (view.curves) drawCurve();
    };
  }

  const servers = () => view.status.servers.filter((one) =>
    (view.who.server ?? one.name) === one.name
    && (view.who.service ?? one.service) === one.service);

  /** The SLOs of the servers shown, each once. */
  function slos() {
    const all = servers().flatMap((one) => one.slo);
    return [...new Map(all.map((slo) => [JSON.stringify(slo), slo])).values()];
  }

  // ------------------------------------------------------------------------- verdict, curve, health

  async function verdict() {
    const found = await ask("assessments", { changes: "true", limit: "100", ...view.who });
    return () => {
      const scopes = new Set(view.status.servers.flatMap(({ name, service }) =>
        [scopeOf({ server: name }), scopeOf({ service })]));
      view.assessments = found.filter(({ scope }) => scopes.has(scope));
      unlessSame("verdict", view.assessments, (all) =>
        byId("verdict").replaceChildren(...parts.verdicts(all)));
      unlessSame("history", found, (all) => byId("history").replaceChildren(parts.history(all)));
      if (view.pattern) drawWeek();
    };
  }

  const drawn = new Map();

  /** Draws what is not as it was: who reads, unfolds or chooses is not disturbed every minute. */
  function unlessSame(name, what, draw) {
    const now = JSON.stringify(what);
    if (drawn.get(name) === now) return;
    draw(what);
    drawn.set(name, now);
  }

  /** New content into the boxes that are there: each keeps its focus, and how far it was scrolled. */
  function refill(place, boxes) {
    const old = [...place.children];
    if (old.length !== boxes.length) place.replaceChildren(...boxes);
    else old.forEach((box, i) => box.replaceChildren(...boxes[i].childNodes));
  }

  function drawHealth() {
    const { version, servers: known } = view.status;
    byId("version").textContent = version;
    byId("unwell").textContent = parts.unwell(view.status);
    refill(byId("health"), parts.health(view.status));
    unlessSame("whose", known.map(({ name, service }) => [name, service]), () => offer(known));
    const who = String(new URLSearchParams(view.who));
    if (byId("whose").value !== who) byId("whose").value = who;
  }

  async function status() {
    const found = await ask("status");
    return () => {
      view.status = found;
      setTimeout(drawHealth); // what is asked for next goes out first
    };
  }

  const scopeOf = ({ server, service }) => (service ? `service:${service}` : server);

  /** Whose curve and week are shown: who was chosen, else whom the first verdict is of. Several
      servers together have no curve, unless they are replicas of one service. */
  function subject() {
    if (scopeOf(view.who)) return view.who;
    const [first] = parts.newest(view.assessments ?? []);
    const name = first?.scope ?? view.status.servers[0]?.name;
    if (name?.startsWith("service:")) return { service: name.slice("service:".length) };
    return name ? { server: name } : {};
  }

  function headings() {
    const of = scopeOf(view.about) ? `: ${scopeOf(view.about).replace("service:", "service ")}` : "";
    byId("h-curve").textContent = `Capacity, and where production lives${of}`;
    byId("h-week").textContent = `Hours of the week${of}`;
  }

  /** In flight now: the newest of running and waiting in the table; null where not known. */
  function inFlight() {
    if (scopeOf(view.about) !== scopeOf(view.who) && view.status.servers.length > 1) return null;
    const last = (name) => view.table?.metrics[name].values.findLast((v) => v !== null) ?? null;
    const [running, waiting] = [last("requests_running"), last("requests_waiting")];
    return running === null ? null : running + (waiting ?? 0);
  }

  function drawCurve() {
    charts.show(grid("curve"), views.curveChart(view.curves, view.pattern, inFlight()));
  }

  async function curve(window_ = WINDOW) {
    view.about = subject();
    const found = await ask("curve", { window: window_, ...view.about });
    return () => {
      headings();
      view.curves = found;
      drawCurve();
      const latencies = views.latencyCharts(found);
      if (!latencies.length) charts.clear(grid("latency"));
      for (const spec of latencies) charts.show(grid("latency"), spec);
      byId("curve-note").replaceChildren(...parts.prose(curveNote(found)));
    };
  }

  const KNOWN_BY = {
    source: "handed over as its own", url: "known by its address", model: "known by its model",
  };

  function curveNote({ measured, passive }) {
    const from = measured && `Measured ${views.when(measured.received_unix_s)} with ` +
      `${parts.isolated(measured.sweep.target.model || "an unnamed model")}, ` +
      `${KNOWN_BY[measured.by]}.`;
    const replicas = view.status.servers.filter((one) => one.service === view.about.service).length;
    const one = measured && view.about.service && replicas > 1 ? `It is of one of ${replicas}.` : "";
    return [from || "No sweep was handed over yet: `loadgen sweep URL --agent` measures the curve.",
      one, `Production: ${passive.note}.`].join(" ");
  }

  function drawWeek() {
    const about = (one) => one.scope === scopeOf(view.about);
    const capacity = views.capacityOf(view.assessments?.find(about)?.verdict);
    const week = views.week(view.pattern, capacity);
    byId("week").replaceChildren(parts.weekTable(week, capacity, view.pattern.window_s));
  }

  async function pattern() {
    const found = await ask("pattern", { window: WINDOW, ...view.about });
    return () => {
      view.pattern = found;
      drawWeek();
      if (view.curves) drawCurve();
    };
  }

  /** Asked for together: the agent then reads the week once. */
  const ofTheWeek = () => Promise.all([load("curve", () => curve()), load("week", pattern)]);

  // --------------------------------------------------------------------------------------- choices

  /** The servers and services that can be chosen. */
  function offer(known) {
    const services = [...new Set(known.map((one) => one.service).filter(Boolean))];
    const option = (who, label) =>
      charts.element("option", { value: new URLSearchParams(who) }, label);
    byId("whose").replaceChildren(option({}, "all"),
      ...services.map((name) => option({ service: name }, `service ${name}`)),
      ...known.map(({ name }) => option({ server: name }, name)));
  }

  function offerRanges(range) {
    byId("ranges").replaceChildren(...Object.entries(RANGES).map(([name, { name: label }]) => {
      const node = charts.element("a", { href: link(name, view.who) }, label);
      if (name === range) node.setAttribute("aria-current", "true");
      return node;
    }));
  }

  /** Everything, for the view that the address names. The heavier questions come last. */
  async function open() {
    delete document.documentElement.dataset.seen;
    delete document.documentElement.dataset.ready;
    const { range, who } = chosen();
    const known = view?.status;
    view = { range: RANGES[range], who, status: known, drawnAt: 0, rareAt: 0, seldomAt: 0 };
    const mine = view;
    troubles.clear();
    offerRanges(range);
    await load("status", status);
    if (mine !== view || !view.status) return;
    const now = view.status.now_unix_s;
    Object.assign(view, { rareAt: now, seldomAt: now });
    const first = [
      load("verdict", verdict).then(() => mine === view && load("curve", () => curve(GLANCE))),
      load("series", () => series(now)),
    ];
    await Promise.all(first);
    document.documentElement.dataset.seen = range;
    if (mine === view) await ofTheWeek();
    if (mine !== view) return;
    view.opened = true;
    document.documentElement.dataset.ready = range;
  }

  // ------------------------------------------------------------------------------------------ live

  /** Whether the agent is followed. `error`: why not; how old that makes the page is said. */
  function connection(error) {
    byId("live").className = `badge ${error ? "bad" : "good"}`;
    byId("live").textContent = error ? "not connected" : "live";
    const of = view?.drawnAt ? `; what is shown is of ${views.when(view.drawnAt)}` : "";
    trouble("not connected", error && new Error(error.message + of));
  }

  /** What is new since the last look, and what did not come then; nothing while nobody looks. */
  async function refresh(now) {
    if (document.hidden) return;
    if (!view.status) await open();
    if (!view.opened) return;
    const due = Math.min(view.range.step, OFTEN_S);
    if (now - view.drawnAt >= due * 0.9) await load("series", () => series(now, true));
    if (now - view.seldomAt >= (missed("status", "verdict") ? AGAIN_S : SELDOM_S)) {
      view.seldomAt = now;
      await Promise.all([load("status", status), load("verdict", verdict)]);
    }
    if (now - view.rareAt >= (missed("curve", "week") ? AGAIN_S : RARELY_S)) {
      view.rareAt = now;
      await ofTheWeek();
    }
  }

  /** `promise`, or an Error once it has taken too long: a machine that is gone says no goodbye. */
  function soon(promise) {
    let waiting = null;
    const late = new Promise((_, refuse) => {
      waiting = setTimeout(() => refuse(new Error("the agent has gone silent")), SILENT_MS);
    });
    const told = promise.catch((error) => { throw silence(error); });
    return Promise.race([told, late]).finally(() => clearTimeout(waiting));
  }

  /** Reads server-sent events by hand: an EventSource could not send the token. */
  async function follow() {
    const ended = new AbortController();
    try {
      const answer = await asked("/api/v1/events", () => ended.signal);
      connection(null);
      await read(answer.body.pipeThrough(new TextDecoderStream()).getReader());
    } finally {
      ended.abort();
    }
  }

  async function read(reader) {
    let rest = "";
    for (;;) {
      const { value, done } = await soon(reader.read());
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      const newest = events.findLast((event) => event.startsWith("data: "));
      if (newest) await refresh(JSON.parse(newest.slice(6)).now_unix_s);
    }
  }

  async function followForEver() {
    for (let failed = 0; ; failed += 1) {
      try {
        await follow();
        failed = -1;
      } catch (error) {
        connection(error);
      }
      await new Promise((resolve) => setTimeout(resolve, WAIT_MS[Math.min(failed + 1, 4)]));
    }
  }

  byId("whose").addEventListener("change", (event) => {
    location.hash = link(chosen().range, Object.fromEntries(new URLSearchParams(event.target.value)));
  });
  addEventListener("hashchange", open);
  open().then(followForEver);
})();
