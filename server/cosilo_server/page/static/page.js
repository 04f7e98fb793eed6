// The status page. Draws what /events says; reads only. Everything that arrives is put in as text, never as HTML.

const PHASES = {
  gathering: "waiting for sites to connect",
  training: "the sites train, each on its own images",
  sharing: "the sites exchange shares of their masks' keys",
  uploading: "updates come in",
  consenting: "the sites agree on whose updates are in the sum",
  revealing: "the sites reveal what opens that sum, and nothing else",
  opening: "the sum is opened and the model takes a step",
  closed: "done",
};
const ENDED = ["closed", "abandoned"];
const DAY_S = 86400, EXPIRY_WARNING_DAYS = 30, EXPIRY_ALARM_DAYS = 7; // as Cosilo's Prometheus alerts have them
const RETRY_MS = 10000, ROUNDS_SHOWN = 20, MARKS_MAX = 160;
const SVG = "http://www.w3.org/2000/svg";

const state = { standing: null, skew_s: 0, histories: new Map(), ages: new Map(), drawn: new Map(), heard: null };
const $ = (id) => document.getElementById(id);
const now_s = () => Date.now() / 1000 + state.skew_s;

// --- making elements ---

function make(space, name, attributes, children) {
  const node = space ? document.createElementNS(space, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes ?? {})) if (value !== null && value !== false) node.setAttribute(key, value);
  node.append(...children.flat().filter((child) => child !== null && child !== ""));
  return node;
}
const h = (name, attributes, ...children) => make(null, name, attributes, children);
const s = (name, attributes, ...children) => make(SVG, name, attributes, children);

// Draws a part again only where what it shows has changed, so that nobody's focus or reading is disturbed.
function draw(id, values, build) {
  const key = JSON.stringify(values);
  if (state.drawn.get(id) === key) return;
  state.drawn.set(id, key);
  $(id).replaceChildren(...[build()].flat().filter((child) => child !== null));
}

// --- words ---

const days = (until_s) => Math.floor((until_s - now_s()) / DAY_S);
const day = (unix_s) => new Date(unix_s * 1000).toISOString().slice(0, 10);
const minute = (unix_s) => new Date(unix_s * 1000).toISOString().slice(0, 16).replace("T", " ") + " UTC";
const number = (value) => (value === null ? "" : Number(value.toPrecision(4)).toString());
const count = (n, one, many = one + "s") => `${n} ${n === 1 ? one : many}`;

function bytes(n) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (n < 999.5) return `${unit === "B" || n >= 99.5 ? Math.round(n) : n.toPrecision(2)} ${unit}`;
    n /= 1000;
  }
  return `${n.toPrecision(3)} TB`;
}

function span(seconds) {
  if (seconds < 9.95 && !Number.isInteger(seconds)) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min`;
  return seconds < 2 * DAY_S ? `${Math.floor(seconds / 3600)} h` : `${Math.floor(seconds / DAY_S)} days`;
}

// A text that counts on: "34 s", "5 min". The clock below keeps it right.
const since = (then_s) => span(Math.max(0, Math.floor(now_s() - then_s)));
const elapsed = (then_s, after = "") => h("span", { class: "number", "data-since": then_s, "data-after": after }, since(then_s) + after);

function certificate(until_s) {
  if (until_s === null) return h("span", { class: "quiet" }, "certificate not seen yet");
  const left = days(until_s), when = `${day(until_s)}`;
  if (left < 0) return h("span", { class: "bad" }, `✗ certificate expired ${when}`);
  if (left < EXPIRY_ALARM_DAYS) return h("span", { class: "bad" }, `✗ certificate ends ${when}, in ${count(left, "day")}`);
  if (left < EXPIRY_WARNING_DAYS)
    return h("span", { class: "bad" }, `⚠\uFE0E certificate ends ${when}, in ${count(left, "day")}; it should have renewed itself`);
  return h("span", { class: "quiet" }, `certificate until ${when} (${count(left, "day")})`);
}

// --- the federation ---

function glance(standing) {
  const there = standing.sites.filter((site) => site.connected).length;
  const low = standing.disk_free_bytes < standing.disk_free_bytes_min;
  const running = standing.runs.filter((run) => run.state === "running").length;
  return h("dl", { class: "tiles" },
    h("div", {}, h("dt", {}, "Sites connected"), h("dd", {}, `${there} of ${standing.sites.length}`)),
    h("div", {}, h("dt", {}, "Runs in a round"), h("dd", {}, `${running} of ${standing.runs.length + standing.runs_left_out}`)),
    h("div", {}, h("dt", {}, "Disk free"), h("dd", { class: low && "bad" }, `${low ? "✗ " : ""}${bytes(standing.disk_free_bytes)}`,
      low ? h("small", {}, `less than the ${bytes(standing.disk_free_bytes_min)} that are never used`) : "")),
    h("div", {}, h("dt", {}, "Coordinator"), h("dd", {}, h("small", {}, certificate(standing.certificate_expires_unix_s)))));
}

function sites(standing) {
  if (!standing.sites.length) return h("p", {}, "No site is a member yet. ", h("code", {}, "cosilo site invite NAME"), " makes an invitation.");
  return h("ul", { class: "lines", "aria-label": "Sites" }, standing.sites.map((site) => h("li", {},
    h("strong", {}, site.site),
    h("span", { class: "state" }, site.connected ? "● connected"
      : site.last_seen_unix_s === null ? "○ never connected"
      : h("span", { class: "bad" }, "○ gone, last seen ", elapsed(site.last_seen_unix_s, " ago"))),
    certificate(site.certificate_expires_unix_s))));
}

function runs(standing, shown) {
  if (!standing.runs.length) return h("p", {}, "There is no run yet. ", h("code", {}, "cosilo run create FILE"), " makes one.");
  return [...standing.runs.map((run) => h("a", { href: `#${run.run}`, "aria-current": run.run === shown?.run && "true" },
    h("b", {}, run.name), ` ${run.run.slice(0, 12)}: ${runWords(run)}`)),
    standing.runs_left_out ? h("p", { class: "quiet" }, `and ${standing.runs_left_out} older; cosilo run list has them`) : null];
}

const STATES = { running: "► running", waiting: "… waiting", stopped: "■ stopped", paused: "‖ paused", idle: "● idle" };
const runWords = (run) => `${STATES[run.state] ?? run.state}, ${run.rounds_closed} of ${count(run.rounds_wanted, "round")} closed`;

// --- one run ---

function about(run) {
  const failed = run.current?.phase === "abandoned";
  const note = run.note.startsWith(`round ${run.current?.round} was abandoned`) && failed ? "" : run.note;
  return [
    h("p", {}, `${runWords(run)}. ${run.participants.length} participants, ${run.parameters.toLocaleString("en")} parameters. `,
      run.masked ? "Sums are masked: no site's update can be read."
        : h("span", { class: "bad" }, `✗ ${run.aggregation}: the coordinator can read each site's update.`)),
    note ? h("p", { class: "notice" }, note) : null,
  ];
}

function round(run) {
  const current = run.current;
  if (!current) return h("p", { class: "quiet" }, "No round yet.");
  const kind = current.kind === "train" ? "" : ` (${current.kind})`;
  const attempt = current.attempt > 1 ? `, attempt ${current.attempt}` : "";
  const failed = current.phase === "abandoned";
  const over = ENDED.includes(current.phase);
  const steps = run.phases.map((phase) => {
    const at = run.phases.indexOf(failed ? current.failed_in : current.phase), place = run.phases.indexOf(phase);
    if (current.phase === "closed" || place < at) return [phase, "done", "✓", "done"];
    if (place === at) return failed ? [phase, "failed", "✗", "abandoned here"] : [phase, "now", "►", "now"];
    return failed ? [phase, "skipped", "–", "not reached"] : [phase, "todo", "○", "to come"];
  });
  return [
    h("h3", {}, `Round ${current.round}${kind}: ${current.phase}${attempt}`),
    failed ? h("p", { class: "notice bad" },
      `✗ Abandoned${current.failed_in ? ` while ${current.failed_in}` : ""}: ${current.reason || "no reason given"}`) : null,
    h("ol", { class: "steps", "aria-label": "Phases of the round" }, steps.map(([phase, kind, mark, words]) =>
      h("li", { class: kind, "aria-current": kind === "now" && "step" },
        h("span", { class: "mark", "aria-hidden": "true" }, mark), phase, h("span", { class: "unseen" }, `: ${words}`)))),
    over ? h("p", { class: "quiet" }, `${minute(current.started_unix_s)}, took ${span(current.seconds)}. `,
      current.phase === "closed" ? `${current.survivors} of ${count(current.invited, "invited site")} in the sum. ${current.note}` : "")
      : h("p", {}, `Since `, elapsed(current.started_unix_s), `: ${PHASES[current.phase] ?? ""}. ${count(current.invited, "site")} invited.`),
    current.sites.length ? h("ul", { class: "lines", "aria-label": "Sites in this round" }, current.sites.map((site) => siteLine(site))) : null,
  ];
}

function siteLine(site) {
  const percent = site.tenths * 10, busy = site.connected && !site.delivered && !["idle", "waiting"].includes(site.activity);
  const [mark, words, bad] = site.declined ? ["✗", `declined: ${site.declined}`, true]
    : site.late ? ["✗", "left out: no progress", true]
    : !site.connected ? ["○", "not connected", true]
    : site.delivered ? ["✓", "delivered", false]
    : busy ? ["►", `${site.activity} ${percent} %`, false] : ["○", site.activity, false];
  return h("li", {},
    h("strong", {}, site.site),
    h("span", { class: bad ? "state bad" : "state" }, h("span", { class: "mark", "aria-hidden": "true" }, mark), words),
    h("progress", { max: 10, value: site.delivered ? 10 : busy ? site.tenths : 0, "aria-label": `${site.site}: ${words}` }),
    h("span", { class: "amount quiet number" }, site.bytes ? bytes(site.bytes) : ""));
}

// --- what the run has behind it ---

function curve(history, width) {
  const measured = (key) => history.rounds.filter((one) => one[key] !== null).map((one) => [one.round, one[key]]);
  const lines = { heldout: measured("heldout"), train: measured("train") };
  const points = [...lines.heldout, ...lines.train];
  if (!points.length) return null;
  const tall = 220, left = 52, right = 16, top = 30, bottom = 28;
  const xs = history.rounds.map((one) => one.round), ys = points.map((point) => point[1]);
  const x0 = Math.min(...xs), x1 = Math.max(...xs), low = Math.min(...ys), high = Math.max(...ys);
  const pad = (high - low || Math.abs(high) || 1) * 0.08;
  const x = (value) => left + ((value - x0) / (x1 - x0 || 1)) * (width - left - right);
  const y = (value) => top + ((high + pad - value) / (high - low + 2 * pad)) * (tall - top - bottom);
  const title = (at, words) => s("title", {}, `round ${at}${words}`);
  const marks = {
    heldout: ([at, loss]) => s("circle", { class: "heldout", cx: x(at), cy: y(loss), r: 4 }, title(at, `: held-out loss ${number(loss)}`)),
    train: ([at, loss]) =>
      s("rect", { class: "train", x: x(at) - 4, y: y(loss) - 4, width: 8, height: 8 }, title(at, `: training loss ${number(loss)}`)),
  };
  const line = (key) => [
    s("polyline", { class: key, points: lines[key].map(([at, loss]) => `${x(at).toFixed(1)},${y(loss).toFixed(1)}`).join(" ") }),
    ...(points.length <= MARKS_MAX ? lines[key].map(marks[key]) : []),
  ];
  const grid = (value) => [
    s("line", { class: "axis", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
    s("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, number(value)),
  ];
  const last = (key) => (lines[key].length ? number(lines[key].at(-1)[1]) : "none");
  const words = `Loss by round. Last held-out loss ${last("heldout")}, last training loss ${last("train")}; the table below has every round.`;
  return [
    h("h3", {}, "Loss by round"),
    h("figure", {},
      s("svg", { viewBox: `0 0 ${width} ${tall}`, height: tall, role: "img", "aria-label": words },
        grid(low), high > low ? grid(high) : [],
        s("text", { x: left, y: tall - 8 }, `round ${x0}`),
        x1 > x0 ? s("text", { x: width - right, y: tall - 8, "text-anchor": "end" }, `round ${x1}`) : [],
        history.rounds.filter((one) => one.phase === "abandoned").map((one) =>
          s("text", { x: x(one.round), y: tall - bottom + 2, "text-anchor": "middle" }, "✗", title(one.round, ` was abandoned: ${one.reason}`))),
        line("train"), line("heldout"), s("text", { class: "heldout", x: left, y: 18 }, "●— held-out"),
        s("text", { class: "train", x: left + 100, y: 18 }, "■- - training")),
      h("figcaption", {}, "Means over all sites of a round's sum; the held-out loss is that of the weights the round began with. ✗: abandoned.")),
  ];
}

const grids = (history) => !history.grids.length ? null : [
  h("h3", {}, "Samples drawn"),
  h("ul", { class: "grids" }, history.grids.map((grid) => h("li", {}, h("figure", {},
    h("a", { href: `grids/${grid.digest}.png` },
      h("img", { src: `grids/${grid.digest}.png`, loading: "lazy", alt: `Sample grid after round ${grid.round}, a row a class` })),
    h("figcaption", {}, `after round ${grid.round}, drawn ${minute(grid.drawn_unix_s)}`))))),
];

function rounds(history) {
  if (!history.rounds.length) return null;
  const columns = ["Round", "Kind", "Outcome", "Sites", "Took", "Held-out", "Training", "Down", "Up"];
  const cell = (label, words, kind = "number") =>
    h("td", { role: "cell", "data-label": label, class: words === "" ? "empty" : kind }, words);
  const row = (one) => {
    const failed = one.phase === "abandoned";
    const outcome = failed ? `✗ abandoned: ${one.reason || "no reason given"}` : `✓ closed${one.note ? `: ${one.note}` : ""}`;
    return h("tr", { role: "row" },
      cell("Round", `${one.round}`), cell("", one.kind), cell("", outcome, failed ? "outcome bad" : "outcome"),
      cell("Sites", `${one.survivors} of ${one.invited}`), cell("Took", span(one.seconds)),
      cell("Held-out", number(one.heldout)), cell("Training", number(one.train)),
      cell("Down", bytes(one.bytes_down)), cell("Up", bytes(one.bytes_up)));
  };
  return [
    h("h3", {}, history.rounds.length > ROUNDS_SHOWN ? `The last ${ROUNDS_SHOWN} rounds` : "Rounds"),
    h("table", { role: "table" },
      h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, columns.map((name) => h("th", { role: "columnheader", scope: "col" }, name)))),
      h("tbody", { role: "rowgroup" }, history.rounds.slice(-ROUNDS_SHOWN).reverse().map(row))),
  ];
}

// --- putting it together ---

function selected(standing) {
  const wanted = standing.runs.find((run) => run.run === location.hash.slice(1));
  return wanted ?? standing.runs.find((run) => run.state === "running") ?? standing.runs[0] ?? null;
}

function redraw() {
  const standing = state.standing;
  if (!standing) return;
  const run = selected(standing);
  $("federation").textContent = standing.federation;
  const words = run?.current ? `${run.name} round ${run.current.round} ${run.current.phase}` : "Cosilo";
  document.title = `${standing.federation}: ${words}`;
  const today = Math.floor(now_s() / 3600);
  draw("glance", [standing.sites, standing.runs, standing.disk_free_bytes, standing.certificate_expires_unix_s, today], () => glance(standing));
  draw("sites", [standing.sites, today], () => sites(standing));
  draw("runs", [standing.runs.map((one) => [one.run, one.name, runWords(one)]), standing.runs_left_out, run?.run], () => runs(standing, run));
  $("run-title").textContent = run ? `Run ${run.name}` : "";
  draw("run", run && { ...run, current: [run.current?.round, run.current?.phase] }, () => (run ? about(run) : null));
  draw("round", run && [run.current, run.phases], () => (run ? round(run) : null));
  const history = run && state.histories.get(run.run);
  const width = Math.max(280, $("curve").clientWidth);
  for (const [id, build] of Object.entries({ curve, grids, rounds }))
    draw(id, [history?.rounds, history?.grids, id === "curve" && width], () => (history ? build(history, width) : null));
  if (run) remember(run);
}

// Fetches a run's past where it has grown: a round ended, a grid was drawn.
async function remember(run) {
  const age = JSON.stringify([run.current?.round, ENDED.includes(run.current?.phase), run.grids]);
  if (state.ages.get(run.run) === age) return;
  state.ages.set(run.run, age);
  try {
    const answer = await fetch(`runs/${run.run}.json`);
    if (!answer.ok) throw new Error(answer.statusText);
    state.histories.set(run.run, await answer.json());
    redraw();
  } catch {
    setTimeout(() => { state.ages.delete(run.run); redraw(); }, RETRY_MS);
  }
}

function listen() {
  const events = new EventSource("events");
  events.addEventListener("standing", (event) => {
    state.standing = JSON.parse(event.data);
    state.skew_s = state.standing.now_unix_s - Date.now() / 1000;
    state.heard = now_s();
    document.querySelector("main").hidden = false;
    $("link").textContent = "● live";
    $("link").className = "";
    redraw();
  });
  events.onerror = () => {
    const seen = state.heard ? `what you see is from ${minute(state.heard)}` : "trying again …";
    $("link").textContent = `✗ no connection to the coordinator; ${seen}`;
    $("link").className = "bad";
    if (events.readyState === EventSource.CLOSED) setTimeout(listen, RETRY_MS);
  };
}

setInterval(() => {
  for (const node of document.querySelectorAll("[data-since]")) node.textContent = since(node.dataset.since) + node.dataset.after;
}, 1000);
addEventListener("hashchange", redraw);
addEventListener("resize", redraw);
listen();
