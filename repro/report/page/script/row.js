// One rank's row: its spans between two times, as bars.
class Row {
  // y, tall, left, wide: the row's place in pixels; from, to: the times at its ends; labels: whether there is room for text
  constructor(pen, lane, { y, tall, left, wide, from, to, labels }) {
    Object.assign(this, { pen, lane, y, tall, left, wide, from, to, labels });
    this.scale = wide / (to - from);
    this.small = tall < 7;
  }
  x(t) { return Math.min(Math.max(this.left + (t - this.from) * this.scale, this.left), this.left + this.wide); }

  draw() {
    const lane = this.lane, top = this.small ? this.y : this.y + 4, tall = this.small ? this.tall : this.tall - 4;
    if (!hidden.has("phase")) this.drawPhases();
    if (this.labels && !hidden.has("step")) this.drawSteps();
    this.drawSpans(lane.calls, top, tall, 2);
    this.drawSpans(lane.asyncs, top + tall * 0.62, tall * 0.38, 64);
    this.drawSpans(lane.local, top, tall, 64);
    if (!this.small) this.drawSpans(lane.held, top + tall - 3, 3, 64); // a rank does other things while it holds a lock
  }
  drawPhases() {
    const { pen, lane, y, tall } = this;
    for (const i of lane.others) {
      const name = lane.labelOf(i)[NAME], begin = lane.start[i], over = lane.endOf(i);
      if (lane.labelOf(i)[KIND] !== "phase" || begin > this.to || over < this.from) continue;
      const x1 = this.x(begin), x2 = this.x(over);
      fill(pen, colours.phase, x1, y, Math.max(1, x2 - x1 - 1), this.small ? tall : 3);
      const isEmpty = lane.firstAfter(lane.calls, begin) === lane.firstAfter(lane.calls, over);
      if (this.labels && tall > 18 && x2 - x1 > 40 && isEmpty)
        clipped(pen, x1, y, x2 - x1, tall, () => { pen.fillStyle = colours.dim; pen.fillText(name, x1 + 5, y + tall / 2 + 5); });
    }
  }
  drawSteps() {
    const { lane } = this;
    let last = -9;
    for (let k = lane.firstAfter(lane.steps, this.from); k < lane.steps.length && lane.start[lane.steps[k]] <= this.to; k++) {
      const x = this.x(lane.start[lane.steps[k]]);
      if (x - last <= 6) continue;
      fill(this.pen, colours.ink, x, this.y, 1, this.tall, 0.55);
      last = x;
    }
  }
  // overlap: how many spans of the list, at most, begin before another one and end after it
  drawSpans(list, top, tall, overlap) {
    const { pen, lane } = this;
    let last = -1e9, begun = 0, colour = null, faint = false; // neighbours of one colour, too narrow to tell apart, are one bar
    const flush = () => {
      if (colour) fill(pen, colour, begun, top, Math.max(last - begun, 0.8), tall, faint ? 0.12 : 1);
      colour = null;
    };
    for (let k = Math.max(0, lane.firstAfter(list, this.from) - overlap); k < list.length; k++) {
      const i = list[k];
      if (lane.start[i] > this.to) break;
      if (lane.endOf(i) < this.from || isHidden(lane, i)) continue;
      const x1 = this.x(lane.start[i]), x2 = this.x(lane.endOf(i)), wide = Math.max(x2 - x1, 0.8);
      const dim = isDimmed(lane, i), never = lane.isOpen(i) && facts.stuck && lane.labelOf(i)[KIND] !== "held";
      if (wide >= 2.5 || never) {
        flush();
        this.drawSpan(i, x1, wide, top, tall, never, dim);
        last = x2;
      } else if (x2 < last + 0.5 && !matching) { // nothing more to see before the next pixel: go there
        const next = lane.firstAfter(list, this.from + (last + 0.5 - this.left) / this.scale);
        if (next > k + 1) k = next - 2;
      } else {
        const tone = colourOf(lane.labelOf(i));
        if (tone !== colour || dim !== faint || x1 > last + 0.7) {
          flush();
          [begun, colour, faint] = [x1, tone, dim];
        }
        last = Math.max(last, x1 + wide);
      }
    }
    flush();
  }
  drawSpan(i, x, wide, top, tall, never, dim) {
    const { pen } = this, label = this.lane.labelOf(i), faint = dim ? 0.12 : 1;
    if (never && this.tall > 6) {
      fill(pen, colourOf(label), x, top, wide, tall, faint * 0.25);
      fill(pen, hatch, x, top, wide, tall, dim ? 0.15 : 0.7);
      pen.strokeStyle = colours.stall;
      pen.lineWidth = 1;
      pen.strokeRect(x + 0.5, top + 0.5, wide - 1, tall - 1);
    } else fill(pen, never ? colours.stall : colourOf(label), x, top, wide - (wide > 3 && !never ? 0.6 : 0), tall, faint);
    if (this.labels && wide > 46 && tall > 10)
      clipped(pen, x, top, wide, tall, () => (never ? this.nameStall(i, x, top, tall) : this.nameSpan(label, x, wide, top, tall)));
  }
  nameStall(i, x, top, tall) {
    const { pen } = this, text = stallText(this.lane.labelOf(i), this.lane.seq[i]);
    fill(pen, colours.paper, x + 3, top + 2, pen.measureText(text).width + 8, tall - 4, 0.82);
    pen.fillStyle = colours.bad;
    pen.fillText(text, x + 7, top + tall / 2 + 4);
  }
  nameSpan(label, x, wide, top, tall) {
    const names = [`${label[NAME]} ${label[LAYER]}`, label[NAME], ""];
    this.pen.fillStyle = colours.on;
    this.pen.fillText(names.find((name) => this.pen.measureText(name).width + 10 < wide), x + 7, top + tall / 2 + 4);
  }
}

function stallText(label, seq) {
  if (label[KIND] === "lock") return `waits for lock ${label[NAME]}`;
  if (label[KIND] === "build") return `builds ${label[NAME]}`;
  return `waits in ${label[GROUP]} ${label[NAME]} #${seq} ${label[LAYER]}`;
}
