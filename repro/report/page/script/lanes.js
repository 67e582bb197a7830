// Lanes of spans. A lane is unpacked when it first comes into sight.
class Lane {
  constructor(columns) {
    const n = columns.length / 5, column = (k) => columns.subarray(k * n, (k + 1) * n);
    this.start = new Float64Array(n);
    this.length = column(1);
    this.label = column(2);
    this.seq = column(3);
    this.step = column(4); // + 1; 0 outside any step
    Object.assign(this, { calls: [], asyncs: [], steps: [], others: [], local: [], held: [] });
    this.walk = []; // what the keys n and p go through
    for (let i = 0, t = 0; i < n; i++) {
      this.start[i] = t += columns[i];
      this.sort(i, this.labelOf(i)[KIND]);
    }
  }
  sort(i, kind) {
    if (kind === "lock" || kind === "build") this.local.push(i);
    if (kind === "held") this.held.push(i);
    if (["call", "async", "lock", "build"].includes(kind)) this.walk.push(i);
    ({ call: this.calls, async: this.asyncs, step: this.steps }[kind] ?? this.others).push(i);
  }
  labelOf(i) { return facts.labels[this.label[i]]; }
  isOpen(i) { return this.length[i] === NEVER; }
  endOf(i) { return this.isOpen(i) ? end : this.start[i] + this.length[i]; }
  firstAfter(list, t) { // the position in a list of spans of the first that begins at t or later
    let low = 0, high = list.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.start[list[middle]] < t) low = middle + 1;
      else high = middle;
    }
    return low;
  }
  findCall({ group, seq }) { // the last call of this number; undefined where there is none
    return this.calls.findLast((i) => this.seq[i] === seq && this.labelOf(i)[GROUP] === group);
  }
}

const lanes = new Map(), loading = new Map();

function load(rank) { // a promise of the rank's lane
  if (!loading.has(rank)) loading.set(rank, unpack(rank));
  return loading.get(rank);
}
async function unpack(rank) {
  const coded = atob(element("lane" + rank).textContent), bytes = new Uint8Array(coded.length);
  for (let i = 0; i < coded.length; i++) bytes[i] = coded.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const lane = new Lane(new Uint32Array(await new Response(stream).arrayBuffer()));
  lanes.set(rank, lane);
  return lane;
}
