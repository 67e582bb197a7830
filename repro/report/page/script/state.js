// The data of the timeline, and what the reader has chosen to see. All files of this folder share one scope.
const facts = JSON.parse(document.getElementById("facts").textContent);
if (!facts.ranks.length || typeof DecompressionStream === "undefined") return; // the static picture stays

const element = (id) => document.getElementById(id);
const view = element("view"), canvas = element("lanes"), overview = element("overview"), detail = element("detail");

const KIND = 0, NAME = 1, GROUP = 2, LAYER = 3, NOTE = 4, SITE = 5; // the columns of a label
const NEVER = 0xffffffff; // the length of a span that never ended
const AXIS = 24; // the height of the time axis, in pixels
const FONT = "ui-sans-serif,system-ui,sans-serif";
const NARROW = 500; // below this width, names are shorter
const rowHeight = facts.ranks.length > 64 ? 16 : facts.ranks.length > 16 ? 20 : 30;

const end = facts.end;
const groupNumber = new Map(facts.groups.map((name, k) => [name, k % 6]));
const culprits = new Set(facts.culprits);
const marks = new Map(facts.marks.map(([rank, group, seq]) => [rank, { group, seq }])); // first divergent entries
const waits = facts.waits.filter(([, , awaited]) => awaited.length).slice(0, 4);
const waitEdges = waits.flatMap(([, , awaited], k) => // [k, j]: ranks of place k wait for ranks of place j
  waits.flatMap(([ranks], j) => (j !== k && ranks.some((rank) => awaited.includes(rank)) ? [[k, j]] : [])));
const searchable = facts.labels.map((label) => label.join(" ").toLowerCase());

let windowStart = facts.window[0], windowEnd = Math.max(facts.window[1], windowStart + 1);
let shown = facts.ranks.slice(); // the ranks in the order of their rows
let selected = null; // { rank, i }: i is the index of a span in its lane, or -1
let matching = null; // by label: 1 where the search matches; null without a search
const hidden = new Set(); // categories that the legend has switched off
let width = 0, height = 0, gutter = 74, right = 8; // of the canvas: its size, and its margins for names and for rails

const isCollective = (label) => label[KIND] === "call" || label[KIND] === "async";
const category = (label) => (isCollective(label) ? `group ${label[GROUP]}` : label[KIND] === "held" ? "lock" : label[KIND]);
const isHidden = (lane, i) => hidden.has(category(lane.labelOf(i)));
const isDimmed = (lane, i) => Boolean(matching && !matching[lane.label[i]]);
const timeAt = (x) => windowStart + ((x - gutter) / (width - gutter - right)) * (windowEnd - windowStart);
const xAt = (t) => gutter + ((t - windowStart) / (windowEnd - windowStart)) * (width - gutter - right);
const isInWindow = (t) => t >= windowStart && t <= windowEnd;
