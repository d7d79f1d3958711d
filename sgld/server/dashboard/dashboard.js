// The dashboard: one event stream tells all; what is shown is a function of `requests` and `stats`.
// All text goes in as text, never as HTML: prompts are other people's.

const $ = (id) => document.getElementById(id);
const requests = new Map(); // id to status, as the server tells it, with `heardAt` and `previews`
const views = new Map(); // id to what shows it
let incoming = new Map(); // a snapshot that isn't complete yet
let stats = []; // [time, queued, running, batch size, steps per second, busy]
let server = {};
let shown = null; // the id in the viewer
let source = null;
let isDrawing = false;

const FORM = "sgld.form", NUM_PREVIEWS = 12, RETRY_MS = 2000, CHART_S = 300;
const EXAMPLES = ["a beautiful sunset over the mountains", "a night sky over the sea", "snowy mountains at dawn", "a desert at noon"];
const NAMES = { num_inference_steps: "Steps", guidance_scale: "Guidance", negative_prompt: "Avoid", seed: "Seed", width: "Width", height: "Height", num_frames: "Frames", fps: "Frames per second", priority: "Priority", deadline_s: "Done within (s)", exact: "Exact", num_input_images: "Input pictures" };

function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const isOver = (request) => ["completed", "failed", "cancelled"].includes(request.status);
const setText = (element, text) => { if (element.textContent !== text) element.textContent = text; };
const announce = (text) => { $("announcer").textContent = text; };
const short = (text) => (text.length > 60 ? text.slice(0, 57) + "…" : text);

function seconds(s) {
  if (s < 1) return "less than 1 s";
  if (s < 90) return `${Math.round(s)} s`;
  return s < 5400 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`;
}

function eta(request) {
  if (request.eta_s == null) return "";
  return `${seconds(Math.max(0, request.eta_s - (Date.now() - request.heardAt) / 1000))} left`;
}

function ratio({ width, height }) {
  return width && height ? Math.min(2.2, Math.max(0.5, width / height)) : 1;
}

// What the server tells

function hear(data) {
  const known = requests.get(data.id) ?? { previews: [] };
  requests.set(data.id, { ...known, ...data, heardAt: Date.now() });
  draw();
}

const on = {
  snapshot(data) {
    if (data.part === 0) {
      incoming = new Map();
      if (data.server) server = data.server;
      if (server.fps && !localStorage.getItem(FORM)) setKind("video");
      stats = data.stats;
    }
    for (const request of data.requests) incoming.set(request.id, request);
    if (data.part + 1 < data.num_parts) return;
    const previews = new Map([...requests].map(([id, r]) => [id, r.previews]));
    requests.clear();
    for (const request of incoming.values())
      requests.set(request.id, { ...request, previews: previews.get(request.id) ?? [], heardAt: Date.now() });
    setState("live");
    draw();
  },
  "request.queued": hear,
  "request.started": hear,
  "request.progress": hear,
  "request.preview"(data) {
    const request = requests.get(data.id);
    if (!request) return;
    request.previews[data.output_index] = data.data ?? data.url;
    draw();
  },
  "request.completed"(data) {
    hear(data);
    announce(`Finished: ${short(data.prompt)}`);
  },
  "request.failed"(data) {
    hear(data);
    announce(`Failed: ${short(data.prompt)}: ${data.error?.message ?? ""}`);
  },
  "request.cancelled"(data) {
    hear(data);
    announce(`Cancelled: ${short(data.prompt)}`);
  },
  "server.stats"(data) {
    stats.push([data.time, data.num_queued, data.num_running, data.batch_size, data.steps_per_s, data.busy]);
    stats = stats.filter(([time]) => time > data.time - CHART_S);
    draw();
  },
  "server.shutdown"() { setState("lost", "server is leaving"); },
};

function connect() {
  source?.close();
  source = new EventSource("v1/events");
  for (const [name, handler] of Object.entries(on)) source.addEventListener(name, (event) => handler(JSON.parse(event.data)));
  source.onopen = () => setState("live");
  source.onerror = async () => {
    setState("lost");
    // A browser comes back by itself, unless it was given an answer that is no stream.
    if (source.readyState === EventSource.CLOSED && !(await needsKey())) setTimeout(connect, RETRY_MS);
  };
}

function setState(state, text) {
  $("connection").dataset.state = state;
  setText($("connection"), text ?? { live: "live", lost: "reconnecting", connecting: "connecting" }[state]);
}

async function needsKey() {
  try {
    const state = await (await fetch("login")).json();
    $("logout").hidden = !state.needs_key || !state.logged_in;
    if (!state.logged_in && !$("login").open) $("login").showModal();
    return !state.logged_in;
  } catch {
    return false; // the server isn't there now
  }
}

async function send(method, path, body) {
  const isForm = body instanceof FormData;
  const headers = body && !isForm ? { "content-type": "application/json" } : {};
  const answer = await fetch(path, { method, headers, body: isForm || !body ? body : JSON.stringify(body) });
  const data = await answer.json();
  if (!answer.ok) {
    if (answer.status === 401 && path !== "login") needsKey();
    throw new Error(data.error?.message ?? answer.statusText);
  }
  return data;
}

// What is shown

function draw() {
  if (isDrawing) return;
  isDrawing = true;
  requestAnimationFrame(() => {
    isDrawing = false;
    drawAll();
  });
}

function drawAll() {
  const all = [...requests.values()];
  const running = all.filter((r) => r.status === "running").sort((a, b) => a.started_at - b.started_at);
  const queued = all.filter((r) => r.status === "queued").sort((a, b) => (a.position ?? 1e9) - (b.position ?? 1e9));
  const over = all.filter((r) => r.status === "completed" || r.status === "failed").sort((a, b) => b.ended_at - a.ended_at);
  $("now").hidden = !running.length;
  $("waiting").hidden = !queued.length;
  $("empty").hidden = over.length > 0;
  setText($("queue-count"), String(queued.length));
  show($("running"), running, runningView);
  show($("queue"), queued, queuedView);
  show($("gallery"), over, finishedView);
  for (const id of views.keys()) if (!requests.has(id)) views.delete(id);
  drawStats(running.length + queued.length);
}

/** Make the children of a list those of these requests, in this order; what is there already stays in its place. */
function show(list, wanted, make) {
  const elements = wanted.map((request) => {
    let view = views.get(request.id);
    if (view?.make !== make) views.set(request.id, (view = { make, ...make(request) }));
    view.update?.(request);
    return view.element;
  });
  const keep = new Set(elements);
  for (const child of [...list.children]) if (!keep.has(child)) child.remove();
  elements.forEach((element, i) => { if (list.children[i] !== element) list.insertBefore(element, list.children[i] ?? null); });
}

function cancelButton(request) {
  return h("button", {
    type: "button", className: "cancel", textContent: "Cancel", "aria-label": `Cancel: ${short(request.prompt)}`,
    async onclick(event) {
      event.target.disabled = true;
      try {
        await send("DELETE", `v1/requests/${request.id}`);
        $("prompt").focus({ preventScroll: true });
      } catch (error) {
        announce(error.message);
        event.target.disabled = false;
      }
    },
  });
}

function runningView(request) {
  const tiles = request.outputs.map(() => h("div", { className: "tile" }));
  const grid = h("div", { className: "tiles" }, ...tiles);
  const shape = (width, height) => grid.style.setProperty("--ratio", ratio({ width, height }));
  shape(request.params?.width, request.params?.height);
  const columns = Math.ceil(Math.sqrt(tiles.length));
  grid.style.gridTemplateColumns = `repeat(${columns}, 1fr)`;
  const bar = h("progress", { max: 1, "aria-label": `Progress: ${short(request.prompt)}` });
  const step = h("span"), left = h("span");
  const element = h("article", { className: "card panel", "data-id": request.id }, grid, bar,
    h("div", { className: "text" }, h("p", { className: "prompt", title: request.prompt, textContent: request.prompt || "(no prompt)" }),
      h("div", { className: "meta" }, step, left, cancelButton(request))));
  function update(now) {
    now.previews.forEach((url, i) => {
      if (!url || !tiles[i]) return;
      const onload = (event) => shape(event.target.naturalWidth, event.target.naturalHeight);
      const image = tiles[i].querySelector("img") ?? tiles[i].appendChild(h("img", { alt: `Preview of: ${short(now.prompt)}`, onload }));
      if (image.getAttribute("src") !== url) image.src = url;
    });
    bar.value = now.progress;
    const active = now.outputs.filter((o) => o.status === "running");
    const done = Math.max(0, ...active.map((o) => o.step)), total = Math.max(0, ...active.map((o) => o.num_steps ?? 0));
    const isLater = active.some((o) => o.stage === "postprocess"), word = isLater ? "post-processing" : "step";
    setText(step, total ? (done < total || isLater ? `${word} ${done} of ${total}` : "decoding") : "starting");
    setText(left, eta(now));
  }
  return { element, update };
}

function queuedView(request) {
  const place = h("span", { className: "place" }), left = h("span", { className: "eta" });
  const element = h("li", { "data-id": request.id }, place,
    h("p", { className: "prompt", title: request.prompt, textContent: request.prompt || "(no prompt)" }), left, cancelButton(request));
  return {
    element,
    update(now) {
      setText(place, now.position == null ? "…" : String(now.position + 1));
      place.setAttribute("aria-label", now.position == null ? "waiting" : `place ${now.position + 1}`);
      setText(left, eta(now));
    },
  };
}

function forget(id) {
  requests.delete(id);
  draw();
}

function media(request, url, props = {}) {
  const onerror = () => forget(request.id); // its files were deleted, or have expired
  return request.kind === "video"
    ? h("video", { src: url, muted: true, loop: true, playsInline: true, autoplay: true, onerror, ...props })
    : h("img", { src: url, alt: request.prompt, loading: "lazy", onerror, ...props });
}

const urlsOf = (request) => request.outputs.flatMap((output) => output.urls).map((url) => url.slice(1));

function finishedView(request) {
  const caption = h("p", { className: "prompt", textContent: request.prompt || "(no prompt)" });
  if (request.status === "failed")
    return { element: h("div", { className: "item failed", "data-id": request.id }, h("p", { className: "problem", textContent: `Failed: ${request.error?.message ?? ""}` }), caption) };
  const urls = urlsOf(request);
  const element = h("button", { type: "button", className: "item", "data-id": request.id, "aria-label": `Open: ${short(request.prompt)}`, onclick: () => openViewer(request.id) });
  if (urls.length) element.append(media(request, urls[0]));
  element.append(h("div", { className: "caption" }, caption));
  if (urls.length > 1) element.append(h("span", { className: "badge", textContent: String(urls.length) }));
  return { element };
}

/** What the model can't take isn't asked for; while it is loaded nobody knows. */
function showInputs() {
  const takes = (name) => server.inputs?.includes(name) ?? true;
  $("picture-field").hidden = !takes("image");
  $("mask-field").hidden = !takes("mask_image") || !$("picture").files.length;
}

function drawStats(numMine) {
  showInputs();
  const [, queued = 0, running = 0, batch = 0, steps = 0, busy = 0] = stats.at(-1) ?? [];
  setText($("stat-running"), String(running));
  setText($("stat-queued"), String(queued));
  setText($("stat-steps"), steps.toFixed(steps < 10 ? 1 : 0));
  setText($("stat-batch"), batch ? batch.toFixed(1) : "–");
  setText($("stat-busy"), `${Math.round(busy * 100)}%`);
  setText($("model"), [server.model, server.device].filter(Boolean).join(" · "));
  setText($("version"), server.version ? `sgld ${server.version}` : "");
  document.title = numMine ? `(${numMine}) sgld` : "sgld";
  drawChart();
}

function drawChart() {
  const canvas = $("chart"), width = canvas.clientWidth, height = canvas.clientHeight, scale = devicePixelRatio;
  if (!width) return;
  if (canvas.width !== Math.round(width * scale)) [canvas.width, canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
  const paint = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  paint.setTransform(scale, 0, 0, scale, 0, 0);
  paint.clearRect(0, 0, width, height);
  const top = Math.max(4, ...stats.map((s) => Math.max(s[3], s[1]))), end = stats.at(-1)?.[0] ?? 0, bottom = height - 3;
  const x = (time) => width - ((end - time) / CHART_S) * width, y = (value) => bottom - (value / top) * (bottom - 12);
  paint.font = `11px ${getComputedStyle(document.body).fontFamily}`;
  paint.lineWidth = 1;
  for (const value of [0, top / 2, top]) {
    paint.strokeStyle = colour("--line");
    paint.beginPath();
    paint.moveTo(0, Math.round(y(value)) + 0.5);
    paint.lineTo(width, Math.round(y(value)) + 0.5);
    paint.stroke();
    paint.fillStyle = colour("--muted");
    if (value) paint.fillText(String(+value.toFixed(1)), 2, y(value) - 2);
  }
  const bar = Math.max(1.5, width / CHART_S);
  paint.fillStyle = colour("--glow");
  for (const [time, , , batch] of stats) if (batch) paint.fillRect(x(time) - bar, y(batch), bar + 0.4, bottom - y(batch));
  paint.strokeStyle = colour("--second");
  paint.lineWidth = 1.8;
  paint.beginPath();
  for (const [time, queued] of stats) paint.lineTo(x(time), y(queued));
  paint.stroke();
  const [, queued = 0, running = 0, batch = 0] = stats.at(-1) ?? [];
  canvas.setAttribute("aria-label", `Now ${running} running, ${queued} waiting, ${batch.toFixed(1)} steps share a forward`);
}

// One result, large

function openViewer(id) {
  const request = requests.get(id), urls = urlsOf(request), params = request.params ?? {};
  shown = id;
  $("viewer-media").replaceChildren(...urls.map((url) => media(request, url, { controls: true, loading: "eager" })));
  setText($("viewer-prompt"), request.prompt);
  const rows = Object.entries(params).filter(([name, value]) => name !== "n" || value > 1);
  const took = request.ended_at && request.started_at ? [["Took", seconds(request.ended_at - request.started_at)]] : [];
  const list = [...rows.map(([name, value]) => [NAMES[name] ?? name, typeof value === "object" ? JSON.stringify(value) : String(value)]), ...took, ["Made", new Date(request.ended_at * 1000).toLocaleString()]];
  $("viewer-params").replaceChildren(...list.flatMap(([name, value]) => [h("dt", { textContent: name }), h("dd", { textContent: value })]));
  $("viewer-download").href = urls[0] ?? "";
  $("viewer-download").download = id;
  $("viewer").showModal();
}

function reuse() {
  const { prompt, params, kind } = requests.get(shown), form = $("composer");
  form.reset();
  for (const [name, value] of Object.entries(params)) {
    const field = form.elements[name];
    if (field) field.type === "checkbox" ? (field.checked = value) : (field.value = value);
  }
  if (params.width && params.height) form.elements.size.value = `${params.width}x${params.height}`;
  setKind(kind);
  form.elements.prompt.value = prompt;
  $("more").open = true;
  $("viewer").close();
  form.elements.prompt.focus();
  keepForm();
}

async function remove() {
  const request = requests.get(shown);
  $("viewer").close();
  await send("DELETE", `v1/${request.kind === "video" ? "videos" : "images"}/${request.id}`).catch((error) => announce(error.message));
  forget(request.id);
}

// What is asked

function asked(form) {
  const kind = form.elements.kind.value, fields = { prompt: form.elements.prompt.value };
  const wanted = ["size", "negative_prompt", "num_inference_steps", "guidance_scale", "seed", "priority", "deadline_s", ...(kind === "video" ? ["num_frames", "fps"] : ["n", "output_format"])];
  for (const name of wanted) {
    const field = form.elements[name];
    if (field.value !== "") fields[name] = field.type === "number" ? field.valueAsNumber : field.value;
  }
  if (form.elements.exact.checked) fields.exact = true;
  return { kind, fields: { ...fields, ...(kind === "image" ? { wait: false, num_previews: NUM_PREVIEWS } : { partial_images: NUM_PREVIEWS }) } };
}

async function generate(event) {
  event.preventDefault();
  const { kind, fields } = asked($("composer"));
  const file = $("picture-field").hidden ? null : $("picture").files[0];
  const mask = $("mask-field").hidden || kind === "video" ? null : $("mask").files[0];
  let body = fields;
  if (file) {
    body = new FormData();
    for (const [name, value] of Object.entries(fields)) body.append(name, value);
    body.append(kind === "video" ? "input_reference" : "image", file);
    if (mask) body.append("mask", mask);
  }
  const path = kind === "video" ? "v1/videos" : file ? "v1/images/edits" : "v1/images/generations";
  $("problem").hidden = true;
  $("generate").disabled = true;
  try {
    const request = await send("POST", path, body);
    if (request.outputs && !requests.has(request.id)) hear(request);
    announce(`Accepted: ${short(fields.prompt)}`);
  } catch (error) {
    $("problem").hidden = false;
    $("problem").textContent = error instanceof TypeError ? "The server can't be reached." : error.message;
  } finally {
    $("generate").disabled = false;
  }
}

function setKind(kind) {
  const form = $("composer");
  form.elements.kind.value = form.dataset.kind = kind;
}

function keepForm() {
  const values = Object.fromEntries(new FormData($("composer")));
  localStorage.setItem(FORM, JSON.stringify(values));
}

function recallForm() {
  try {
    const form = $("composer");
    for (const [name, value] of Object.entries(JSON.parse(localStorage.getItem(FORM)) ?? {})) {
      const field = form.elements[name];
      if (field && field.type !== "file") field.type === "checkbox" ? (field.checked = true) : (field.value = value);
    }
    form.dataset.kind = form.elements.kind.value;
  } catch { /* what was kept is of no use */ }
}

function start() {
  const form = $("composer");
  recallForm();
  $("examples").append(...EXAMPLES.map((text) => h("button", { type: "button", textContent: text, onclick: () => { form.elements.prompt.value = text; form.elements.prompt.focus(); keepForm(); } })));
  form.addEventListener("submit", generate);
  form.addEventListener("input", () => { form.dataset.kind = form.elements.kind.value; showInputs(); keepForm(); });
  form.addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit(); });
  $("viewer-close").addEventListener("click", () => $("viewer").close());
  $("viewer").addEventListener("click", (event) => { if (event.target === $("viewer")) $("viewer").close(); });
  $("viewer").addEventListener("close", () => $("viewer-media").replaceChildren());
  $("viewer-reuse").addEventListener("click", reuse);
  $("viewer-delete").addEventListener("click", remove);
  $("login").addEventListener("cancel", (event) => event.preventDefault());
  $("login-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      await send("POST", "login", { key: $("key").value });
      $("key").value = "";
      $("login-problem").hidden = true;
      $("login").close();
      begin();
    } catch (error) {
      $("login-problem").hidden = false;
      $("login-problem").textContent = error.message;
    }
  });
  $("logout").addEventListener("click", async () => {
    await send("DELETE", "login");
    localStorage.removeItem(FORM);
    location.reload();
  });
  setInterval(draw, 1000);
  addEventListener("resize", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  begin();
}

async function begin() {
  if (await needsKey()) return;
  connect();
}

start();
