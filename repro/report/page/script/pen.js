// Colours, and the shapes that several parts of the timeline draw.
const colours = {};
const waitColours = ["#7d5fd3", "#c07a1a", "#1f8fa3", "#b8478a"]; // of the places at which ranks wait
let hatch = null;

function readColours() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["ink", "on", "dim", "paper", "lane", "grid", "phase", "lock", "build", "stall", "bad", "g0", "g1", "g2", "g3", "g4", "g5"])
    colours[name] = style.getPropertyValue("--" + name).trim();
  const tile = document.createElement("canvas"), pen = tile.getContext("2d");
  tile.width = tile.height = 8;
  pen.strokeStyle = colours.stall;
  pen.lineWidth = 1.6;
  for (const x of [-8, 0, 8]) drawLine(pen, x, 8, x + 8, 0);
  hatch = pen.createPattern(tile, "repeat");
}
function colourOf(label) {
  if (isCollective(label)) return colours["g" + (groupNumber.get(label[GROUP]) ?? 0)];
  return colours[label[KIND]] ?? colours.lock;
}
function scaled(target) { // a pen on a canvas whose unit is a CSS pixel
  const pen = target.getContext("2d"), density = devicePixelRatio || 1;
  pen.setTransform(density, 0, 0, density, 0, 0);
  return pen;
}
function resize(target, wide, tall) {
  const density = devicePixelRatio || 1;
  target.width = Math.round(wide * density);
  target.height = Math.round(tall * density);
}
function fill(pen, colour, x, y, wide, tall, alpha = 1) {
  pen.globalAlpha = alpha;
  pen.fillStyle = colour;
  pen.fillRect(x, y, wide, tall);
  pen.globalAlpha = 1;
}
function drawLine(pen, x1, y1, x2, y2) {
  pen.beginPath();
  pen.moveTo(x1, y1);
  pen.lineTo(x2, y2);
  pen.stroke();
}
function drawDot(pen, x, y) {
  pen.beginPath();
  pen.arc(x, y, 3.5, 0, 7);
  pen.fill();
}
function fillShape(pen, points) {
  pen.beginPath();
  for (const [x, y] of points) pen.lineTo(x, y);
  pen.closePath();
  pen.fill();
}
function clipped(pen, x, y, wide, tall, draw) {
  pen.save();
  pen.beginPath();
  pen.rect(x, y, wide, tall);
  pen.clip();
  draw();
  pen.restore();
}
