"use strict";
// What the pages have in common: small helpers, language, light and dark.
const $ = (id) => document.getElementById(id);
const kept = (key, other) => JSON.parse(localStorage.getItem(key) ?? JSON.stringify(other));
const keep = (key, value) => localStorage.setItem(key, JSON.stringify(value));
let language = kept("language", navigator.language.startsWith("zh") ? "zh" : "en");

function element(tag, text, className) {
  const made = document.createElement(tag);
  made.textContent = text ?? "";
  if (className) made.className = className;
  return made;
}

function translateAll(words) {
  document.documentElement.lang = language;
  $("language").textContent = language === "en" ? "中文" : "English";
  for (const each of document.querySelectorAll("[data-text]")) each.textContent = words[each.dataset.text];
  for (const each of document.querySelectorAll("[data-label]")) each.title = each.ariaLabel = words[each.dataset.label];
  for (const each of document.querySelectorAll("[data-hint]")) each.placeholder = each.ariaLabel = words[each.dataset.hint];
}

function onLanguage(translate) {
  $("language").onclick = () => { language = language === "en" ? "zh" : "en"; keep("language", language); translate(); };
}

$("theme").onclick = () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches, now = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
  keep("theme", document.documentElement.dataset.theme);
};
if (kept("theme", "")) document.documentElement.dataset.theme = kept("theme", "");
