// A token's probability and the most likely tokens at its place.

import { html } from "./html.js";

const SYMBOLS = { "": "…", "\n": "↵", " ": "␣" };
const GAP = 8;
const tip = document.getElementById("tip");

/** Show the tip of a token's element above it, or below where there is no room. */
export function showTip(span) {
  const { text, probability, alternatives } = span.token;
  const rows = Object.entries(alternatives).map(([name, logprob]) => [name, Math.exp(logprob)]);
  rows.sort(([, a], [, b]) => b - a); // objects list digits first
  const heading = html("b", {}, `${visible(text)}  ${percent(probability)}`);
  tip.replaceChildren(heading, ...rows.flatMap(row));
  tip.hidden = false;
  const token = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const { width, height } = tip.getBoundingClientRect();
  const left = token.left + token.width / 2 - width / 2;
  const above = token.top - height - GAP;
  tip.style.left = `${Math.max(GAP, Math.min(left, document.documentElement.clientWidth - width - GAP))}px`;
  tip.style.top = `${above > GAP ? above : token.bottom + GAP}px`;
}

export function hideTip() {
  tip.hidden = true;
}

function row([name, probability]) {
  const bar = html("span");
  bar.style.width = `${100 * probability}px`;
  return [html("span", {}, visible(name)), html("span", {}, percent(probability)), bar];
}

const percent = (probability) => `${(100 * probability).toFixed(1)}%`;
const visible = (text) => SYMBOLS[text] ?? text.replaceAll("\n", "↵").replaceAll(" ", "␣");
