// Moving the window, and selecting a span.
function go(from, to) {
  const long = Math.min(Math.max(to - from, 4), end + 1);
  windowStart = Math.min(Math.max(0, from), Math.max(0, end + 1 - long));
  windowEnd = windowStart + long;
  redraw();
}
const shift = (share) => go(windowStart + share * (windowEnd - windowStart), windowEnd + share * (windowEnd - windowStart));
const zoom = (factor, t = (windowStart + windowEnd) / 2) => go(t - (t - windowStart) * factor, t + (windowEnd - t) * factor);

function zoomTo(lane, i) {
  const long = Math.max(lane.endOf(i) - lane.start[i], 20);
  go(lane.start[i] - long, lane.start[i] + 2 * long);
}
async function goToDivergence() {
  if (!facts.marks.length) {
    detail.textContent = "The verdict names no divergence.";
    return;
  }
  const [rank, group, seq] = facts.marks[0], lane = await load(rank), i = lane.findCall({ group, seq });
  if (i === undefined) return;
  const before = lane.calls[Math.max(0, lane.calls.indexOf(i) - 3)], lead = Math.max(lane.start[i] - lane.start[before], 50);
  go(lane.start[i] - lead, lane.start[i] + lead);
  select(rank, i);
}
const actions = {
  all: () => go(0, end), stall: () => go(...facts.window), divergence: goToDivergence, in: () => zoom(0.5), out: () => zoom(2),
};
for (const button of document.querySelectorAll("[data-do]")) button.addEventListener("click", actions[button.dataset.do]);

function select(rank, i) {
  const lane = lanes.get(rank), row = shown.indexOf(rank), y = row * rowHeight;
  selected = { rank, i };
  if (row >= 0) view.scrollTop = Math.max(Math.min(view.scrollTop, y), y + rowHeight - height + AXIS);
  if (lane && i >= 0) {
    const half = (windowEnd - windowStart) / 2;
    if (lane.endOf(i) < windowStart || lane.start[i] > windowEnd) go(lane.start[i] - half, lane.start[i] + half);
    describe(rank, lane, i);
  } else detail.textContent = `rank ${rank}: ${facts.places[rank] ?? ""}`;
  redraw();
}
function describe(rank, lane, i) {
  const label = lane.labelOf(i), long = lengthName(lane.endOf(i) - lane.start[i]);
  const waited = facts.stuck && (isCollective(label) || label[KIND] === "lock");
  const lasted = !lane.isOpen(i) ? long : waited ? `never returns (${long} until the verdict)` : `not ended, ${long}`;
  detail.textContent = [
    `rank ${rank}`,
    isCollective(label) ? `${label[GROUP]} ${label[NAME]} #${lane.seq[i]}` : `${label[KIND]} ${label[NAME]}`,
    label[LAYER],
    lane.step[i] && `step ${lane.step[i] - 1}`,
    `at ${((lane.start[i] * facts.unit) / 1e9).toFixed(4)} s, ${lasted}`,
    label[NOTE],
    label[SITE] && `from ${label[SITE]}`,
  ].filter(Boolean).join(" · ");
}
function goToSpan(by) { // of the selected rank: the next span, or the previous one
  const rank = selected ? selected.rank : facts.marks.length ? facts.marks[0][0] : shown[0], lane = lanes.get(rank);
  if (!lane) {
    load(rank).then(() => goToSpan(by));
    return;
  }
  const list = lane.walk.filter((i) => !isHidden(lane, i) && !isDimmed(lane, i));
  const at = selected && selected.rank === rank ? list.indexOf(selected.i) : -1;
  const next = at < 0 ? lane.firstAfter(list, windowStart) : Math.max(0, at + by);
  select(rank, list.length ? list[Math.min(list.length - 1, next)] : -1);
}
async function goToRank(by) { // the rank of the next row, at about the same time
  const row = selected ? shown.indexOf(selected.rank) : -1;
  const rank = shown[Math.min(shown.length - 1, Math.max(0, row + by))];
  const old = selected && selected.i >= 0 ? lanes.get(selected.rank) : null;
  const t = old ? old.start[selected.i] : windowStart, lane = await load(rank);
  select(rank, lane.walk.length ? lane.walk[Math.min(lane.walk.length - 1, lane.firstAfter(lane.walk, t))] : -1);
}
