// The timeline: the rows in sight, the time axis, the first divergent entries, and the rails of the wait-for graph.
let drawQueued = false;

function redraw() {
  if (!drawQueued) requestAnimationFrame(draw);
  drawQueued = true;
}
function redrawAll() { // where the overview changes too
  overviewPicture = null;
  redraw();
}
function layout() {
  const narrow = view.clientWidth < NARROW;
  width = view.clientWidth;
  gutter = (narrow ? 42 : 74) + (facts.ranks.length > 99 ? 10 : 0);
  right = waits.length ? 14 + waits.length * (narrow ? 14 : 26) : 8;
  const full = AXIS + shown.length * rowHeight + 2;
  height = Math.min(full, Math.max(160, Math.round(innerHeight * 0.66)));
  resize(canvas, width, height);
  resize(overview, overview.clientWidth, OVERVIEW_HEIGHT);
  canvas.style.height = height + "px";
  element("tall").style.height = full - height + "px"; // gives the view its scroll bar
  view.style.height = height + 2 + "px";
  redrawAll();
}

function draw() {
  drawQueued = false;
  if (width - gutter - right < 10) return; // not visible, as when the page is printed
  const pen = scaled(canvas), top = view.scrollTop;
  const first = Math.max(0, Math.floor(top / rowHeight)), last = Math.min(shown.length, Math.ceil((top + height - AXIS) / rowHeight));
  fill(pen, colours.paper, 0, 0, width, height);
  pen.font = `11px ${FONT}`;
  const ticks = drawGrid(pen), marked = [];
  clipped(pen, 0, AXIS - 2, width, height, () => {
    for (let k = first; k < last; k++) marked.push(...drawRank(pen, shown[k], AXIS + k * rowHeight - top));
    for (const [x, y] of marked) drawMark(pen, x, y);
    drawRails(pen, first, last, top);
  });
  drawAxis(pen, ticks, drawDivergence(pen, marked.map(([x]) => x)));
  drawOverview();
}
function drawGrid(pen) { // the times to write on the axis, with their places
  const room = width - gutter - right, ticks = [];
  let step = 1;
  while ((step * room) / (windowEnd - windowStart) < 90) step *= String(step)[0] === "2" ? 2.5 : 2;
  for (let t = Math.ceil(windowStart / step) * step; t <= windowEnd; t += step) {
    const x = xAt(t);
    fill(pen, colours.grid, x, AXIS - 4, 1, height);
    if (x > gutter + 14 && x < width - right - 14) ticks.push([x, timeName(t, step)]);
  }
  return ticks;
}
function drawRank(pen, rank, y) { // returns the place of the rank's first divergent entry, if it is in sight
  const room = width - gutter - right, lane = lanes.get(rank), isCulprit = culprits.has(rank);
  fill(pen, colours.lane, gutter, y + 1, room, rowHeight - 4);
  if (isCulprit) {
    pen.fillStyle = colours.stall;
    drawDot(pen, 8, y + rowHeight / 2 - 1);
  }
  pen.fillStyle = colours.ink;
  pen.font = `${isCulprit ? "600 " : ""}12px ${FONT}`;
  pen.fillText((width < NARROW ? "" : "rank ") + rank, 17, y + rowHeight / 2 + 3);
  pen.font = `11px ${FONT}`;
  if (!lane) {
    load(rank).then(redraw);
    return [];
  }
  const place = { y: y + 1, tall: rowHeight - 4, left: gutter, wide: room };
  new Row(pen, lane, { ...place, from: windowStart, to: windowEnd, labels: rowHeight > 15 }).draw();
  if (selected && selected.rank === rank && selected.i >= 0) drawSelection(pen, lane, selected.i, y);
  const i = marks.has(rank) ? lane.findCall(marks.get(rank)) : undefined;
  return i !== undefined && isInWindow(lane.start[i]) ? [[xAt(lane.start[i]), y]] : [];
}
function drawSelection(pen, lane, i, y) {
  const x1 = Math.max(gutter, xAt(lane.start[i])), x2 = Math.min(width - right, xAt(lane.endOf(i)));
  pen.strokeStyle = colours.ink;
  pen.lineWidth = 2;
  pen.strokeRect(x1 - 1, y, Math.max(3, x2 - x1 + 2), rowHeight - 2);
}
function drawMark(pen, x, y) {
  pen.fillStyle = colours.ink;
  pen.strokeStyle = colours.paper;
  pen.lineWidth = 1;
  fillShape(pen, [[x - 5, y - 2], [x + 5, y - 2], [x, y + 7]]);
  pen.stroke();
}
function drawDivergence(pen, xs) { // returns what its words cover: [from, to] in pixels
  if (!xs.length) return [Infinity, -Infinity];
  const x = Math.min(...xs), words = "first divergent entry", wide = pen.measureText(words).width + 10;
  const left = x - wide > gutter ? x - wide : x + 4;
  pen.strokeStyle = pen.fillStyle = colours.ink;
  pen.globalAlpha = 0.5;
  pen.setLineDash([3, 3]);
  drawLine(pen, x, 4, x, height);
  pen.setLineDash([]);
  pen.globalAlpha = 1;
  pen.fillText(words, left + 3, 14);
  return [left, left + wide];
}
function drawAxis(pen, ticks, [from, to]) {
  pen.textAlign = "center";
  pen.fillStyle = colours.dim;
  for (const [x, words] of ticks) if (x + 24 < from || x - 24 > to) pen.fillText(words, x, 14);
  pen.textAlign = "left";
}
function drawRails(pen, first, last, top) { // a rail for each place, a dot on each rank there, arrows to where it waits for
  const gap = width < NARROW ? 14 : 26, middles = waits.map(() => null);
  pen.lineWidth = 2;
  waits.forEach(([ranks], k) => {
    const x = width - right + 12 + k * gap, ys = [];
    for (let r = first; r < last; r++) if (ranks.includes(shown[r])) ys.push(AXIS + r * rowHeight - top + rowHeight / 2 - 1);
    if (!ys.length) return;
    pen.strokeStyle = pen.fillStyle = waitColours[k];
    drawLine(pen, x, ys[0], x, ys.at(-1));
    for (const y of ys) drawDot(pen, x, y);
    middles[k] = [x, (ys[0] + ys.at(-1)) / 2];
  });
  for (const [k, j] of waitEdges) {
    if (!middles[k] || !middles[j]) continue;
    const [aside, head] = k < j ? [-9, -5] : [9, 5];
    pen.strokeStyle = pen.fillStyle = waitColours[k];
    drawArrow(pen, middles[k][0], middles[k][1] + aside, middles[j][0] + head, middles[j][1] + aside);
  }
}
function drawArrow(pen, x1, y1, x2, y2) {
  const turn = Math.atan2(y2 - y1, x2 - x1), barb = (by) => [x2 - 7 * Math.cos(turn + by), y2 - 7 * Math.sin(turn + by)];
  drawLine(pen, x1, y1, x2, y2);
  fillShape(pen, [[x2, y2], barb(-0.5), barb(0.5)]);
}

function timeName(units, stepUnits) { // in the unit in which steps of this length are readable
  const s = (units * facts.unit) / 1e9, step_s = (stepUnits * facts.unit) / 1e9;
  if (step_s >= 0.1) return s.toFixed(step_s >= 1 ? 0 : 1) + " s";
  if (step_s >= 1e-4) return (s * 1e3).toFixed(step_s >= 1e-3 ? 0 : 1) + " ms";
  return (s * 1e6).toFixed(0) + " µs";
}
function lengthName(units) {
  const s = (units * facts.unit) / 1e9;
  if (s >= 1) return s.toFixed(2) + " s";
  return s >= 1e-3 ? (s * 1e3).toFixed(2) + " ms" : (s * 1e6).toFixed(0) + " µs";
}
