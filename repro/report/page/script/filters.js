// The search, the choice and order of ranks, and the legend, which switches categories off.
element("find").addEventListener("input", (event) => {
  const words = event.target.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
  matching = words.length ? Uint8Array.from(searchable, (text) => words.every((word) => text.includes(word))) : null;
  if (matching) {
    const count = matching.reduce((sum, matches) => sum + matches, 0);
    detail.textContent = `${count} of ${searchable.length} kinds of spans match; n and p go through them.`;
  }
  redrawAll();
});
element("find").addEventListener("keydown", (event) => {
  if (event.key !== "Escape" && event.key !== "Enter") return;
  view.focus();
  if (event.key === "Enter") goToSpan(1);
});

function arrange() {
  const ranges = element("ranks").value.split(",").map((part) => part.split("-").map((number) => parseInt(number, 10)));
  const valid = ranges.filter((range) => !range.some(Number.isNaN)), place = (rank) => facts.places[rank] ?? "";
  shown = facts.ranks.filter((rank) => !element("ranks").value.trim() || valid.some(([from, to]) => rank >= from && rank <= (to ?? from)));
  if (element("order").value === "place") shown.sort((p, q) => place(p).localeCompare(place(q)) || p - q);
  view.scrollTop = 0;
  layout();
}
element("ranks").addEventListener("input", arrange);
element("order").addEventListener("change", arrange);

function fillLegend() {
  const present = new Set(facts.labels.map(category));
  const swatches = new Map(facts.groups.map((name) => [`group ${name}`, `var(--g${groupNumber.get(name)})`]));
  for (const [name, colour] of [["lock", "var(--lock)"], ["build", "var(--build)"], ["phase", "var(--phase)"], ["step", "var(--ink)"]])
    swatches.set(name, colour);
  for (const [name, colour] of swatches) if (present.has(name)) element("legend").append(legendButton(name, colour));
}
function legendButton(name, colour) {
  const button = document.createElement("button"), swatch = document.createElement("i");
  button.setAttribute("aria-pressed", "true");
  swatch.style.background = colour;
  if (name === "step") swatch.style.width = "2px";
  button.append(swatch, name);
  button.addEventListener("click", () => {
    const off = hidden.delete(name);
    if (!off) hidden.add(name);
    button.setAttribute("aria-pressed", String(off));
    redrawAll();
  });
  return button;
}
