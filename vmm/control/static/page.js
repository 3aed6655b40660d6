// The status page: what /status/stream says, as it comes. It reads only.

import { latencies, lines } from "/charts.js";
import { bytes, clock, milliseconds, nanoseconds, number, percent, rate } from "/format.js";

const byId = (id) => document.getElementById(id);

function setText(id, text) {
  const element = byId(id);
  if (element.textContent !== text) {
    element.textContent = text;
  }
}

function show(element, visible) {
  element.hidden = !visible;
}

function renderHead(status) {
  document.title = status.name ? `${status.name} · Pageferry` : "Pageferry";
  setText("guest", status.name ?? "");
  setText("machine", `${bytes(status.ramBytes)} RAM · process ${status.pid}`);
  setText("version", status.version);
  setText("run-state", status.runState);
  byId("run-state").dataset.state = status.runState;
}

function renderPhases(phases) {
  const list = byId("phases");
  const key = JSON.stringify(phases);
  if (list.dataset.key === key) {
    return;
  }
  list.dataset.key = key;
  list.replaceChildren(
    ...phases.map((phase) => {
      const item = document.createElement("li");
      item.className = phase.state;
      item.dataset.phase = phase.name;
      item.textContent = phase.label;
      if (phase.state === "now") {
        item.setAttribute("aria-current", "step");
      }
      return item;
    }),
  );
}

function renderProgress(migration) {
  const isSource = migration.role === "source";
  byId("progress").value = migration.progress;
  setText("percent", percent(migration.progress));
  const inPass = isSource && migration.inProgress && migration.pass > 0;
  for (const id of ["pass", "pass-label", "pass-percent"]) {
    show(byId(id), inPass);
  }
  if (inPass) {
    const inPostcopy = migration.status.startsWith("postcopy");
    byId("pass").value = migration.passProgress;
    setText("pass-label", inPostcopy ? "Postcopy" : `Pass ${migration.pass}`);
    setText("pass-percent", percent(migration.passProgress));
  }
  setText("outlook", migration.outlook);
  setText("error", migration.error ?? "");
  show(byId("error"), Boolean(migration.error));
}

function renderMap(migration) {
  const map = byId("map");
  const cells = migration.pageMap;
  while (map.children.length > cells.length) {
    map.lastChild.remove();
  }
  while (map.children.length < cells.length) {
    map.append(document.createElement("i"));
  }
  cells.forEach((part, index) => {
    const cell = map.children[index];
    if (cell.dataset.part !== String(part)) {
      cell.dataset.part = part;
      cell.style.setProperty("--part", `${Math.round(part * 100)}%`);
      cell.title = `Stretch ${index + 1} of ${cells.length}: ${percent(part)}`;
    }
  });
  setText("map-what", migration.role === "source" ? "up to date at the destination" : "received");
}

function renderRates(migration) {
  const isSource = migration.role === "source";
  setText("sent-label", isSource ? "sent" : "received");
  setText("sent-rate", rate(migration.bandwidth));
  setText("dirty-rate", rate(migration.dirtyRate));
  show(byId("dirty-legend"), isSource);
  const points = isSource ? migration.course : migration.course.map((point) => point.slice(0, 2));
  lines(byId("rates"), points, isSource ? ["sent", "dirty"] : ["sent"], rate);
}

function figuresOf(migration) {
  const { ram, "x-postcopy": postcopy, "x-received": received, "x-dirty-log": log, ...rest } = migration.figures;
  const rows = [];
  const add = (label, value, format = number) => {
    if (value !== undefined) {
      rows.push([label, format(value)]);
    }
  };
  add("Downtime", rest.downtime, milliseconds);
  add("Expected downtime", rest["expected-downtime"], milliseconds);
  add("Set-up", rest["setup-time"], milliseconds);
  if (ram) {
    add("Remaining", ram.remaining, bytes);
    add("Transferred", ram.transferred, bytes);
    add("… in precopy", ram["precopy-bytes"], bytes);
    add("… in downtime", ram["downtime-bytes"], bytes);
    add("… in postcopy", ram["postcopy-bytes"], bytes);
    add("Pages sent", ram.normal);
    add("Zero pages", ram.duplicate);
    add("Bitmap syncs", ram["dirty-sync-count"]);
    add("Page requests", ram["postcopy-requests"]);
  }
  if (postcopy) {
    add("Pages sent again", postcopy["resent-pages"]);
    add("Pages discarded", postcopy["discarded-pages"]);
  }
  if (received) {
    add("Pages received", received["normal-pages"]);
    add("Zero pages", received["zero-pages"]);
    add("Faults", received.faults);
    add("Page requests", received.requests);
  }
  add("Dirty log", log?.rung, String);
  return rows;
}

function renderFigures(migration) {
  byId("figures").replaceChildren(
    ...figuresOf(migration).map(([label, text]) => {
      const row = document.createElement("div");
      const term = document.createElement("dt");
      const value = document.createElement("dd");
      term.textContent = label;
      value.textContent = text;
      row.append(term, value);
      return row;
    }),
  );
}

function renderLatency(latency) {
  const visible = Boolean(latency?.count);
  show(byId("latency"), visible);
  if (visible) {
    const [median, p99, maximum] = [latency.median, latency.p99, latency.maximum].map(nanoseconds);
    setText("latency-summary", `${number(latency.count)} faults, median ${median}, 99 % ${p99}, longest ${maximum}`);
    latencies(byId("histogram"), latency.distribution, nanoseconds);
  }
}

function renderMigration(migration) {
  show(byId("no-migration"), !migration);
  for (const section of document.querySelectorAll(".migration")) {
    show(section, Boolean(migration));
  }
  renderLatency(migration?.figures["x-fault-latency"]);
  if (!migration) {
    return;
  }
  setText("title", migration.role === "source" ? "Outgoing migration" : "Incoming migration");
  setText("status", migration.status);
  byId("status").dataset.state = migration.status;
  const elapsed = migration.figures["total-time"];
  setText("elapsed", elapsed === undefined ? "" : milliseconds(elapsed));
  renderPhases(migration.phases);
  renderProgress(migration);
  renderMap(migration);
  renderRates(migration);
  renderFigures(migration);
}

function renderEvents(events) {
  const list = byId("events");
  const key = events.length ? `${events.length} ${events[events.length - 1].time}` : "";
  if (list.dataset.key === key) {
    return;
  }
  list.dataset.key = key;
  const items = [...events].reverse().map((event) => {
    const item = document.createElement("li");
    const time = document.createElement("time");
    const name = document.createElement("b");
    const data = document.createElement("span");
    time.textContent = clock(event.time);
    name.textContent = event.name;
    data.textContent = Object.entries(event.data)
      .map(([label, value]) => `${label} ${typeof value === "object" ? JSON.stringify(value) : value}`)
      .join(", ");
    item.append(time, name, data);
    return item;
  });
  list.replaceChildren(...items);
}

function setLink(up) {
  byId("link").className = up ? "link-up" : "link-down";
  setText("link", up ? "live" : "no connection");
  document.body.classList.toggle("stale", !up);
}

const stream = new EventSource("/status/stream");
stream.addEventListener("error", () => setLink(false));
stream.addEventListener("message", (message) => {
  const status = JSON.parse(message.data);
  setLink(true);
  renderHead(status);
  renderMigration(status.migration);
  renderEvents(status.events);
  document.documentElement.dataset.updates = Number(document.documentElement.dataset.updates ?? 0) + 1;
});
