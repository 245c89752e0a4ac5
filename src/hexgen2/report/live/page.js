// The live page: asks for /live/state once a second and shows it. Everything is put in as text, never as markup,
// but for the two pictures that the server draws.

import {Chart, clock, made} from "./charts.js";

const EVERY_MS = 1000, SLOW_MS = 4000, PATIENCE_MS = 8000, MOST_EVENTS = 100;
const KEPT = {fine: 300, coarse: 360}, SPAN = {fine: 300, coarse: 3600};
const KINDS = {down: "lost", up: "back", restart: "restart", failure: "failure", retry: "retry",
  migration: "migration", broken: "broken off", refused: "refused", roles: "role", routes: "routes", plan: "plan"};
const STATUS = {ok: "serving", draining: "draining", unavailable: "nothing serves"};

const at = id => document.getElementById(id);
const keysOn = document.querySelector('meta[name="hexgen2-keys"]').content === "on";
const memory = {began: null, seq: 0, history: {}, events: new Map(), span: "fine", paused: false, timer: null,
  state: null};

// Figures

export function short(value) {
  if (value >= 1e6) return `${(value / 1e6).toPrecision(3)}M`;
  if (value >= 1e4) return `${(value / 1e3).toPrecision(3)}k`;
  if (value >= 100) return value.toFixed(0);
  return String(Number(value.toPrecision(3)));
}

function seconds(value, exact = false) {
  if (value === 0) return "0";
  if (value < 1) return `${Number((value * 1000).toPrecision(exact ? 3 : 2))} ms`;
  return `${Number(value.toPrecision(3))} s`;
}

function bytes(value) {
  const units = ["B/s", "kB/s", "MB/s", "GB/s", "TB/s"];
  let place = 0;
  while (value >= 999.5 && place < units.length - 1) { value /= 1000; place += 1; }
  return `${Number(value.toPrecision(3))} ${units[place]}`;
}

const percent = value => value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)}%`;
const orDash = (value, format) => value === null || value === undefined ? "–" : format(value, true);

// Parts of the page

const charts = [
  [{title: "Requests/s answered", plan: "plan", format: short,
    series: [{key: "throughput_rps", label: "answered", look: "a", area: true}]}, state => state.plan?.throughput_rps],
  [{title: "Output tokens/s", plan: "plan", format: short,
    series: [{key: "output_tokens_per_s", label: "sent", look: "a", area: true}]},
    state => state.plan?.output_tokens_per_s],
  [{title: "Time to first token (TTFT)", plan: "target", format: seconds,
    series: [{key: "ttft_p50_s", label: "P50", look: "a"}, {key: "ttft_p99_s", label: "P99", look: "b"}]},
    state => state.plan?.slo.ttft_s],
  [{title: "Time per output token (TPOT)", plan: "target", format: seconds,
    series: [{key: "tpot_p50_s", label: "P50", look: "a"}, {key: "tpot_p99_s", label: "P99", look: "b"}]},
    state => state.plan?.slo.tpot_s],
  [{title: "Requests in the service", format: short,
    series: [{key: "in_flight", label: "all", look: "a", area: true},
      {key: "queued", label: "waiting in the queue", look: "b"}]}, () => null],
  [{title: "Requests/s not served", format: short,
    series: [{key: "refused_rps", label: "refused", look: "a", area: true},
      {key: "errors_rps", label: "failed", look: "b"}]}, () => null],
].map(([options, level]) => ({chart: new Chart(at("charts"), options), level}));

function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function showFigures(state) {
  const {now, totals, groups, plan} = state, up = groups.filter(group => group.up).length;
  const told = plan?.throughput_rps ? [`${Math.round(100 * now.throughput_rps / plan.throughput_rps)}% of the plan's ${short(plan.throughput_rps)}`] : [];
  if (now.capacity_rps !== null) told.push(`${short(now.capacity_rps)} can be carried`);
  if (plan && plan.best_rps !== null) told.push(`${short(plan.best_rps)} by the best plan`);
  const pairs = [
    ["requests/s", short(now.throughput_rps), told.join(", ")],
    ["output tokens/s", short(now.output_tokens_per_s), plan ? `plan ${short(plan.output_tokens_per_s)}` : ""],
    ["TTFT, median", orDash(now.ttft_p50_s, seconds), `P99 ${orDash(now.ttft_p99_s, seconds)}`],
    ["TPOT, median", orDash(now.tpot_p50_s, seconds), `P99 ${orDash(now.tpot_p99_s, seconds)}`],
    ["in the service", short(now.in_flight), `${short(now.queued)} waiting in the queue`],
    ["groups up", `${up} of ${groups.length}`, `${totals.restarts} restarts`, up < groups.length],
    ["answered", short(totals.answered), `${short(totals.refused)} refused, ${short(totals.errors)} failed`],
    ["rescued", short(totals.retries + totals.migrations),
      `${totals.retries} retried, ${totals.migrations} moved, ${totals.broken_off} broken off`],
  ];
  at("figures").replaceChildren(...pairs.map(([name, value, more, bad]) =>
    made("div", bad ? {class: "bad"} : {}, made("dt", {text: name}), made("dd", {}, value, made("small", {text: more})))));
}

function showPicture(id, markup, words) {
  const place = at(id);
  place.closest("figure").hidden = !markup;
  if (!markup || place.shown === markup) return;
  place.shown = markup;
  const drawn = new DOMParser().parseFromString(markup, "image/svg+xml").documentElement;
  place.replaceChildren(document.importNode(drawn, true));
  if (words.length) at(`${id}-words`).replaceChildren(...words);
}

function showPlan(state) {
  const told = state.groups.some(group => group.share !== null);
  const legend = [
    made("span", {class: "swatch", "aria-hidden": "true"}), "planned share of all requests ",
    made("span", {class: "swatch real", "aria-hidden": "true"}), "what went that way in the last minute"];
  const words = told ? "Groups with their share of the requests of the last minute. " : "No requests yet. ";
  showPicture("flows", state.pictures.flows, [words, ...(state.routes.length ? legend : [])]);
  const roles = ["prefill", "decode", "colocated", "idle"].map(role =>
    made("span", {class: "keyed"}, made("span", {class: `key ${role}`, "aria-hidden": "true"}), role));
  showPicture("network", state.pictures.network, ["Nodes and GPUs:", ...roles.flatMap(role => [" ", role]),
    ". Lines are KV caches as measured, red where a link is full; dashed ones join the stages of a pipeline."]);
}

/** Rows of cells [text, label, class] into a table's body; cells whose text is the same are left alone. */
function fill(body, rows) {
  while (body.rows.length > rows.length) body.lastElementChild.remove();
  rows.forEach((cells, place) => {
    const row = body.rows[place] ?? body.appendChild(made("tr"));
    cells.forEach(({text, label, look, extra}, column) => {
      let cell = row.cells[column];
      if (!cell) {
        cell = row.appendChild(column ? made("td", {class: look, "data-label": label}) : made("th", {scope: "row"}));
      }
      const key = `${text}|${extra?.key ?? ""}`;
      if (cell.shown === key) return;
      cell.shown = key;
      cell.replaceChildren(text, ...(extra ? extra.nodes() : []));
    });
  });
}

function bar(part) {
  const inner = made("span");
  inner.style.width = `${Math.min(100, 100 * part).toFixed(0)}%`;
  return made("span", {class: `bar${part >= 0.97 ? " full" : ""}`, "aria-hidden": "true"}, inner);
}

function showTables(state) {
  const number = (text, label, extra) => ({text, label, look: "number", extra});
  fill(at("groups"), state.groups.map(group => [
    {text: `${group.id} `, extra: {key: group.role, nodes: () => [made("span", {class: `role ${group.role}`, text: group.role})]}},
    {text: group.layout ?? "–", label: ""},
    {text: group.up && !group.tripped ? "up" : "", label: "state", extra: group.up && !group.tripped ? undefined : {
      key: group.reason + group.tripped,
      nodes: () => [made("span", {class: "bad", text: group.up ? "left alone" : "down"}),
        group.up ? " after failures" : ` ${group.reason}`]}},
    number(percent(group.planned_share), "plan"),
    number(percent(group.share), "now"),
    number(short(group.rps) + (group.capacity_rps ? ` of ${short(group.capacity_rps)}` : ""), "req/s"),
    number(short(group.in_flight) + (group.max_batch && group.role !== "prefill" ? ` of ${group.max_batch}` : ""), "running"),
    number(percent(group.kv_used), "KV cache", {key: group.kv_used.toFixed(2), nodes: () => [bar(group.kv_used)]}),
  ]));
  at("routes-section").hidden = !state.routes.length;
  say(at("routes-summary"), `All ${state.routes.length} routes`);
  fill(at("routes"), state.routes.map(route => [
    {text: `${route.from} → ${route.to}`},
    number(percent(route.planned_share), "plan"),
    number(percent(route.share), "now"),
    number(short(route.rps), "req/s"),
    number(orDash(route.kv_bytes_per_s, bytes), "KV caches"),
  ]));
}

function showEvents(events) {
  for (const event of events) memory.events.set(event.id, event);
  const newest = [...memory.events.values()].sort((a, b) => b.at - a.at || b.id - a.id).slice(0, MOST_EVENTS);
  memory.events = new Map(newest.map(event => [event.id, event]));
  if (!events.length && at("events").children.length === newest.length) return;
  at("no-events").hidden = newest.length > 0;
  at("events").replaceChildren(...newest.map(event => made("li", {},
    made("time", {datetime: new Date(event.at * 1000).toISOString(), text: clock(event.at)}),
    made("span", {class: `kind ${event.kind}`, text: KINDS[event.kind] ?? event.kind}),
    made("span", {text: event.text}))));
}

function remember(history) {
  for (const [name, columns] of Object.entries(history)) {
    const rows = memory.history[name] ??= {};
    for (const [column, values] of Object.entries(columns)) {
      rows[column] = [...(rows[column] ?? []), ...values].slice(-KEPT[name]);
    }
  }
}

function showCharts() {
  const rows = memory.history[memory.span];
  if (!rows) return;
  for (const {chart, level} of charts) chart.show(rows, SPAN[memory.span], level(memory.state) ?? null);
}

function show(state) {
  if (memory.began !== state.began) {  // another start of the service: its samples are counted anew
    Object.assign(memory, {began: state.began, history: {}, events: new Map()});
  }
  Object.assign(memory, {seq: state.seq, state});
  remember(state.history);
  say(at("model"), state.model);
  document.title = `${state.model}: ${STATUS[state.status] ?? state.status}`;
  say(at("about"), state.plan ? about(state.plan) : `${state.groups.length} groups`);
  say(at("status"), STATUS[state.status] ?? state.status);
  at("status").className = `state ${state.status}`;
  showFigures(state);
  showPlan(state);
  showCharts();
  showEvents(state.events);
  showTables(state);
}

// The loop

function about(plan) {
  const load = plan.workload === "observed" ? "the load as seen" : plan.workload;
  return `${plan.cluster}, planned for ${load}, $${plan.price_per_hour.toFixed(2)}/h`;
}

function complain(text) {
  at("trouble").hidden = !text;
  say(at("trouble"), text);
}

function askForKey(text) {
  complain(text);
  at("key-form").hidden = false;
  at("main").hidden = true;
  at("status").className = "state";
  say(at("status"), "API key needed");
}

async function look() {
  const key = sessionStorage.getItem("hexgen2-key"), headers = key ? {Authorization: `Bearer ${key}`} : {};
  if (keysOn && !key) return askForKey("");
  // A restart of the service would be asked for samples that it does not have: it gives all of them then.
  const answer = await fetch(`/live/state?pictures=1&after=${memory.seq}`,
    {headers, signal: AbortSignal.timeout(PATIENCE_MS)});
  if (answer.status === 401) {
    sessionStorage.removeItem("hexgen2-key");
    return askForKey("This key is not known here.");
  }
  if (!answer.ok) throw new Error(`the service answers ${answer.status}`);
  const state = await answer.json();
  if (memory.began !== null && memory.began !== state.began && memory.seq) {
    memory.seq = 0;
    return look();
  }
  if (memory.paused) return false;  // while the answer was on its way
  complain("");
  at("key-form").hidden = true;
  at("main").hidden = false;
  show(state);
  return true;
}

async function turn() {
  clearTimeout(memory.timer);
  if (memory.paused || document.hidden) return;
  let wait = EVERY_MS;
  try {
    if (!await look()) return;
  } catch (error) {
    wait = SLOW_MS;
    at("status").className = "state lost";
    say(at("status"), "no connection");
    const since = memory.state ? ` What is shown is from ${clock(memory.state.at)}.` : "";
    complain(`The service does not answer (${error.message}); trying again every ${SLOW_MS / 1000} s.${since}`);
  }
  memory.timer = setTimeout(turn, wait);
}

function pause(on) {
  memory.paused = on;
  at("pause").setAttribute("aria-pressed", on);
  if (on && memory.state) say(at("status"), `paused at ${clock(memory.state.at)}`);
  turn();
}

at("pause").addEventListener("click", () => pause(!memory.paused));
for (const choice of document.getElementsByName("span")) {
  choice.addEventListener("change", () => { memory.span = choice.value; if (memory.state) showCharts(); });
}
at("key-form").addEventListener("submit", event => {
  event.preventDefault();
  sessionStorage.setItem("hexgen2-key", at("key").value.trim());
  at("key").value = "";
  pause(false);
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) turn(); });
turn();
