// Training curves as SVG; pointing at one shows the values of its step in all of them.

import { html } from "./html.js";

const CHARTS = [
  { title: "Loss", unit: "nats per token", curves: [["train", "loss", "train"], ["evals", "val_loss", "held-out"]] },
  { title: "Speed", unit: "tokens per second", fromZero: true, curves: [["train", "tok_per_sec", ""]] },
  { title: "Learning rate", unit: "learning rate", fromZero: true, curves: [["train", "lr", ""]] },
  { title: "Gradient norm", unit: "norm before clipping", fromZero: true, curves: [["train", "norm", ""]] },
];
const HEIGHT = 240;
const MARGIN = { left: 66, right: 22, top: 12, bottom: 42 };

/** Draw the charts of a run; `run.train` and `run.evals` are lists by name, with null for gaps. */
export function drawCharts(container, run) {
  if (!container.clientWidth || !run.train.step.length) return;
  // Another width changes the layout, so the first chart is measured inside it.
  container.replaceChildren(...CHARTS.map(() => html("figure")));
  const width = container.firstChild.clientWidth;
  const charts = CHARTS.map((chart, i) => new Chart(container.children[i], chart, run, width));
  const point = (step) => charts.forEach((chart) => chart.point(step));
  for (const { svg, stepAt } of charts) {
    svg.addEventListener("pointermove", (event) => point(stepAt(event)));
    svg.addEventListener("pointerleave", () => point(null));
    svg.addEventListener("blur", () => point(null));
    let index = -1;
    svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 }[event.key];
      if (!move) return;
      event.preventDefault();
      index = Math.max(0, Math.min(run.train.step.length - 1, index + move));
      point(run.train.step[index]);
    });
  }
}

class Chart {
  constructor(figure, { title, unit, fromZero, curves }, run, width) {
    this.readout = html("output");
    const caption = html("figcaption", {}, html("b", {}, title), this.readout);
    this.curves = curves.map(([events, name, label]) => ({
      label,
      hasMarks: events === "evals",
      points: run[events].step.map((step, i) => [step, run[events][name][i]]).filter(([, y]) => y !== null),
    }));
    const values = this.curves.flatMap(({ points }) => points.map(([, y]) => y));
    this.yTicks = ticks(fromZero ? 0 : Math.min(...values), Math.max(...values), 4);
    const [yMin, yMax] = [this.yTicks[0], this.yTicks.at(-1)];
    const xMax = run.train.step.at(-1) + 1; // steps made
    const [right, bottom] = [width - MARGIN.right, HEIGHT - MARGIN.bottom];
    this.x = (step) => MARGIN.left + (step / xMax) * (right - MARGIN.left);
    this.y = (value) => bottom - ((value - yMin) / (yMax - yMin)) * (bottom - MARGIN.top);
    this.stepAt = ({ offsetX }) => ((offsetX - MARGIN.left) / (right - MARGIN.left)) * xMax;
    const xTicks = ticks(0, xMax, width / 110).filter((step) => step <= xMax);
    this.svg = element("svg", {
      width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, tabindex: 0, role: "img",
      "aria-label": `${title}: ${this.#summary()}`,
    });
    for (const value of this.yTicks) {
      const y = this.y(value);
      this.svg.append(element("line", { class: "grid", x1: MARGIN.left, x2: right, y1: y, y2: y }));
      this.svg.append(text(format(value), { x: MARGIN.left - 8, y: y + 4, "text-anchor": "end" }));
    }
    for (const step of xTicks) {
      this.svg.append(text(format(step), { x: this.x(step), y: bottom + 18, "text-anchor": "middle" }));
    }
    const middle = (MARGIN.top + bottom) / 2;
    this.svg.append(
      text("step", { x: (MARGIN.left + right) / 2, y: HEIGHT - 6, "text-anchor": "middle" }),
      text(unit, { x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})` }),
    );
    this.curves.forEach((curve, i) => this.#draw(curve, i));
    this.cursor = element("g", { class: "cursor", visibility: "hidden" });
    this.svg.append(this.cursor);
    this.point(null);
    figure.append(caption, this.svg);
  }

  /** Show the values at a step; null: the last ones. */
  point(step) {
    const found = this.curves.map((curve) => [curve, nearest(curve.points, step)]);
    const shown = found.filter(([, point]) => point);
    const values = shown.map(([curve, [, y]]) =>
      html("span", { className: `c${this.curves.indexOf(curve)}` }, ` ${curve.label} ${format(y)}`));
    this.readout.replaceChildren(...(shown.length ? [`step ${format(shown[0][1][0])}:`] : []), ...values);
    this.cursor.setAttribute("visibility", step === null ? "hidden" : "visible");
    if (step === null || !shown.length) return;
    const x = this.x(shown[0][1][0]);
    this.cursor.replaceChildren(
      element("line", { x1: x, x2: x, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }),
      ...shown.map(([curve, [stepShown, y]]) =>
        element("circle", { class: `c${this.curves.indexOf(curve)}`, cx: this.x(stepShown), cy: this.y(y), r: 4.5 })),
    );
  }

  #draw({ points, hasMarks, label }, i) {
    const d = points.map(([step, y], n) => `${n ? "L" : "M"}${this.x(step).toFixed(1)} ${this.y(y).toFixed(1)}`);
    this.svg.append(element("path", { class: `c${i}`, d: d.join("") }));
    if (!hasMarks || !points.length) return;
    const lowest = points.reduce((best, point) => (point[1] < best[1] ? point : best));
    for (const point of points) {
      const mark = element("circle", { class: `c${i} mark`, cx: this.x(point[0]), cy: this.y(point[1]), r: point === lowest ? 5 : 3 });
      const title = element("title");
      title.textContent = `${label} ${format(point[1])} at step ${format(point[0])}${point === lowest ? ", the best" : ""}`;
      mark.append(title);
      this.svg.append(mark);
    }
  }

  #summary() {
    const parts = this.curves.filter(({ points }) => points.length).map(({ label, points }) =>
      `${label} from ${format(points[0][1])} to ${format(points.at(-1)[1])}`.trim());
    return parts.join(", ");
  }
}

/** The point nearest to a step; the last one for null. */
function nearest(points, step) {
  if (step === null || !points.length) return points.at(-1);
  return points.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));
}

/** About `count` round numbers that span a range. */
function ticks(min, max, count) {
  const raw = (max - min || Math.abs(max) || 1) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw * 0.999);
  const first = Math.floor(min / step + 1e-9);
  const last = Math.max(first + 1, Math.ceil(max / step - 1e-9));
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

function format(value) {
  const digits = { maximumSignificantDigits: 4 };
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(1).replace(".0", "");
  return value.toLocaleString("en", Number.isInteger(value) ? {} : digits);
}

function element(name, attributes = {}) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

function text(content, attributes) {
  const node = element("text", attributes);
  node.textContent = content;
  return node;
}
