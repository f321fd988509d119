"use strict";
const WORDS = {
  en: {
    chat: "chat", span: "time", theme: "light or dark", drift: "Drift from the evaluation", alarms: "Newest alarms", none: "no alarms",
    reward: "reward", unsafe: "unsafe responses", refusals: "refusals", length: "length, tokens", first_token_s: "first token, s",
    tokens_per_s: "tokens per second", thumbs_up: "thumbs up", votes: "votes", responses: "responses", p: "p (KS)", chance: "by chance up to",
    metric: "metric", level: "drift", levels: { none: "none", some: "some", much: "much" }, began: "began", ended: "ended", rule: "rule",
    value: "value", rings: "rings", at: "as of",
  },
  zh: {
    chat: "聊天", span: "时间", theme: "浅色或深色", drift: "与评估的漂移", alarms: "最新警报", none: "没有警报",
    reward: "奖励", unsafe: "不安全的回答", refusals: "拒绝", length: "长度（词元）", first_token_s: "首词元（秒）",
    tokens_per_s: "每秒词元", thumbs_up: "点赞", votes: "投票", responses: "回答", p: "p 值（KS）", chance: "随机上限",
    metric: "指标", level: "漂移", levels: { none: "无", some: "有些", much: "很大" }, began: "开始", ended: "结束", rule: "规则",
    value: "数值", rings: "进行中", at: "截至",
  },
};
const ORDER = ["unsafe", "refusals", "length", "first_token_s", "tokens_per_s", "thumbs_up", "votes", "responses"];
const FROM_ZERO = new Set(["unsafe", "refusals", "thumbs_up", "votes", "responses", "first_token_s", "tokens_per_s"]), COUNTS = new Set(["votes", "responses"]);
const REFRESH_MS = 30000, WIDTH = 320, HEIGHT = 130, LEFT = 38, RIGHT = 8, TOP = 8, BOTTOM = 18;
let found = null;

const number = (value) => (Math.abs(value) >= 1000 ? value.toFixed(0) : Number(value.toPrecision(3)).toString());
const interval = (one) => `${number(one.value)} [${number(one.low)}, ${number(one.high)}]`;
const name = (metric) => metric.startsWith("reward.") ? `${WORDS[language].reward}: ${metric.slice(7)}` : WORDS[language][metric];

function moment(seconds) {
  const clock = { hour: "2-digit", minute: "2-digit" };
  const options = { "1h": clock, "24h": { weekday: "short", ...clock } }[$("span").value] ?? { month: "short", day: "numeric" };
  return new Date(1000 * seconds).toLocaleString(language, options);
}

function draw(tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function range(metric, points) {
  let low = Math.min(...points.map((point) => point.low)), high = Math.max(...points.map((point) => point.high));
  if (FROM_ZERO.has(metric)) low = 0;
  if (high <= low) high = low + (Math.abs(low) || 1);
  return [low, high];
}

// Neighbours are joined by a line and a band; a bucket without responses is a gap, a bucket alone a bar.
function runs(points) {
  const parts = [];
  for (const point of points) {
    if (parts.at(-1)?.at(-1).place === point.place - 1) parts.at(-1).push(point);
    else parts.push([point]);
  }
  return parts;
}

function chart(metric, buckets) {
  const points = buckets.map((bucket, place) => ({ place, start: bucket.start, ...bucket.metrics[metric] })).filter((point) => point.n !== undefined);
  const [low, high] = range(metric, points);
  const x = (place) => LEFT + (place + 0.5) * (WIDTH - LEFT - RIGHT) / buckets.length;
  const y = (value) => HEIGHT - BOTTOM - (value - low) * (HEIGHT - TOP - BOTTOM) / (high - low);
  const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${name(metric)}: ${interval(found.whole[metric])}` });
  for (const value of [low, high]) {
    svg.append(draw("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }));
    svg.append(draw("text", { x: LEFT - 4, y: y(value) + 3, "text-anchor": "end" }, number(value)));
  }
  svg.append(draw("text", { x: LEFT, y: HEIGHT - 4 }, moment(buckets[0].start)));
  svg.append(draw("text", { x: WIDTH - RIGHT, y: HEIGHT - 4, "text-anchor": "end" }, moment(buckets.at(-1).end)));
  for (const part of runs(points)) {
    const line = part.map((point) => `${x(point.place)},${y(point.value)}`).join(" ");
    const band = [...part.map((point) => `${x(point.place)},${y(point.high)}`), ...part.toReversed().map((point) => `${x(point.place)},${y(point.low)}`)];
    if (part.length > 1) svg.append(draw("polygon", { class: "band", points: band.join(" ") }), draw("polyline", { class: "line", points: line }));
    else svg.append(draw("line", { class: "bar", x1: x(part[0].place), x2: x(part[0].place), y1: y(part[0].low), y2: y(part[0].high) }));
  }
  for (const point of points) {
    const dot = draw("circle", { class: "dot", cx: x(point.place), cy: y(point.value), r: 2.5 });
    dot.append(draw("title", {}, `${moment(point.start)}: ${COUNTS.has(metric) ? point.value : `${interval(point)}, n = ${point.n}`}`));
    svg.append(dot);
  }
  return svg;
}

function figure(metric) {
  const made = element("figure", "", "chart"), caption = element("figcaption"), whole = found.whole[metric];
  made.dataset.metric = metric;
  caption.append(element("span", name(metric), "name"), element("span", COUNTS.has(metric) ? number(whole.value) : interval(whole), "now"));
  made.append(caption, chart(metric, found.buckets));
  return made;
}

function fill(table, heads, rows) {
  const line = (tag, cells) => {
    const made = element("tr");
    made.append(...cells.map((cell) => cell instanceof Node ? cell : element(tag, cell)));
    return made;
  };
  table.replaceChildren(line("th", heads), ...rows.map((cells) => line("td", cells)));
}

function show() {
  const words = WORDS[language];
  translateAll(words);
  if (!found) return;
  const rewards = Object.keys(found.whole).filter((metric) => metric.startsWith("reward."));
  $("charts").replaceChildren(...[...rewards, ...ORDER].filter((metric) => found.whole[metric]).map(figure));
  const drifts = Object.entries(found.drift);
  $("drift").hidden = !drifts.length;
  fill($("drift").querySelector("table"), [words.metric, words.level, "PSI", words.chance, "KS", words.p, words.responses],
    drifts.map(([metric, one]) => [name(metric), element("td", words.levels[one.level], one.level), number(one.psi), number(one.chance), number(one.ks), number(one.p), String(one.n)]));
  $("alarms").querySelector("p").hidden = found.alarms.length > 0;
  $("alarms").querySelector("table").hidden = !found.alarms.length;
  const exactly = (seconds) => new Date(1000 * seconds).toLocaleString(language);
  fill($("alarms").querySelector("table"), [words.rule, words.value, words.began, words.ended],
    found.alarms.map((one) => [one.rule, number(one.value), exactly(one.began), one.ended ? exactly(one.ended) : element("td", words.rings, "rings")]));
  $("when").textContent = `${words.at} ${new Date(1000 * found.buckets.at(-1).end).toLocaleTimeString(language)}`;
}

async function load() {
  try {
    const answer = await fetch(`/v1/watch?span=${$("span").value}`);
    const content = await answer.json();
    if (!answer.ok) throw new Error(content.error.message);
    found = content;
    $("error").textContent = "";
  } catch (error) {
    $("error").textContent = error.message;
  }
  show();
}

onLanguage(show);
$("span").onchange = load;
setInterval(() => { if (!document.hidden) load(); }, REFRESH_MS);
load();
