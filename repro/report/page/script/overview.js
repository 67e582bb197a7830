// The strip above the timeline: the whole run, with a frame around what the timeline shows.
const OVERVIEW_HEIGHT = 64, MOST_IN_OVERVIEW = 128;
const every = Math.ceil(facts.ranks.length / MOST_IN_OVERVIEW), sample = facts.ranks.filter((_, k) => k % every === 0);
let overviewPicture = null, filling = 0;

async function fillOverview() { // lane by lane, apart from the timeline, which must not wait for this
  const turn = ++filling, picture = document.createElement("canvas");
  picture.width = overview.width;
  picture.height = overview.height;
  overviewPicture = picture;
  const pen = scaled(picture), pitch = OVERVIEW_HEIGHT / sample.length, tall = Math.min(6, Math.max(0.6, pitch - 1));
  for (let k = 0, drawnAt = 0; k < sample.length; k++) {
    const lane = await load(sample[k]);
    if (turn !== filling) return; // a newer picture is being filled
    new Row(pen, lane, { y: k * pitch, tall, left: 0, wide: overview.clientWidth, from: 0, to: end, labels: false }).draw();
    if (performance.now() - drawnAt > 60 || k + 1 === sample.length) {
      drawOverview();
      await new Promise((resume) => setTimeout(resume));
      drawnAt = performance.now();
    }
  }
}
function drawOverview() {
  if (!overviewPicture) fillOverview();
  const wide = overview.clientWidth, x1 = (windowStart / end) * wide, x2 = (windowEnd / end) * wide;
  const pen = overview.getContext("2d");
  pen.setTransform(1, 0, 0, 1, 0, 0);
  pen.clearRect(0, 0, overview.width, overview.height);
  pen.drawImage(overviewPicture, 0, 0);
  scaled(overview);
  fill(pen, colours.paper, 0, 0, x1, OVERVIEW_HEIGHT, 0.6);
  fill(pen, colours.paper, x2, 0, wide - x2, OVERVIEW_HEIGHT, 0.6);
  pen.strokeStyle = colours.ink;
  pen.lineWidth = 2;
  pen.strokeRect(x1 + 1, 1, Math.max(3, x2 - x1 - 2), OVERVIEW_HEIGHT - 2);
}
