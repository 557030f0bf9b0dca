// The page: prompt and settings, kept in the address; tabs; one or two sheets of text.

import { drawCharts } from "./charts.js";
import { html } from "./html.js";
import { Sheet, copy } from "./sheet.js";

const POLL_MS = 5000;
const $ = (selector) => document.querySelector(selector);
const announce = (text) => ($("#live").textContent = text);

const sheets = [new Sheet(1, announce), new Sheet(2, announce)];
const form = $("#ask");
let run, etag, generation, lastSeed;

function controls() {
  return [...form.elements].filter((control) => control.name);
}

const read = (control) => (control.type === "checkbox" ? String(control.checked) : control.value);

function write(control, value) {
  if (control.type === "checkbox") control.checked = value === "true";
  else control.value = value;
}

// The address: what differs from the defaults.

const defaults = {};

function address(seed = "") {
  const params = new URLSearchParams();
  for (const control of controls()) {
    const isHidden = control.closest(".sheet")?.hidden;
    if (!isHidden && read(control) !== defaults[control.name]) params.set(control.name, read(control));
  }
  if (seed !== "") params.set("seed", seed);
  if (!$("#training").hidden) params.set("tab", "training");
  return `#${params}`;
}

const saveAddress = () => history.replaceState(null, "", address());

function readAddress() {
  const params = new URLSearchParams(location.hash.slice(1));
  for (const control of controls()) {
    if (!params.has(control.name)) continue;
    write(control, params.get(control.name));
    // A checkpoint that is gone by now.
    if (control.selectedIndex === -1) write(control, defaults[control.name]);
  }
  showTab(params.get("tab") === "training" ? "training" : "write");
}

// Settings.

function showSettings() {
  for (const output of document.querySelectorAll("label output")) {
    const input = output.nextElementSibling;
    if (input.name === "max_tokens") output.textContent = `${input.value} tokens`;
    else if (input.name !== "sample") output.textContent = input.valueAsNumber.toFixed(2);
  }
  sheets[1].element.hidden = !form.compare.checked;
  // The browser checks the ranges of what is not disabled, hidden or not.
  for (const control of Object.values(sheets[1].settings)) control.disabled = !form.compare.checked;
  $("#write").classList.toggle("comparing", form.compare.checked);
  $("#write").classList.toggle("tinted", form.tint.checked);
}

addEventListener("input", () => {
  showSettings();
  saveAddress();
});
// Another link, pasted into this page's address.
addEventListener("hashchange", () => location.reload());

$("#link").addEventListener("click", () => {
  const url = new URL(address(form.seed.value || lastSeed), location.href);
  copy(url.href, $("#link"), announce);
});

// Generate and stop.

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (generation) return generation.abort();
  const active = sheets.slice(0, form.compare.checked ? 2 : 1);
  const seed = form.seed.value.trim() || String(Math.floor(Math.random() * 1e6));
  if (!/^\d+$/.test(seed)) {
    return sheets[0].showError(`the seed is a whole number, not ${seed}`);
  }
  lastSeed = seed;
  const request = {
    prompt: form.prompt.value,
    max_tokens: form.max_tokens.valueAsNumber,
    seed: Number(seed),
    context: run.context,
    logprobs: run.max_logprobs,
  };
  generation = new AbortController();
  $("#go").textContent = "Stop";
  $("#go").classList.add("stop");
  announce("Generating");
  active[0].element.scrollIntoView({ block: "nearest" });
  await Promise.all(active.map((sheet) => sheet.generate(request, generation.signal)));
  generation = undefined;
  $("#go").textContent = "Generate";
  $("#go").classList.remove("stop");
});

addEventListener("keydown", (event) => {
  if (event.key === "Escape") generation?.abort();
  const isShortcut = event.key === "Enter" && (event.ctrlKey || event.metaKey);
  if (isShortcut && !generation && !$("#write").hidden) form.requestSubmit();
});

// Tabs.

const tabs = [...document.querySelectorAll("[role=tab]")];

function showTab(name) {
  for (const tab of tabs) {
    const isSelected = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", isSelected);
    tab.tabIndex = isSelected ? 0 : -1;
    document.getElementById(tab.getAttribute("aria-controls")).hidden = !isSelected;
  }
  if (name === "training" && run) showTraining();
}

for (const [i, tab] of tabs.entries()) {
  tab.addEventListener("click", () => {
    showTab(tab.id.slice("tab-".length));
    saveAddress();
  });
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const other = tabs.at((i + step) % tabs.length);
    other.focus();
    other.click();
  });
}

// The run.

async function loadRun() {
  const response = await fetch("run.json");
  if (!response.ok) throw new Error(response.statusText);
  if (response.headers.get("etag") === etag) return;
  etag = response.headers.get("etag");
  run = await response.json();
  for (const { settings } of sheets) {
    const { value } = settings.checkpoint;
    settings.checkpoint.replaceChildren(...run.checkpoints.map(([name, label]) => new Option(label, name)));
    if (run.checkpoints.some(([name]) => name === value)) settings.checkpoint.value = value;
  }
  showTraining();
}

function showTraining() {
  const hasMetrics = run.train.step.length > 0;
  $("#no-metrics").hidden = hasMetrics;
  $("progress").hidden = !hasMetrics;
  $("progress").value = run.progress;
  $(".tiles").replaceChildren(...run.tiles.map(tile));
  // Its width is that of the page, so it is drawn when it is shown.
  if (!$("#training").hidden) drawCharts($("#charts"), run);
  const slider = $("[name=sample]");
  $("#history").hidden = !run.samples.length;
  if (Number(slider.max) !== run.samples.length - 1) {
    slider.max = run.samples.length - 1;
    slider.value = 0;
  }
  showSample();
}

function tile([name, value, note]) {
  return html("div", {}, html("span", {}, name), html("b", {}, value), html("span", {}, note));
}

function showSample() {
  const sample = run.samples[$("[name=sample]").value];
  if (!sample) return;
  const [step, text] = sample;
  $("#history output").textContent = `${step.toLocaleString("en")} steps`;
  $("#history .text").textContent = text;
}

$("[name=sample]").addEventListener("input", showSample);
new ResizeObserver(() => run && drawCharts($("#charts"), run)).observe($("#charts"));

async function start() {
  $("#sheets").append(...sheets.map((sheet) => sheet.element));
  await loadRun();
  document.title = $("h1").textContent = run.title;
  $("#about").textContent = run.about;
  form.prompt.value = run.prompts[0] ?? "";
  form.prompt.maxLength = run.max_prompt_chars;
  form.max_tokens.max = run.max_new_tokens;
  form.tint.checked = run.tint;
  // Compare with the earliest checkpoint.
  sheets[1].settings.checkpoint.value = run.checkpoints.at(-1)[0];
  for (const text of run.prompts) {
    const button = html("button", { type: "button" }, text);
    button.addEventListener("click", () => {
      form.prompt.value = text;
      saveAddress();
    });
    $("#prompts").append(button);
  }
  for (const control of controls()) defaults[control.name] = read(control);
  readAddress();
  showSettings();
  document.body.classList.add("ready");
  setInterval(() => document.hidden || loadRun().catch(() => {}), POLL_MS);
}

start().catch((error) => ($("#about").textContent = `The page could not be loaded: ${error.message}`));
