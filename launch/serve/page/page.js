"use strict";
const RATINGS = ["significantly", "better", "slightly", "negligibly"], LABELS = ["helpful", "safe", "unsafe"];
const WORDS = {
  en: {
    model: "model", other: "second model", compare: "side by side", user: "your name", fresh: "new", history: "history",
    theme: "light or dark", say: "Say something: Enter sends, Shift+Enter is a new line", send: "send", stop: "stop",
    which: "Which response is better? Keys 1 to 8", thanks: "Thank you.", same: "the same, another sample",
    significantly: "significantly better", better: "better", slightly: "slightly better", negligibly: "negligibly better / unsure",
    helpful: "helpful", safe: "safe", unsafe: "unsafe",
  },
  zh: {
    model: "模型", other: "第二个模型", compare: "并排比较", user: "您的名字", fresh: "新对话", history: "历史",
    theme: "浅色或深色", say: "请输入：回车发送，Shift+回车换行", send: "发送", stop: "停止",
    which: "哪个回答更好？按键 1 到 8", thanks: "谢谢。", same: "同一模型，另一个样本",
    significantly: "好得多", better: "更好", slightly: "稍好", negligibly: "几乎一样 / 不确定",
    helpful: "有帮助", safe: "安全", unsafe: "不安全",
  },
};
const $ = (id) => document.getElementById(id);
const kept = (key, other) => JSON.parse(localStorage.getItem(key) ?? JSON.stringify(other));
const keep = (key, value) => localStorage.setItem(key, JSON.stringify(value));
let language = kept("language", navigator.language.startsWith("zh") ? "zh" : "en");
let talk = { id: Date.now(), turns: [] };
let pair = null, stopping = null;

function element(tag, text, className) {
  const made = document.createElement(tag);
  made.textContent = text ?? "";
  if (className) made.className = className;
  return made;
}

function translate() {
  const words = WORDS[language];
  document.documentElement.lang = language;
  $("language").textContent = language === "en" ? "中文" : "English";
  for (const each of document.querySelectorAll("[data-text]")) each.textContent = words[each.dataset.text];
  for (const each of document.querySelectorAll("[data-label]")) each.title = each.ariaLabel = words[each.dataset.label];
  for (const each of document.querySelectorAll("[data-hint]")) each.placeholder = each.ariaLabel = words[each.dataset.hint];
  if ($("other").options.length) $("other").options[0].textContent = words.same;
  drawRatings();
}

function drawRatings() {
  const words = WORDS[language];
  const buttons = [...RATINGS.map((rating) => ["first", rating]), ...RATINGS.toReversed().map((rating) => ["second", rating])];
  $("ratings").replaceChildren(...buttons.map(([chosen, rating], place) => {
    const button = element("button", `${chosen === "first" ? "← " : ""}${words[rating]}${chosen === "second" ? " →" : ""}`);
    button.dataset.vote = `${chosen} ${rating}`;
    button.title = `${place + 1}`;
    button.onclick = () => vote(chosen, rating);
    return button;
  }));
  for (const side of ["first", "second"]) {
    $(side).replaceChildren(...LABELS.map((label) => {
      const box = document.createElement("input"), whole = element("label");
      box.type = "checkbox";
      box.name = label;
      whole.append(box, ` ${words[label]}`);
      return whole;
    }));
  }
}

function show(turn) {
  const made = element("div", "", `turn ${turn.role}`);
  if (turn.pair) {
    made.classList.add("pair");
    made.append(...turn.pair.map((text, side) => element("div", text, turn.chosen === side ? "chosen" : "")));
  } else made.textContent = turn.content;
  $("talk").append(made);
  $("talk").scrollTop = $("talk").scrollHeight;
  return made;
}

function remember() {
  const past = kept("past", []).filter((each) => each.id !== talk.id);
  keep("past", [talk, ...past].slice(0, 50));
  drawPast();
}

function drawPast() {
  $("past").replaceChildren(...kept("past", []).map((each) => {
    const button = element("button", each.turns[0]?.content ?? "…");
    button.onclick = () => open(each);
    return button;
  }));
}

function open(other) {
  stopping?.abort();
  talk = other;
  pair = null;
  $("verdict").hidden = true;
  $("talk").replaceChildren();
  talk.turns.forEach(show);
  $("text").focus();
}

async function respond(model, onText, signal) {
  const user = $("user").value.trim();
  const messages = talk.turns.map((turn) => ({ role: turn.role, content: turn.content }));
  const answer = await fetch("/v1/chat/completions", {
    method: "POST", signal, headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ model, messages, stream: true, ...(user ? { user } : {}) }),
  });
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "", rest = "", id = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return { text, id: `${id}:0` };
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event === "data: [DONE]") continue;
      const chunk = JSON.parse(event.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      id = chunk.id;
      text += chunk.choices[0]?.delta.content ?? "";
      onText(text);
    }
  }
}

async function ask(text) {
  const turn = { role: "user", content: text };
  talk.turns.push(turn);
  const said = show(turn);
  const both = $("compare").checked, models = [$("model").value];
  if (both) models.push($("other").value || $("model").value);
  const shown = show(both ? { role: "assistant", pair: ["", ""] } : { role: "assistant", content: "" });
  stopping = new AbortController();
  busy(true);
  try {
    const parts = both ? [...shown.children] : [shown];
    const found = await Promise.all(models.map((model, side) => respond(model, (now) => { parts[side].textContent = now; }, stopping.signal)));
    if (both) {
      pair = { found, shown };
      $("thanks").textContent = "";
      drawRatings();
      $("verdict").hidden = false;
      $("talk").scrollTop = $("talk").scrollHeight;
    }
    talk.turns.push({ role: "assistant", content: found[0].text, ...(both ? { pair: found.map((each) => each.text) } : {}) });
    remember();
  } catch (error) {
    talk.turns.pop();
    said.remove();
    shown.remove();
    $("text").value ||= text;
    if (error.name !== "AbortError") $("error").textContent = error.message;
  } finally {
    busy(false);
  }
}

function busy(now) {
  $("stop").hidden = !now;
  $("send").hidden = now;
  if (now) $("error").textContent = "";
}

async function vote(chosen, rating) {
  if (!pair) return;
  const { found: [first, second], shown } = pair, user = $("user").value.trim();
  const checked = (side) => [...$(side).querySelectorAll("input:checked")].map((box) => box.name);
  const labels = { first: checked("first"), second: checked("second") };
  const answer = await fetch("/v1/votes", {
    method: "POST", headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ first: first.id, second: second.id, chosen, rating, labels, ...(user ? { user } : {}) }),
  });
  if (!answer.ok) {
    $("error").textContent = (await answer.json()).error.message;
    return;
  }
  const side = chosen === "first" ? 0 : 1, last = talk.turns.at(-1);
  pair = null;
  shown.children[side].classList.add("chosen");
  Object.assign(last, { content: [first, second][side].text, chosen: side });
  $("thanks").textContent = WORDS[language].thanks;
  remember();
  setTimeout(() => { if (!pair) $("verdict").hidden = true; }, 1500);
  $("text").focus();
}

$("ask").onsubmit = (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || !$("stop").hidden) return;
  $("text").value = "";
  $("verdict").hidden = true;
  pair = null;
  ask(text);
};
$("text").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
};
document.onkeydown = (event) => {
  if (event.key === "Escape") stopping?.abort();
  const typing = event.target.matches("input:not([type=checkbox])") || (event.target.matches("textarea") && $("text").value);
  if (!pair || typing || event.ctrlKey || event.altKey || event.metaKey || !/^[1-8]$/.test(event.key)) return;
  event.preventDefault();
  $("ratings").children[event.key - 1].click();
};
$("stop").onclick = () => stopping?.abort();
$("new").onclick = () => open({ id: Date.now(), turns: [] });
$("history").onclick = () => {
  $("past").hidden = !$("past").hidden;
  $("history").ariaExpanded = String(!$("past").hidden);
};
$("compare").onchange = () => { $("other").hidden = !$("compare").checked; };
$("language").onclick = () => { language = language === "en" ? "zh" : "en"; keep("language", language); translate(); };
$("theme").onclick = () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches, now = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
  keep("theme", document.documentElement.dataset.theme);
};
$("user").onchange = () => keep("user", $("user").value);

(async () => {
  $("user").value = kept("user", "");
  if (kept("theme", "")) document.documentElement.dataset.theme = kept("theme", "");
  const models = (await (await fetch("/v1/models")).json()).data.map((each) => each.id);
  $("model").replaceChildren(...models.map((name) => new Option(name, name)));
  $("other").replaceChildren(new Option("", ""), ...models.slice(1).map((name) => new Option(name, name)));
  translate();
  drawPast();
})();
