// One generated text: its settings, tokens, status and buttons.

import { html } from "./html.js";
import { complete } from "./stream.js";
import { hideTip, showTip } from "./tip.js";

const BINS = [0.05, 0.15, 0.35, 0.65, 0.9]; // probabilities between the six tints
const PLACEHOLDER =
  "Generated text appears here. Point at a word, or tap it, to see how likely it was, and what else might have come.";

export class Sheet {
  /** `number` 2 is the one to compare with; `announce` tells screen readers. */
  constructor(number, announce) {
    const { content } = document.getElementById("sheet");
    this.element = content.cloneNode(true).firstElementChild;
    this.announce = announce;
    this.settings = {};
    for (const control of this.element.querySelectorAll("[name]")) {
      this.settings[control.name] = control;
      if (number > 1) control.name += number;
    }
    this.text = this.element.querySelector(".text");
    this.error = this.element.querySelector(".error");
    this.status = this.element.querySelector(".status");
    this.text.setAttribute("aria-label", `Generated text ${number}`);
    this.text.textContent = PLACEHOLDER;
    this.text.classList.add("blank");
    this.written = ""; // prompt and continuation, for the buttons
    this.#followText();
    this.#exploreTokens();
    this.#addButtons();
  }

  /** Generate a text with these settings; resolves when it is complete, stopped or refused. */
  async generate({ prompt, max_tokens, seed, context, logprobs }, signal) {
    const { checkpoint, temperature, top_k, top_p } = this.settings;
    const request = {
      model: checkpoint.value,
      prompt,
      max_tokens,
      temperature: temperature.valueAsNumber,
      top_k: top_k.valueAsNumber,
      top_p: top_p.valueAsNumber,
      seed,
      logprobs,
      stream: true,
      stream_options: { include_usage: true },
    };
    this.showError("");
    this.status.textContent = "Reading the prompt …";
    let start = performance.now(), count = 0, usage = {}, reason, note = "";
    const showStatus = () => {
      const speed = Math.round((1000 * count) / (performance.now() - start));
      const parts = [`${count} tokens`, `${speed.toLocaleString("en")} tokens/s`, `seed ${seed}`];
      this.status.textContent = [...parts, ...(note ? [note] : [])].join(" · ");
    };
    try {
      for await (const event of complete(request, signal)) {
        if (event.queue) {
          this.status.textContent = `Waiting in the queue: number ${event.queue}`;
          start = performance.now();
          continue;
        }
        if (!count) this.#begin(prompt, `${checkpoint.value}-seed-${seed}.txt`);
        for (const choice of event.choices) {
          this.#append(choice.logprobs);
          count += choice.logprobs.tokens.length;
          reason = choice.finish_reason;
        }
        usage = event.usage ?? usage;
        showStatus();
      }
      if (!reason) throw new Error("the server has stopped: start it again");
      if (reason === "length" && count < max_tokens) note = "the time was up";
      else if (usage.total_tokens > context + 1) {  // the last token is never read
        note = `over ${context} tokens of context, the oldest forgotten`;
      }
    } catch (error) {
      note = signal.aborted ? "stopped" : "incomplete";
      if (!signal.aborted) this.showError(error.message);
    }
    this.text.removeAttribute("aria-busy");
    if (count) showStatus();
    else this.status.textContent = signal.aborted ? `stopped · seed ${seed}` : "";
    this.announce(this.status.textContent);
  }

  showError(message) {
    this.error.textContent = message;
    this.error.hidden = !message;
  }

  #begin(prompt, fileName) {
    this.written = prompt;
    this.fileName = fileName;
    this.text.replaceChildren(html("span", { className: "prompt" }, prompt));
    this.text.classList.remove("blank");
    this.text.setAttribute("aria-busy", "true"); // shows the caret
    this.isFollowing = true;
    for (const button of this.element.querySelectorAll("button")) button.disabled = false;
  }

  #append({ tokens, token_logprobs, top_logprobs }) {
    const spans = tokens.map((token, i) => {
      const probability = Math.exp(token_logprobs[i]);
      const bin = BINS.filter((bound) => probability >= bound).length;
      const span = html("span", { className: `t s${bin}` }, token);
      span.classList.toggle("line", token.startsWith("\n"));
      span.token = { text: token, probability, alternatives: top_logprobs[i] };
      return span;
    });
    this.text.append(...spans);
    this.written += tokens.join("");
    if (this.isFollowing) this.text.scrollTop = this.text.scrollHeight;
  }

  /** Scroll with the growing text, unless the reader has scrolled up. */
  #followText() {
    let last = 0;
    this.text.addEventListener("scroll", () => {
      const { scrollTop, scrollHeight, clientHeight } = this.text;
      if (scrollTop < last) this.isFollowing = false;
      if (scrollHeight - scrollTop - clientHeight < 8) this.isFollowing = true;
      last = scrollTop;
    });
  }

  /** Tips on hover and with the arrow keys; tokens are not tab stops. */
  #exploreTokens() {
    const select = (span) => {
      this.text.querySelector(".current")?.classList.remove("current");
      span?.classList.add("current");
      if (span) showTip(span);
      else hideTip();
    };
    for (const type of ["pointerover", "click"]) {
      this.text.addEventListener(type, (event) => select(event.target.closest(".t")));
    }
    this.text.addEventListener("pointerleave", () => select(null));
    this.text.addEventListener("scroll", hideTip);
    this.text.addEventListener("blur", () => select(null));
    this.text.addEventListener("keydown", (event) => {
      const current = this.text.querySelector(".current");
      const { key } = event;
      if (key === "Escape") select(null);
      if (key !== "ArrowLeft" && key !== "ArrowRight") return;
      event.preventDefault();
      const isBack = key === "ArrowLeft";
      const next = current?.[isBack ? "previousElementSibling" : "nextElementSibling"];
      const span = current ? next : this.text.querySelector(".t");
      if (!span?.token) return;
      span.scrollIntoView({ block: "nearest" });
      select(span);
      const percent = (100 * span.token.probability).toFixed(1);
      this.announce(`${span.token.text}: ${percent} percent`);
    });
  }

  #addButtons() {
    const [copyButton, download] = this.element.querySelectorAll("button");
    copyButton.disabled = download.disabled = true;
    copyButton.addEventListener("click", () => copy(this.written, copyButton, this.announce));
    download.addEventListener("click", () => {
      const href = URL.createObjectURL(new Blob([this.written], { type: "text/plain" }));
      const link = html("a", { href, download: this.fileName });
      link.click();
      URL.revokeObjectURL(href);
    });
  }
}

/** Copy a text, and say so on the button for a moment. */
export async function copy(text, button, announce) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Browsers have no clipboard for plain HTTP, except on this machine.
    const area = html("textarea", { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const label = button.textContent;
  if (label === "Copied") return;
  button.textContent = "Copied";
  announce("Copied");
  setTimeout(() => (button.textContent = label), 1500);
}
