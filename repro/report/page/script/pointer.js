// The mouse and fingers: drag to move, pinch or Ctrl and wheel to zoom, click to select.
function pick(x, y) { // [rank, lane, i] of the shortest span at this place; i is -1 between spans, null outside the lanes
  const rank = shown[Math.floor((y - AXIS + view.scrollTop) / rowHeight)], lane = lanes.get(rank);
  if (rank === undefined || !lane || y < AXIS || x < gutter) return null;
  const t = timeAt(x), slack = ((windowEnd - windowStart) / width) * 3;
  const near = (list, overlap) => list.slice(Math.max(0, lane.firstAfter(list, t) - overlap), lane.firstAfter(list, t + slack));
  const hits = [...near(lane.calls, 2), ...lane.others, ...near(lane.asyncs, 8)]
    .filter((i) => lane.start[i] <= t + slack && lane.endOf(i) >= t - slack && !isHidden(lane, i))
    .sort((i, j) => lane.endOf(i) - lane.start[i] - (lane.endOf(j) - lane.start[j]));
  return [rank, lane, hits.length ? hits[0] : -1];
}
const fingers = new Map(); // pointer -> x of its last event
let pinch = 0, moved = false;

canvas.addEventListener("pointerdown", (event) => {
  fingers.set(event.pointerId, event.offsetX);
  canvas.setPointerCapture(event.pointerId);
  moved = false;
  pinch = 0;
});
canvas.addEventListener("pointermove", (event) => {
  const before = fingers.get(event.pointerId);
  if (before === undefined) {
    const hit = pick(event.offsetX, event.offsetY);
    if (hit && hit[2] >= 0) describe(...hit);
  } else if (fingers.size === 2) {
    fingers.set(event.pointerId, event.offsetX);
    const [x1, x2] = [...fingers.values()], apart = Math.max(8, Math.abs(x1 - x2));
    if (pinch) zoom(pinch / apart, timeAt((x1 + x2) / 2));
    pinch = apart;
    moved = true;
  } else if (moved || Math.abs(event.offsetX - before) > 2) {
    fingers.set(event.pointerId, event.offsetX);
    moved = true;
    canvas.classList.add("moving");
    shift((before - event.offsetX) / (width - gutter - right));
  }
});
function lift(event) {
  fingers.delete(event.pointerId);
  canvas.classList.remove("moving");
}
canvas.addEventListener("pointercancel", lift);
canvas.addEventListener("pointerup", (event) => {
  lift(event);
  const hit = moved ? null : pick(event.offsetX, event.offsetY);
  if (hit) select(hit[0], hit[2]);
});
canvas.addEventListener("dblclick", (event) => {
  const hit = pick(event.offsetX, event.offsetY);
  if (hit && hit[2] >= 0) zoomTo(hit[1], hit[2]);
});
canvas.addEventListener("wheel", (event) => { // a plain wheel scrolls the page
  const isZoom = event.ctrlKey || event.metaKey, isSideways = event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY);
  if (!isZoom && !isSideways) return;
  event.preventDefault();
  if (isZoom) zoom(Math.exp(event.deltaY * 0.004), timeAt(event.offsetX));
  else shift((event.deltaX || event.deltaY) / width);
}, { passive: false });

let grip = null; // where the frame of the overview is held: the time since its left end
function dragFrame(event, start) {
  const t = (event.offsetX / overview.clientWidth) * end;
  if (start) grip = isInWindow(t) ? t - windowStart : (windowEnd - windowStart) / 2;
  if (grip !== null) go(t - grip, t - grip + windowEnd - windowStart);
}
overview.addEventListener("pointerdown", (event) => {
  overview.setPointerCapture(event.pointerId);
  dragFrame(event, true);
});
overview.addEventListener("pointermove", (event) => dragFrame(event, false));
overview.addEventListener("pointerup", () => { grip = null; });
