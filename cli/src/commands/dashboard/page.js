"use strict";
// Text from the cluster is only ever assigned as text, never parsed as HTML.
const byId = id => document.getElementById(id);
const embedded = JSON.parse(byId("state").textContent);
const kinds = {
  Synced: "good", Shadow: "busy", Progressing: "busy", Drifted: "warn", Deviating: "warn", NotExclusive: "warn", PodsNotLocal: "warn",
  Stale: "bad", ApplyFailed: "bad", Absent: "bad", Unknown: "none",
};
// Distinguishes states without colours.
const marks = {
  Synced: "S", Shadow: "H", Progressing: "P", Drifted: "D", Deviating: "V", NotExclusive: "N", PodsNotLocal: "L", Stale: "!",
  ApplyFailed: "×", Absent: "A", Unknown: "?",
};
const final = ["Complete", "Failed", "Aborted", "Superseded"];
const nodes = new Map(), tiles = new Map(), rollouts = new Map();
let filter = "", selected = "", version = 0;

function make(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter(child => child !== null && child !== ""));
  return element;
}
const kind = node => node.outdated ? "none" : kinds[node.state] || "none";
const label = node => `${node.name}: ${node.state}${node.outdated ? ", out of date" : ""}${node.reason && node.reason !== node.state ? ", " + node.reason : ""}`;
function age(time) {
  const now = embedded ? Date.parse(document.body.dataset.time) : Date.now();
  const seconds = Math.max(0, Math.round((now - Date.parse(time)) / 1000));
  if (seconds < 120) return `${seconds} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} d`;
}
function facts(pairs) {
  const list = make("dl");
  for (const [name, value] of pairs) if (value !== "" && value !== undefined && value !== null) list.append(make("dt", {}, name), make("dd", {}, value));
  return list;
}

// The fleet. Only tiles of changed nodes are touched, so that thousands of nodes stay responsive.
function tile(node) {
  const element = tiles.get(node.name) || make("div", { className: "tile", role: "option", id: `n-${node.name}` });
  element.className = `tile ${kind(node)}${node.outdated ? " outdated" : ""}`;
  element.textContent = marks[node.state] || "?";
  element.title = label(node);
  element.setAttribute("aria-label", label(node));
  element.hidden = filter !== "" && filter !== node.state;
  element.dataset.name = node.name;
  return element;
}
function showNodes(update) {
  if (update.complete) {
    nodes.clear();
    rollouts.clear();
  }
  let added = update.complete;
  for (const node of update.nodes) {
    added = added || !nodes.has(node.name);
    nodes.set(node.name, node);
  }
  if (update.complete) for (const name of tiles.keys()) if (!nodes.has(name)) tiles.delete(name);
  for (const node of update.nodes) tiles.set(node.name, tile(node));
  if (added) byId("grid").replaceChildren(...[...tiles.keys()].sort().map(name => tiles.get(name)));
  if (update.nodes.length || added) {
    showStates();
    showProblems();
    if (selected) select(nodes.has(selected) ? selected : "");
  }
}
function showStates() {
  const counts = new Map();
  for (const node of nodes.values()) counts.set(node.state, (counts.get(node.state) || 0) + 1);
  const button = (state, text) => {
    const pressed = filter === state;
    const element = make("button", { type: "button", "aria-pressed": String(pressed) }, state ? make("span", { className: `mark ${kinds[state] || "none"}`, "aria-hidden": "true" }, marks[state] || "?") : "", text);
    element.addEventListener("click", () => {
      filter = pressed ? "" : state;
      for (const node of nodes.values()) tile(node);
      showStates();
      focusState(state);
    });
    element.dataset.state = state;
    return element;
  };
  const order = Object.keys(kinds);
  const states = [...counts.keys()].sort((a, b) => order.indexOf(a) - order.indexOf(b));
  const focused = document.activeElement && document.activeElement.dataset.state;
  byId("states").replaceChildren(button("", `All ${nodes.size}`), ...states.map(state => button(state, `${state} ${counts.get(state)}`)));
  if (focused !== undefined) focusState(focused);
}
function focusState(state) {
  for (const button of byId("states").children) if (button.dataset.state === state) button.focus();
}
function showProblems() {
  const broken = [...nodes.values()].filter(node => !node.ready || node.outdated || node.code).sort((a, b) => a.ready - b.ready || a.name.localeCompare(b.name));
  if (!broken.length) {
    byId("problems").replaceChildren(nodes.size ? make("p", { className: "note" }, "No node has a problem.") : make("p", { className: "note" }, "No rows: the controller creates one for each node."));
    return;
  }
  const head = make("tr", {}, ...["Node", "State", "Code", "Since", "Reason"].map(text => make("th", { scope: "col" }, text)));
  const rows = broken.slice(0, 20).map(node => make("tr", {}, make("th", { scope: "row" }, node.name), make("td", {}, node.outdated ? `${node.state} (out of date)` : node.state), make("td", {}, node.code || ""), make("td", {}, node.since ? age(node.since) : ""), make("td", {}, [node.reason, node.message].filter(Boolean).join(": "))));
  const more = broken.length > 20 ? make("p", { className: "note" }, `and ${broken.length - 20} more`) : "";
  byId("problems").replaceChildren(make("table", {}, make("caption", { className: "note" }, `Problems: ${broken.length}`), make("thead", {}, head), make("tbody", {}, ...rows)), more);
}
function select(name) {
  if (selected && tiles.has(selected)) tiles.get(selected).removeAttribute("aria-selected");
  selected = name;
  const node = nodes.get(name);
  if (!node) {
    byId("grid").removeAttribute("aria-activedescendant");
    byId("node").replaceChildren();
    return;
  }
  const element = tiles.get(name);
  element.setAttribute("aria-selected", "true");
  byId("grid").setAttribute("aria-activedescendant", element.id);
  const behind = node.desired - node.applied;
  byId("node").replaceChildren(make("div", { className: "panel" }, make("h3", {}, node.name), facts([
    ["State", node.outdated ? `${node.state}, out of date: no controller renews the row` : node.state], ["Reason", node.reason], ["Message", node.message],
    ["Code", node.code ? `${node.code} (kubectl switchtower explain ${node.code})` : ""], ["Since", node.since ? age(node.since) : ""],
    ["Generation", behind > 0 ? `${node.applied}, ${behind} behind` : String(node.applied)], ["Settings", node.profile], ["Agent", node.agent], ["Kernel", node.kernel],
  ])));
}
byId("grid").addEventListener("click", event => { if (event.target.dataset.name) select(event.target.dataset.name); });
byId("grid").addEventListener("keydown", event => {
  const shown = [...byId("grid").children].filter(element => !element.hidden);
  if (!shown.length) return;
  const at = shown.findIndex(element => element.dataset.name === selected);
  const columns = Math.max(1, shown.filter(element => element.offsetTop === shown[0].offsetTop).length);
  const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
  let next = at;
  if (event.key in moves) next = at < 0 ? 0 : at + moves[event.key];
  else if (event.key === "Home") next = 0;
  else if (event.key === "End") next = shown.length - 1;
  else return;
  event.preventDefault();
  const element = shown[Math.min(Math.max(next, 0), shown.length - 1)];
  select(element.dataset.name);
  element.scrollIntoView({ block: "nearest" });
});

// Rollouts, running ones first.
function showRollouts(changed) {
  for (const rollout of changed) rollouts.set(rollout.metadata.name, rollout);
  const time = rollout => rollout.metadata.creationTimestamp || "";
  const sorted = [...rollouts.values()].sort((a, b) => ended(a) - ended(b) || time(b).localeCompare(time(a)));
  const focused = document.activeElement && document.activeElement.dataset.action;
  byId("rollouts").replaceChildren(...sorted.slice(0, 10).map(rolloutPanel));
  if (!sorted.length) byId("rollouts").append(make("p", { className: "note" }, "None. The controller creates one when a ProxyProfile changes."));
  if (focused) for (const button of byId("rollouts").querySelectorAll("button")) if (button.dataset.action === focused) button.focus();
}
const ended = rollout => final.includes((rollout.status || {}).state);
function rolloutPanel(rollout) {
  const status = rollout.status || {}, progress = status.progress || {}, name = rollout.metadata.name;
  const panel = make("article", { className: "panel", "aria-label": `Rollout ${name}` }, make("h3", {}, `${name}: ${status.state || "Pending"}`));
  const steps = ((rollout.spec.strategy || {}).steps || []).map((step, at) => {
    const done = at < (progress.stepsDone || 0), current = at + 1 === progress.currentStep && !ended(rollout);
    const text = `${step.name || `step ${at + 1}`}: ${step.nodes}${step.approval ? ", approval" : ""}${done ? " ✓" : ""}`;
    const item = make("li", { className: done ? "done" : "" }, text);
    if (current) item.setAttribute("aria-current", "step");
    return item;
  });
  if (steps.length) panel.append(make("ol", { className: "steps" }, ...steps));
  if (progress.eligibleNodes) panel.append(make("progress", { max: progress.eligibleNodes, value: progress.updatedNodes || 0, "aria-label": "updated nodes" }));
  const ready = (status.conditions || []).find(condition => condition.type === "Ready") || {}, took = status.acknowledgements;
  panel.append(facts([
    ["Revision", `${status.stable || "?"} → ${status.target || "?"}`], ["Nodes", `${progress.updated || "0/0"} updated, ${status.failed || 0} failed`],
    ["Waiting for", status.waitingOn], ["Acknowledged", took ? `median ${took.medianMilliseconds} ms, maximum ${took.slowestMilliseconds} ms (${took.slowestNode})` : ""],
    ["Reason", ready.message],
  ]));
  for (const failure of status.failures || []) panel.append(make("p", {}, `${failure.node}: ${failure.reason}: ${failure.message}`));
  if (!ended(rollout) && !embedded) panel.append(make("div", { className: "actions" }, ...actions(rollout)));
  return panel;
}
function actions(rollout) {
  const name = rollout.metadata.name, waiting = (rollout.status || {}).waitingOn;
  const list = [rollout.spec.paused ? "resume" : "pause"];
  if (waiting === "Approval") list.unshift("approve");
  if (!rollout.spec.abort) list.push("abort");
  return list.map(action => {
    const text = action[0].toUpperCase() + action.slice(1);
    const button = make("button", { type: "button", title: `kubectl switchtower rollout ${action} ${name}`, className: action === "abort" ? "danger" : "" }, text);
    button.setAttribute("aria-label", `${text} rollout ${name}`);
    button.dataset.action = `${action} ${name}`;
    button.addEventListener("click", () => act(name, action, button));
    return button;
  });
}
function confirmed(question) {
  const dialog = byId("confirm");
  byId("question").textContent = question;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise(resolve => dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }));
}
async function act(name, action, button) {
  if (action === "abort" && !await confirmed(`Abort ${name}? Its nodes return to the stable revision. This cannot be undone.`)) return;
  button.disabled = true;
  try {
    const response = await fetch(`rollouts/${encodeURIComponent(name)}/${action}`, { method: "POST", headers: { "x-switchtower-action": "1" } });
    const answer = await response.json();
    byId("outcome").textContent = answer.message || answer.error;
  } catch (error) {
    byId("outcome").textContent = `not performed: ${error.message}`;
  }
  button.disabled = false;
}

// Path of a Service.
byId("ask").addEventListener("submit", async event => {
  event.preventDefault();
  const form = new FormData(event.target), query = new URLSearchParams({ name: form.get("name").trim(), node: form.get("node").trim() });
  byId("answer").replaceChildren(make("p", { className: "note" }, "Asking the controller …"));
  try {
    const answer = await (await fetch(`service?${query}`)).json();
    byId("answer").replaceChildren(...(answer.error ? [make("p", { role: "alert" }, `${answer.code || ""} ${answer.error}`)] : pathPanels(answer)));
  } catch (error) {
    byId("answer").replaceChildren(make("p", { role: "alert" }, `no answer: ${error.message}`));
  }
});
function pathPanels({ explanation, changes }) {
  const panels = explanation.groups.map(group => {
    const who = `${group.nodes} node${group.nodes === 1 ? "" : "s"}: ${group.names.slice(0, 6).join(", ")}${group.nodes > 6 ? ", …" : ""}`;
    return make("section", { className: "panel", "aria-label": who }, make("h3", {}, who), ...group.findings.map(flow));
  });
  if (explanation.notCurrentTotal) panels.push(make("p", {}, `May not apply yet to ${explanation.notCurrent.map(node => node.node).join(", ")}`));
  if (changes.length) {
    const head = make("tr", {}, ...["Change", "50 % of nodes", "99 %", "100 %", "Nodes"].map(text => make("th", { scope: "col" }, text)));
    const ms = value => value === null ? "–" : `${(value / 1000).toFixed(1)} ms`;
    const rows = changes.map(change => make("tr", {}, make("th", { scope: "row" }, change.object), ...[ms(change.half), ms(change.most), ms(change.all), `${change.acknowledged}/${change.eligible}`].map(text => make("td", {}, text))));
    panels.push(make("table", {}, make("caption", { className: "note" }, "Latest changes: time from the API server's event to the nodes' kernels"), make("thead", {}, head), make("tbody", {}, ...rows)));
  }
  return panels;
}
function flow(finding) {
  const box = (title, ...content) => make("div", { className: "box" }, make("strong", {}, title), make("div", {}, ...content));
  const arrow = () => make("div", { className: "arrow", "aria-hidden": "true" }, "→");
  const forwarded = finding.outcome === "forwarded";
  const ends = forwarded ? [box(`${finding.endpoints.length} endpoint${finding.endpoints.length === 1 ? "" : "s"}`, make("ul", {}, ...finding.endpoints.slice(0, 8).map(text => make("li", {}, text)), ...(finding.endpoints.length > 8 ? [make("li", {}, `and ${finding.endpoints.length - 8} more`)] : [])))] : [box({ refused: "Refused", dropped: "Dropped" }[finding.outcome] || "Not served", finding.code || "")];
  const change = [finding.masquerade ? "source address is masqueraded" : "source address is kept", finding.affinitySeconds ? `session affinity ${finding.affinitySeconds} s` : ""].filter(Boolean).join("; ");
  const picture = make("div", { className: "flow" }, box("From", finding.from), arrow(), box(finding.kind, make("code", {}, finding.frontend)), arrow(), ...ends);
  const kernel = finding.kernel ? make("p", { className: "note" }, `Kernel: ${finding.kernel.state}${finding.kernel.detail ? ": " + finding.kernel.detail : ""}`) : "";
  return make("div", { className: `verdict panel ${forwarded ? "" : "lost"}` }, picture, make("p", {}, finding.why), forwarded ? make("p", { className: "note" }, change) : "", kernel);
}

function show(update) {
  version = update.version;
  showNodes(update);
  if (update.complete || update.rollouts.length) showRollouts(update.rollouts);
  byId("problem").hidden = !update.problem;
  byId("problem").textContent = update.problem ? `This page may be out of date: ${update.problem}` : "";
}
async function follow() {
  for (;;) {
    try {
      const response = await fetch(`state?since=${version}`);
      if (!response.ok) throw new Error(`status ${response.status}`);
      show(await response.json());
      byId("connection").textContent = "live";
    } catch (error) {
      byId("connection").textContent = "";
      byId("problem").hidden = false;
      byId("problem").textContent = `This page is not live: kubectl switchtower dashboard does not respond (${error.message}). Start it again and open the address that it prints.`;
      await new Promise(resolve => setTimeout(resolve, 3000));
    }
  }
}
if (embedded) {
  byId("path").hidden = true;
  byId("connection").textContent = `report of ${document.body.dataset.time}`;
  show(embedded);
} else {
  follow();
}
