// Show the tool in place of the static picture.
document.body.classList.add("interactive");
element("tool").hidden = false;
fillLegend();
readColours();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); redrawAll(); });
new ResizeObserver(() => { if (view.clientWidth && view.clientWidth !== width) layout(); }).observe(view);
addEventListener("beforeprint", () => { for (const details of document.querySelectorAll("details")) details.open = true; });
layout();
requestAnimationFrame(() => requestAnimationFrame(() => {
  document.documentElement.dataset.drawn = String(Math.round(performance.now())); // tests wait for this
}));
