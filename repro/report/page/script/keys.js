// The keyboard, while the timeline has the focus.
const keys = {
  ArrowLeft: () => shift(-1 / 8), ArrowRight: () => shift(1 / 8), ArrowUp: () => goToRank(-1), ArrowDown: () => goToRank(1),
  "+": actions.in, "=": actions.in, "-": actions.out, 0: actions.all, s: actions.stall, d: actions.divergence,
  n: () => goToSpan(1), p: () => goToSpan(-1),
  Home: () => go(0, windowEnd - windowStart), End: () => go(end - (windowEnd - windowStart), end),
  "/": () => element("find").focus(),
  Escape: () => { selected = null; redraw(); },
  Enter: () => { if (selected && selected.i >= 0) zoomTo(lanes.get(selected.rank), selected.i); },
};
view.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
  event.preventDefault();
  keys[event.key]();
});
view.addEventListener("scroll", redraw, { passive: true });
