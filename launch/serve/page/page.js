"use strict";
const RATINGS = ["significantly", "better", "slightly", "negligibly"], LABELS = ["helpful", "safe", "unsafe"];
const WORDS = {
  en: {
    model: "model", other: "second model", compare: "side by side", user: "your name", fresh: "new", history: "history", dashboard: "dashboard",
    theme: "light or dark", say: "Say something: Enter sends, Shift+Enter is a new line", send: "send", stop: "stop",
    which: "Which response is better? Keys 1 to 8", thanks: "Thank you.", same: "the same, another sample",
    significantly: "significantly better", better: "better", slightly: "slightly better", negligibly: "negligibly better / unsure",
    helpful: "helpful", safe: "safe", unsafe: "unsafe",
    upWord: "good", downWord: "bad", editWord: "edit", up: "good (Alt+↑)", down: "bad (Alt+↓)", edit: "say it better (Alt+Enter)", save: "save (Ctrl+Enter)", cancel: "cancel (Esc)",
  },
  zh: {
    model: "模型", other: "第二个模型", compare: "并排比较", user: "您的名字", fresh: "新对话", history: "历史", dashboard: "仪表板",
    theme: "浅色或深色", say: "请输入：回车发送，Shift+回车换行", send: "发送", stop: "停止",
    which: "哪个回答更好？按键 1 到 8", thanks: "谢谢。", same: "同一模型，另一个样本",
    significantly: "好得多", better: "更好", slightly: "稍好", negligibly: "几乎一样 / 不确定",
    helpful: "有帮助", safe: "安全", unsafe: "不安全",
    upWord: "好", downWord: "不好", editWord: "改写", up: "好（Alt+↑）", down: "不好（Alt+↓）", edit: "改写（Alt+回车）", save: "保存（Ctrl+回车）", cancel: "取消（Esc）",
  },
};
let talk = { id: Date.now(), turns: [] };
let pair = null, stopping = null;

function translate() {
  const words = WORDS[language];
  translateAll(words);
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
  } else {
    made.append(element("div", turn.content, "text"));
    if (turn.id) made.append(tools(turn, made.firstChild));
  }
  $("talk").append(made);
  $("talk").scrollTop = $("talk").scrollHeight;
  return made;
}

// Thumbs and an edit for one response. What is saved goes on as the dialogue.
function tools(turn, text) {
  const made = element("div", "", "tools");
  const words = WORDS[language];
  const button = (kind, run) => {
    const one = element("button", words[`${kind}Word`]);
    Object.assign(one, { type: "button", onclick: run, title: words[kind], ariaLabel: words[kind] });
    Object.assign(one.dataset, { label: kind, text: `${kind}Word` });
    made.append(one);
    return one;
  };
  const mark = () => { for (const one of thumbs) one.ariaPressed = String(turn.thumb === one.dataset.label); };
  const thumbs = ["up", "down"].map((kind) => button(kind, async () => {
    if (!await send({ first: turn.id, thumb: kind })) return;
    turn.thumb = kind;
    mark();
    remember();
  }));
  button("edit", () => { if (!text.hidden) edit(turn, text); });
  mark();
  return made;
}

function edit(turn, text) {
  const form = element("form", "", "edit"), box = element("textarea"), words = WORDS[language];
  const close = () => { form.remove(); text.hidden = false; $("text").focus(); };
  box.value = turn.content;
  box.rows = Math.min(12, 2 + turn.content.split("\n").length);
  form.append(box, ...["save", "cancel"].map((kind) => {
    const button = element("button", words[kind]);
    button.type = kind === "save" ? "submit" : "button";
    button.dataset.text = kind;
    if (kind === "cancel") button.onclick = close;
    return button;
  }));
  form.onsubmit = async (event) => {
    event.preventDefault();
    const better = box.value.trim();
    if (better && better !== turn.content && !await send({ first: turn.id, edit: better })) return;
    if (better) turn.content = text.textContent = better;
    close();
    remember();
  };
  box.onkeydown = (event) => {
    if (event.key === "Escape") { event.stopPropagation(); close(); }
    if (event.key === "Enter" && event.ctrlKey) { event.preventDefault(); form.requestSubmit(); }
  };
  text.hidden = true;
  text.after(form);
  box.focus();
}

async function send(vote) {
  const user = $("user").value.trim();
  const answer = await fetch("/v1/votes", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ ...vote, ...(user ? { user } : {}) }),
  });
  $("error").textContent = answer.ok ? "" : (await answer.json()).error.message;
  return answer.ok;
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
    const parts = [...shown.children];
    const found = await Promise.all(models.map((model, side) => respond(model, (now) => { parts[side].textContent = now; }, stopping.signal)));
    if (both) {
      pair = { found, shown };
      $("thanks").textContent = "";
      drawRatings();
      $("verdict").hidden = false;
      $("talk").scrollTop = $("talk").scrollHeight;
    }
    const reply = { role: "assistant", content: found[0].text, ...(both ? { pair: found.map((each) => each.text) } : { id: found[0].id }) };
    talk.turns.push(reply);
    if (!both) shown.append(tools(reply, parts[0]));
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
  const { found: [first, second], shown } = pair;
  const checked = (side) => [...$(side).querySelectorAll("input:checked")].map((box) => box.name);
  const labels = { first: checked("first"), second: checked("second") };
  if (!await send({ first: first.id, second: second.id, chosen, rating, labels })) return;
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
  if (event.key !== "Enter" || event.shiftKey || event.altKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
};
document.onkeydown = (event) => {
  if (event.key === "Escape") stopping?.abort();
  const kind = event.altKey && { ArrowUp: "up", ArrowDown: "down", Enter: "edit" }[event.key];
  const newest = kind && $("talk").lastElementChild?.querySelector(`.tools [data-label=${kind}]`);
  if (newest) {
    event.preventDefault();
    newest.click();
    return;
  }
  const typing = event.target.matches("input:not([type=checkbox]), .edit textarea") || (event.target.matches("textarea") && $("text").value);
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
onLanguage(translate);
$("user").onchange = () => keep("user", $("user").value);

(async () => {
  $("user").value = kept("user", "");
  const models = (await (await fetch("/v1/models")).json()).data.map((each) => each.id);
  $("model").replaceChildren(...models.map((name) => new Option(name, name)));
  $("other").replaceChildren(new Option("", ""), ...models.slice(1).map((name) => new Option(name, name)));
  translate();
  drawPast();
})();
