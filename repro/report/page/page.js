"use strict";
// The timeline: canvas lanes that are drawn only where they are looked at, so that hundreds of ranks stay fluent.
(() => {
  const facts = JSON.parse(document.getElementById("facts").textContent);
  document.querySelectorAll("[data-copy]").forEach((button) => {
    button.addEventListener("click", async () => {
      const text = button.previousElementSibling.textContent;
      try { await navigator.clipboard.writeText(text); } catch { getSelection().selectAllChildren(button.previousElementSibling); return; }
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  });
  if (!facts.ranks.length || typeof DecompressionStream === "undefined") return; // the static picture stays

  const $ = (id) => document.getElementById(id);
  const tool = $("tool"), view = $("view"), canvas = $("lanes"), tall = $("tall"), overview = $("overview"), detail = $("detail");
  const KIND = 0, NAME = 1, GROUP = 2, LAYER = 3, NOTE = 4, SITE = 5, NEVER = 0xffffffff;
  const AXIS = 24, MOST_IN_OVERVIEW = 128;
  const end = facts.end, lanes = new Map(), pending = new Map();
  const groupNumber = new Map(facts.groups.map((name, k) => [name, k % 6]));
  const culprits = new Set(facts.culprits);
  const marks = new Map(facts.marks.map(([rank, group, seq]) => [rank, { group, seq }]));
  const hidden = new Set();
  const rank0 = facts.ranks.length > 64 ? 16 : facts.ranks.length > 16 ? 20 : 30;
  const text = facts.labels.map((l) => l.join(" ").toLowerCase());
  let matching = null, shown = facts.ranks.slice(), a = facts.window[0], b = Math.max(facts.window[1], a + 1);
  let selected = null, colours = {}, hatch = null, queued = false, width = 0, height = 0, gutter = 74, right = 8;
  document.body.classList.add("interactive");
  tool.hidden = false;

  // -- lanes ---------------------------------------------------------------------------------------------------------
  function load(rank) {
    if (!pending.has(rank)) pending.set(rank, unpack(rank));
    return pending.get(rank);
  }
  async function unpack(rank) {
    const coded = atob($("lane" + rank).textContent);
    const bytes = new Uint8Array(coded.length);
    for (let i = 0; i < coded.length; i++) bytes[i] = coded.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const all = new Uint32Array(await new Response(stream).arrayBuffer());
    const n = all.length / 5;
    const column = (k) => all.subarray(k * n, (k + 1) * n);
    const lane = { start: new Float64Array(n), length: column(1), label: column(2), seq: column(3), step: column(4), calls: [], asyncs: [], others: [], local: [], held: [], steps: [], walk: [] };
    for (let i = 0, t = 0; i < n; i++) {
      lane.start[i] = t += all[i];
      const kind = facts.labels[lane.label[i]][KIND];
      if (kind === "lock" || kind === "build") lane.local.push(i);
      if (kind === "held") lane.held.push(i);
      if (kind === "call" || kind === "async" || kind === "lock" || kind === "build") lane.walk.push(i); // by when they begin
      (kind === "call" ? lane.calls : kind === "async" ? lane.asyncs : kind === "step" ? lane.steps : lane.others).push(i);
    }
    lanes.set(rank, lane);
    return lane;
  }
  const stop = (lane, i) => (lane.length[i] === NEVER ? end : lane.start[i] + lane.length[i]);
  function firstAfter(lane, list, t) { // the first place in a list of spans that begins at t or later
    let low = 0, high = list.length;
    while (low < high) { const mid = (low + high) >> 1; if (lane.start[list[mid]] < t) low = mid + 1; else high = mid; }
    return low;
  }

  // -- drawing -------------------------------------------------------------------------------------------------------
  function readColours() {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["ink", "on", "dim", "paper", "lane", "grid", "phase", "lock", "build", "stall", "bad", "mark", "line", "g0", "g1", "g2", "g3", "g4", "g5"])
      colours[name] = style.getPropertyValue("--" + name).trim();
    const tile = document.createElement("canvas"); tile.width = tile.height = 8;
    const pen = tile.getContext("2d"); pen.strokeStyle = colours.stall; pen.lineWidth = 1.6;
    for (const x of [-8, 0, 8]) { pen.beginPath(); pen.moveTo(x, 8); pen.lineTo(x + 8, 0); pen.stroke(); }
    hatch = pen.createPattern(tile, "repeat");
  }
  const colourOf = (label) => label[KIND] === "call" || label[KIND] === "async" ? colours["g" + (groupNumber.get(label[GROUP]) ?? 0)]
    : label[KIND] === "build" ? colours.build : label[KIND] === "phase" ? colours.phase : colours.lock;
  const layerOf = (label) => (label[KIND] === "call" || label[KIND] === "async" ? "group " + label[GROUP] : label[KIND] === "held" ? "lock" : label[KIND]);
  const stuckIn = (label, seq) => label[KIND] === "lock" ? `waits for lock ${label[NAME]}` : label[KIND] === "build" ? `builds ${label[NAME]}` : `waits in ${label[GROUP]} ${label[NAME]} #${seq} ${label[LAYER]}`;
  const nodeColours = () => ["#7d5fd3", "#c07a1a", "#1f8fa3", "#b8478a"];

  function row(pen, lane, y, tallness, from, to, left, room, words) {
    const scale = room / (to - from), at = (t) => left + (t - from) * scale;
    const spans = (list, top, high) => {
      let k = Math.max(0, firstAfter(lane, list, from) - (list === lane.calls ? 2 : 64)), last = -1e9;
      let begun = 0, colour = null, faint = false; // neighbours of one colour, too narrow to tell apart, are one bar
      const flush = () => { if (colour) { pen.globalAlpha = faint ? 0.12 : 1; pen.fillStyle = colour; pen.fillRect(begun, top, Math.max(last - begun, 0.8), high); colour = null; } };
      for (; k < list.length; k++) {
        const i = list[k];
        if (lane.start[i] > to) break;
        const over = stop(lane, i);
        if (over < from) continue;
        const label = facts.labels[lane.label[i]];
        if (hidden.has(layerOf(label))) continue;
        const x1 = Math.max(at(lane.start[i]), left), x2 = Math.min(at(over), left + room), wide = Math.max(x2 - x1, 0.8);
        const never = lane.length[i] === NEVER && facts.stuck && label[KIND] !== "held", dim = Boolean(matching && !matching[lane.label[i]]);
        if (wide < 2.5 && !never) {
          if (x2 < last + 0.5 && !matching) { // nothing more to see before the next pixel: jump there
            const next = firstAfter(lane, list, from + (last + 0.5 - left) / scale);
            if (next > k + 1) k = next - 2;
            continue;
          }
          const tone = colourOf(label);
          if (tone !== colour || dim !== faint || x1 > last + 0.7) { flush(); begun = x1; colour = tone; faint = dim; }
          last = Math.max(last, x1 + wide);
          continue;
        }
        flush();
        pen.globalAlpha = dim ? 0.12 : 1;
        pen.fillStyle = colourOf(label);
        if (never && tallness > 6) {
          pen.globalAlpha *= 0.25; pen.fillRect(x1, top, wide, high);
          pen.globalAlpha = dim ? 0.15 : 0.7; pen.fillStyle = hatch; pen.fillRect(x1, top, wide, high);
          pen.globalAlpha = 1; pen.strokeStyle = colours.stall; pen.lineWidth = 1; pen.strokeRect(x1 + 0.5, top + 0.5, wide - 1, high - 1);
        } else { if (never) pen.fillStyle = colours.stall; pen.fillRect(x1, top, wide - (wide > 3 ? 0.6 : 0), high); }
        if (words && wide > 46 && high > 10) {
          const both = `${label[NAME]} ${label[LAYER]}`, told = never ? stuckIn(label, lane.seq[i]) : [both, label[NAME], ""].find((it) => pen.measureText(it).width + 10 < wide);
          pen.save(); pen.beginPath(); pen.rect(x1, top, wide, high); pen.clip(); pen.globalAlpha = 1;
          if (never) { const w = pen.measureText(told).width + 8; pen.fillStyle = colours.paper; pen.globalAlpha = 0.82; pen.fillRect(x1 + 3, top + 2, w, high - 4); pen.globalAlpha = 1; pen.fillStyle = colours.bad; }
          else pen.fillStyle = colours.on;
          pen.fillText(told, x1 + 7, top + high / 2 + 4); pen.restore();
        }
        last = x2;
      }
      flush();
      pen.globalAlpha = 1;
    };
    const small = tallness < 7;
    if (!hidden.has("phase")) for (const i of lane.others) {
      const label = facts.labels[lane.label[i]];
      if (label[KIND] !== "phase" || lane.start[i] > to || stop(lane, i) < from) continue;
      const x1 = Math.max(at(lane.start[i]), left), x2 = Math.min(at(stop(lane, i)), left + room);
      pen.fillStyle = colours.phase; pen.fillRect(x1, y, Math.max(1, x2 - x1 - 1), small ? tallness : 3);
      if (words && tallness > 18 && x2 - x1 > 40 && firstAfter(lane, lane.calls, lane.start[i]) === firstAfter(lane, lane.calls, stop(lane, i))) {
        pen.save(); pen.beginPath(); pen.rect(x1, y, x2 - x1, tallness); pen.clip(); pen.fillStyle = colours.dim; pen.fillText(label[NAME], x1 + 5, y + tallness / 2 + 5); pen.restore();
      }
    }
    if (words && !hidden.has("step")) {
      pen.fillStyle = colours.ink;
      let last = -9;
      for (let k = firstAfter(lane, lane.steps, from); k < lane.steps.length && lane.start[lane.steps[k]] <= to; k++) {
        const x = at(lane.start[lane.steps[k]]);
        if (x - last > 6) { pen.globalAlpha = 0.55; pen.fillRect(x, y, 1, tallness); last = x; }
      }
      pen.globalAlpha = 1;
    }
    const top = small ? y : y + 4, high = small ? tallness : tallness - 4;
    spans(lane.calls, top, high);
    if (lane.asyncs.length) spans(lane.asyncs, top + high * 0.62, high * 0.38);
    if (lane.local.length) spans(lane.local, top, high);
    if (lane.held.length && !small) spans(lane.held, top + high - 3, 3); // while it does other things, waiting included
  }

  function timeName(units, step) {
    const s = (units * facts.unit) / 1e9, size = (step * facts.unit) / 1e9;
    if (size >= 0.1) return s.toFixed(size >= 1 ? 0 : 1) + " s";
    if (size >= 1e-4) return (s * 1e3).toFixed(size >= 1e-3 ? 0 : 1) + " ms";
    return (s * 1e6).toFixed(0) + " µs";
  }
  function lasting(units) {
    const s = (units * facts.unit) / 1e9;
    return s >= 1 ? s.toFixed(2) + " s" : s >= 1e-3 ? (s * 1e3).toFixed(2) + " ms" : (s * 1e6).toFixed(0) + " µs";
  }
  function layout() {
    const nodes = facts.waits.filter((w) => w[2].length).length;
    width = view.clientWidth;
    gutter = (width < 500 ? 42 : 74) + (facts.ranks.length > 99 ? 10 : 0);
    right = nodes ? 14 + Math.min(nodes, 4) * (width < 500 ? 14 : 26) : 8;
    const full = AXIS + shown.length * rank0 + 2;
    height = Math.min(full, Math.max(160, Math.round(innerHeight * 0.66)));
    const density = devicePixelRatio || 1;
    canvas.width = Math.round(width * density); canvas.height = Math.round(height * density);
    canvas.style.height = height + "px";
    tall.style.height = full - height + "px";
    view.style.height = height + 2 + "px";
    overview.width = Math.round(overview.clientWidth * density); overview.height = Math.round(64 * density);
    overviewPicture = null;
    redraw();
  }
  function redraw() { if (!queued) { queued = true; requestAnimationFrame(draw); } }

  function draw() {
    queued = false;
    const density = devicePixelRatio || 1, pen = canvas.getContext("2d"), room = width - gutter - right;
    if (room < 10) return; // not on show, as when the page is printed
    pen.setTransform(density, 0, 0, density, 0, 0);
    pen.fillStyle = colours.paper; pen.fillRect(0, 0, width, height);
    pen.font = "11px ui-sans-serif,system-ui,sans-serif";
    const top = view.scrollTop, first = Math.max(0, Math.floor(top / rank0)), last = Math.min(shown.length, Math.ceil((top + height - AXIS) / rank0));
    let step = 1; while ((step * room) / (b - a) < 90) step *= String(step)[0] === "2" ? 2.5 : 2;
    const ticks = [];
    for (let t = Math.ceil(a / step) * step; t <= b; t += step) {
      const x = gutter + ((t - a) / (b - a)) * room;
      pen.fillStyle = colours.grid; pen.fillRect(x, AXIS - 4, 1, height);
      if (x > gutter + 14 && x < width - right - 14) ticks.push([x, timeName(t, step)]);
    }
    pen.save(); pen.beginPath(); pen.rect(0, AXIS - 2, width, height); pen.clip();
    const triangles = [];
    for (let k = first; k < last; k++) {
      const rank = shown[k], y = AXIS + k * rank0 - top, lane = lanes.get(rank);
      pen.fillStyle = colours.lane; pen.fillRect(gutter, y + 1, room, rank0 - 4);
      if (culprits.has(rank)) { pen.fillStyle = colours.stall; pen.beginPath(); pen.arc(8, y + rank0 / 2 - 1, 3.5, 0, 7); pen.fill(); }
      pen.fillStyle = colours.ink; pen.font = (culprits.has(rank) ? "600 " : "") + "12px ui-sans-serif,system-ui,sans-serif";
      pen.fillText((width < 500 ? "" : "rank ") + rank, 17, y + rank0 / 2 + 3);
      pen.font = "11px ui-sans-serif,system-ui,sans-serif";
      if (!lane) { load(rank).then(redraw); continue; }
      row(pen, lane, y + 1, rank0 - 4, a, b, gutter, room, rank0 > 15);
      const mark = marks.get(rank);
      if (mark) for (let c = lane.calls.length - 1; c >= 0; c--) {
        const i = lane.calls[c];
        if (lane.seq[i] === mark.seq && facts.labels[lane.label[i]][GROUP] === mark.group) {
          if (lane.start[i] >= a && lane.start[i] <= b) triangles.push([gutter + ((lane.start[i] - a) / (b - a)) * room, y]);
          break;
        }
      }
      if (selected && selected.rank === rank && selected.i >= 0) {
        const x1 = Math.max(gutter, gutter + ((lane.start[selected.i] - a) / (b - a)) * room), x2 = Math.min(width - right, gutter + ((stop(lane, selected.i) - a) / (b - a)) * room);
        pen.strokeStyle = colours.ink; pen.lineWidth = 2; pen.strokeRect(x1 - 1, y, Math.max(3, x2 - x1 + 2), rank0 - 2);
      }
    }
    for (const [x, y] of triangles) {
      pen.fillStyle = colours.ink; pen.strokeStyle = colours.paper; pen.lineWidth = 1; pen.beginPath(); pen.moveTo(x - 5, y - 2); pen.lineTo(x + 5, y - 2); pen.lineTo(x, y + 7); pen.closePath(); pen.fill(); pen.stroke();
    }
    rails(pen, first, last, top);
    pen.restore();
    let from = Infinity, to = -Infinity; // where the words stand that no time may stand under
    if (triangles.length) { // above the lanes, so after the clip
      const x = Math.min(...triangles.map((t) => t[0]));
      pen.strokeStyle = colours.ink; pen.globalAlpha = 0.5; pen.setLineDash([3, 3]); pen.beginPath(); pen.moveTo(x, 4); pen.lineTo(x, height); pen.stroke(); pen.setLineDash([]); pen.globalAlpha = 1;
      const told = "first divergent entry", wide = pen.measureText(told).width + 10, left = x - wide > gutter ? x - wide : x + 4;
      pen.fillStyle = colours.ink; pen.fillText(told, left + 3, 14);
      from = left; to = left + wide;
    }
    pen.textAlign = "center"; pen.fillStyle = colours.dim;
    for (const [x, told] of ticks) if (x + 24 < from || x - 24 > to) pen.fillText(told, x, 14);
    pen.textAlign = "left";
    drawOverview();
  }

  function rails(pen, first, last, top) { // one rail per place, a dot on each rank there, arrows to where it waits for
    const nodes = facts.waits.filter((w) => w[2].length).slice(0, 4), gap = width < 500 ? 14 : 26, tones = nodeColours();
    const middle = [];
    nodes.forEach(([ranks], k) => {
      const here = new Set(ranks), x = width - right + 12 + k * gap, ys = [];
      for (let r = first; r < last; r++) if (here.has(shown[r])) ys.push(AXIS + r * rank0 - top + rank0 / 2 - 1);
      if (!ys.length) return;
      pen.strokeStyle = pen.fillStyle = tones[k]; pen.lineWidth = 2;
      pen.beginPath(); pen.moveTo(x, ys[0]); pen.lineTo(x, ys[ys.length - 1]); pen.stroke();
      for (const y of ys) { pen.beginPath(); pen.arc(x, y, 3.5, 0, 7); pen.fill(); }
      middle[k] = [x, (ys[0] + ys[ys.length - 1]) / 2];
    });
    nodes.forEach(([, , lacks], k) => nodes.forEach(([others], j) => {
      const wanted = new Set(lacks);
      if (k === j || !middle[k] || !middle[j] || !others.some((r) => wanted.has(r))) return;
      const shift = k < j ? -9 : 9, x1 = middle[k][0], y1 = middle[k][1] + shift, x2 = middle[j][0] + (j > k ? -5 : 5), y2 = middle[j][1] + shift, turn = Math.atan2(y2 - y1, x2 - x1);
      pen.strokeStyle = pen.fillStyle = tones[k]; pen.beginPath(); pen.moveTo(x1, y1); pen.lineTo(x2, y2); pen.stroke();
      pen.beginPath(); pen.moveTo(x2, y2); pen.lineTo(x2 - 7 * Math.cos(turn - 0.5), y2 - 7 * Math.sin(turn - 0.5)); pen.lineTo(x2 - 7 * Math.cos(turn + 0.5), y2 - 7 * Math.sin(turn + 0.5)); pen.fill();
    }));
  }

  let overviewPicture = null, filling = 0;
  const every = Math.ceil(facts.ranks.length / MOST_IN_OVERVIEW), sample = facts.ranks.filter((_, k) => k % every === 0);
  async function fillOverview() { // lane by lane, apart from the timeline, which must not wait for it
    const mine = ++filling, density = devicePixelRatio || 1, picture = document.createElement("canvas"), pen = picture.getContext("2d");
    picture.width = overview.width; picture.height = overview.height;
    pen.setTransform(density, 0, 0, density, 0, 0);
    overviewPicture = picture;
    for (let k = 0, shownAt = 0; k < sample.length; k++) {
      const lane = await load(sample[k]);
      if (mine !== filling) return;
      row(pen, lane, (k * 64) / sample.length, Math.min(6, Math.max(0.6, 64 / sample.length - 1)), 0, end, 0, overview.clientWidth, false);
      if (performance.now() - shownAt > 60 || k + 1 === sample.length) { drawOverview(); await new Promise((go) => setTimeout(go)); shownAt = performance.now(); }
    }
  }
  function drawOverview() {
    if (!overviewPicture) fillOverview();
    const density = devicePixelRatio || 1, wide = overview.clientWidth, pen = overview.getContext("2d");
    pen.setTransform(1, 0, 0, 1, 0, 0); pen.clearRect(0, 0, overview.width, overview.height); pen.drawImage(overviewPicture, 0, 0);
    pen.setTransform(density, 0, 0, density, 0, 0);
    const x1 = (a / end) * wide, x2 = (b / end) * wide;
    pen.fillStyle = colours.paper; pen.globalAlpha = 0.6; pen.fillRect(0, 0, x1, 64); pen.fillRect(x2, 0, wide - x2, 64); pen.globalAlpha = 1;
    pen.strokeStyle = colours.ink; pen.lineWidth = 2; pen.strokeRect(x1 + 1, 1, Math.max(3, x2 - x1 - 2), 62);
  }

  // -- moving --------------------------------------------------------------------------------------------------------
  function go(from, to) {
    const least = 4, long = Math.min(Math.max(to - from, least), end + 1);
    a = Math.min(Math.max(0, from), Math.max(0, end + 1 - long)); b = a + long; redraw();
  }
  const zoom = (factor, t = (a + b) / 2) => go(t - (t - a) * factor, t + (b - t) * factor);
  const timeAt = (x) => a + ((x - gutter) / (width - gutter - right)) * (b - a);
  function around(lane, i) { const t = lane.start[i], long = Math.max(stop(lane, i) - t, 20); go(t - long, t + 2 * long); }
  const does = {
    all: () => go(0, end), stall: () => go(...facts.window), in: () => zoom(0.5), out: () => zoom(2),
    async divergence() {
      const found = facts.marks[0];
      if (!found) { detail.textContent = "The verdict names no divergence."; return; }
      const lane = await load(found[0]);
      const i = lane.calls.findLast((c) => lane.seq[c] === found[2] && facts.labels[lane.label[c]][GROUP] === found[1]);
      if (i === undefined) return;
      const before = lane.calls[Math.max(0, lane.calls.indexOf(i) - 3)], lead = Math.max(lane.start[i] - lane.start[before], 50);
      go(lane.start[i] - lead, lane.start[i] + lead); select(found[0], i);
    },
  };
  document.querySelectorAll("[data-do]").forEach((button) => button.addEventListener("click", () => does[button.dataset.do]()));

  function select(rank, i) {
    selected = { rank, i };
    const lane = lanes.get(rank), k = shown.indexOf(rank), y = k * rank0;
    if (k >= 0 && y < view.scrollTop) view.scrollTop = y;
    if (k >= 0 && y + rank0 > view.scrollTop + height - AXIS) view.scrollTop = y + rank0 - height + AXIS;
    if (lane && i >= 0) {
      if (stop(lane, i) < a || lane.start[i] > b) go(lane.start[i] - (b - a) / 2, lane.start[i] + (b - a) / 2);
      describe(rank, lane, i);
    } else detail.textContent = `rank ${rank}: ${facts.places[rank] ?? ""}`;
    redraw();
  }
  function describe(rank, lane, i) {
    const label = facts.labels[lane.label[i]], call = label[KIND] === "call" || label[KIND] === "async", parts = [`rank ${rank}`];
    parts.push(call ? `${label[GROUP]} ${label[NAME]} #${lane.seq[i]}` : `${label[KIND]} ${label[NAME]}`);
    if (label[LAYER]) parts.push(label[LAYER]);
    if (lane.step[i]) parts.push(`step ${lane.step[i] - 1}`);
    const long = lasting(stop(lane, i) - lane.start[i]);
    parts.push(`at ${((lane.start[i] * facts.unit) / 1e9).toFixed(4)} s, ` + (lane.length[i] === NEVER ? (facts.stuck && (call || label[KIND] === "lock") ? `never returns (${long} until the verdict)` : `not ended, ${long}`) : long));
    if (label[NOTE]) parts.push(label[NOTE]);
    if (label[SITE]) parts.push(`from ${label[SITE]}`);
    detail.textContent = parts.join(" · ");
  }
  function pick(x, y) {
    const rank = shown[Math.floor((y - AXIS + view.scrollTop) / rank0)], lane = lanes.get(rank);
    if (rank === undefined || !lane || y < AXIS || x < gutter) return null;
    const t = timeAt(x), slack = ((b - a) / width) * 3;
    const hits = [...lane.calls.slice(Math.max(0, firstAfter(lane, lane.calls, t) - 2), firstAfter(lane, lane.calls, t + slack)), ...lane.others, ...lane.asyncs.slice(Math.max(0, firstAfter(lane, lane.asyncs, t) - 8), firstAfter(lane, lane.asyncs, t + slack))]
      .filter((i) => lane.start[i] <= t + slack && stop(lane, i) >= t - slack && !hidden.has(layerOf(facts.labels[lane.label[i]])));
    hits.sort((i, j) => stop(lane, i) - lane.start[i] - (stop(lane, j) - lane.start[j]));
    return hits.length ? [rank, lane, hits[0]] : [rank, lane, -1];
  }
  const fingers = new Map();
  let pinch = 0, moved = false;
  canvas.addEventListener("pointerdown", (e) => { fingers.set(e.pointerId, e.offsetX); canvas.setPointerCapture(e.pointerId); moved = false; pinch = 0; });
  canvas.addEventListener("pointermove", (e) => {
    const before = fingers.get(e.pointerId);
    if (before === undefined) { const hit = pick(e.offsetX, e.offsetY); if (hit && hit[2] >= 0) describe(...hit); return; }
    if (fingers.size === 2) {
      fingers.set(e.pointerId, e.offsetX);
      const [p, q] = [...fingers.values()], apart = Math.max(8, Math.abs(p - q));
      if (pinch) zoom(pinch / apart, timeAt((p + q) / 2));
      pinch = apart; moved = true; return;
    }
    const by = ((e.offsetX - before) / (width - gutter - right)) * (b - a);
    if (Math.abs(e.offsetX - before) > 2 || moved) { moved = true; canvas.classList.add("moving"); fingers.set(e.pointerId, e.offsetX); go(a - by, b - by); }
  });
  for (const over of ["pointerup", "pointercancel"]) canvas.addEventListener(over, (e) => {
    fingers.delete(e.pointerId); canvas.classList.remove("moving");
    if (over === "pointerup" && !moved) { const hit = pick(e.offsetX, e.offsetY); if (hit) select(hit[0], hit[2]); }
  });
  canvas.addEventListener("dblclick", (e) => { const hit = pick(e.offsetX, e.offsetY); if (hit && hit[2] >= 0) around(hit[1], hit[2]); });
  canvas.addEventListener("wheel", (e) => {
    if (e.ctrlKey || e.metaKey) { e.preventDefault(); zoom(Math.exp(e.deltaY * 0.004), timeAt(e.offsetX)); }
    else if (e.shiftKey || Math.abs(e.deltaX) > Math.abs(e.deltaY)) { e.preventDefault(); const by = ((e.deltaX || e.deltaY) / width) * (b - a); go(a + by, b + by); }
  }, { passive: false });
  let grip = null;
  overview.addEventListener("pointerdown", (e) => { overview.setPointerCapture(e.pointerId); const t = (e.offsetX / overview.clientWidth) * end; grip = t >= a && t <= b ? t - a : (b - a) / 2; go(t - grip, t - grip + (b - a)); });
  overview.addEventListener("pointermove", (e) => { if (grip !== null) { const t = (e.offsetX / overview.clientWidth) * end; go(t - grip, t - grip + (b - a)); } });
  overview.addEventListener("pointerup", () => { grip = null; });

  function move(by) { // to the next or previous span of the selected rank
    const rank = selected ? selected.rank : facts.marks.length ? facts.marks[0][0] : shown[0], lane = lanes.get(rank);
    if (!lane) { load(rank).then(() => move(by)); return; }
    const list = lane.walk.filter((i) => !hidden.has(layerOf(facts.labels[lane.label[i]])) && (!matching || matching[lane.label[i]]));
    if (!list.length) { select(rank, -1); return; }
    const at = selected && selected.i >= 0 && selected.rank === rank ? list.indexOf(selected.i) : -1;
    const next = at < 0 ? Math.min(list.length - 1, firstAfter(lane, list, a)) : Math.min(list.length - 1, Math.max(0, at + by));
    select(rank, list[next]);
  }
  async function changeRank(by) {
    const at = selected ? shown.indexOf(selected.rank) : -1, rank = shown[Math.min(shown.length - 1, Math.max(0, at + by))];
    const old = selected && lanes.get(selected.rank), t = old && selected.i >= 0 ? old.start[selected.i] : a, lane = await load(rank);
    const place = Math.min(lane.walk.length - 1, Math.max(0, firstAfter(lane, lane.walk, t)));
    select(rank, place >= 0 ? lane.walk[place] : -1);
  }
  const keys = {
    ArrowLeft: () => go(a - (b - a) / 8, b - (b - a) / 8), ArrowRight: () => go(a + (b - a) / 8, b + (b - a) / 8),
    ArrowUp: () => changeRank(-1), ArrowDown: () => changeRank(1), "+": does.in, "=": does.in, "-": does.out, 0: does.all,
    s: does.stall, d: does.divergence, n: () => move(1), p: () => move(-1), Home: () => go(0, b - a), End: () => go(end - (b - a), end),
    "/": () => $("find").focus(), Escape: () => { selected = null; redraw(); },
    Enter: () => { if (selected && selected.i >= 0) around(lanes.get(selected.rank), selected.i); },
  };
  view.addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey || !keys[e.key]) return;
    e.preventDefault(); keys[e.key]();
  });
  view.addEventListener("scroll", redraw, { passive: true });

  // -- filters -------------------------------------------------------------------------------------------------------
  $("find").addEventListener("input", (e) => {
    const wanted = e.target.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    matching = wanted.length ? Uint8Array.from(text, (t) => (wanted.every((w) => t.includes(w)) ? 1 : 0)) : null;
    if (matching) detail.textContent = `${matching.reduce((n, m) => n + m, 0)} of ${text.length} kinds of spans match; n and p go through them.`;
    overviewPicture = null; redraw();
  });
  $("find").addEventListener("keydown", (e) => { if (e.key === "Escape" || e.key === "Enter") { view.focus(); if (e.key === "Enter") move(1); } });
  function arrange() {
    const wanted = $("ranks").value.trim();
    let keep = facts.ranks;
    if (wanted) {
      const ranges = wanted.split(",").map((part) => part.split("-").map((n) => parseInt(n, 10))).filter((r) => !r.some(Number.isNaN));
      keep = facts.ranks.filter((rank) => ranges.some((r) => rank >= r[0] && rank <= (r[1] ?? r[0])));
    }
    shown = keep.slice();
    if ($("order").value === "place") shown.sort((p, q) => (facts.places[p] ?? "").localeCompare(facts.places[q] ?? "") || p - q);
    view.scrollTop = 0; layout();
  }
  $("ranks").addEventListener("input", arrange);
  $("order").addEventListener("change", arrange);
  function legend() {
    const kinds = new Set(facts.labels.map((l) => layerOf(l)));
    for (const name of [...facts.groups.map((g) => "group " + g), "lock", "build", "phase", "step"]) {
      if (!kinds.has(name)) continue;
      const button = document.createElement("button"), swatch = document.createElement("i");
      button.setAttribute("aria-pressed", "true");
      swatch.style.background = name.startsWith("group ") ? `var(--g${groupNumber.get(name.slice(6))})` : name === "step" ? "var(--ink)" : `var(--${name})`;
      if (name === "step") swatch.style.width = "2px";
      button.append(swatch, name);
      button.addEventListener("click", () => {
        const off = hidden.has(name);
        if (off) hidden.delete(name); else hidden.add(name);
        button.setAttribute("aria-pressed", String(off));
        overviewPicture = null; redraw();
      });
      $("legend").append(button);
    }
  }
  legend();
  readColours();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); overviewPicture = null; redraw(); });
  new ResizeObserver(() => { if (view.clientWidth && view.clientWidth !== width) layout(); }).observe(view);
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
  layout();
  requestAnimationFrame(() => requestAnimationFrame(() => { document.documentElement.dataset.drawn = String(Math.round(performance.now())); }));
})();
