// The expected reward of the best of n, for every n up to the number of candidates: a curve, a sentence and a table.

import { expectedMax } from "./estimators.js";
import { decimal } from "./format.js";

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { left: 48, right: 20, top: 16, bottom: 30 };
const NUM_GRID_LINES = 4;

export class Curve {
  #figure;
  #plot;
  #points = [];

  constructor(figure) {
    this.#figure = figure;
    this.#plot = figure.querySelector("#curve-plot");
    new ResizeObserver(() => this.#draw()).observe(this.#plot);
  }

  /** Shows the curve of these rewards; it needs at least two. */
  show(rewards) {
    if (rewards.length < 2) return;
    this.#points = rewards.map((_, index) => ({ n: index + 1, reward: expectedMax(rewards, index + 1) }));
    this.#figure.querySelector("figcaption").textContent = this.#sentence();
    this.#figure.querySelector("tbody").replaceChildren(
      ...this.#points.map(({ n, reward }) => {
        const row = document.createElement("tr");
        row.append(...[n, decimal(reward, 3)].map((text) => Object.assign(document.createElement("td"), { textContent: text })));
        return row;
      }),
    );
    this.#draw();
  }

  /** Empties the figure; it is hidden if fewer than two rewards are expected. */
  start(num) {
    this.#figure.hidden = num < 2;
    this.#points = [];
    for (const part of this.#figure.querySelectorAll("#curve-plot, figcaption, tbody")) part.replaceChildren();
  }

  #sentence() {
    const first = this.#points[0];
    const last = this.#points.at(-1);
    const half = this.#points.find(({ reward }) => reward >= (first.reward + last.reward) / 2);
    return (
      `Mean reward over all ways to draw n of these ${last.n}: ${decimal(first.reward)} for one sample, ` +
      `${decimal(last.reward)} for the best of ${last.n}; n = ${half.n} reaches half of the gain.`
    );
  }

  #draw() {
    const { clientWidth: width, clientHeight: height } = this.#plot;
    if (!width || !this.#points.length) return;
    const first = this.#points[0];
    const last = this.#points.at(-1);
    const range = last.reward - first.reward || 1;
    const x = (n) => MARGIN.left + (Math.log2(n) / Math.log2(last.n)) * (width - MARGIN.left - MARGIN.right);
    const floor = height - MARGIN.bottom;
    const y = (reward) => floor - ((reward - first.reward) / range) * (floor - MARGIN.top);
    const line = this.#points.map(({ n, reward }) => `${x(n)},${y(reward)}`).join(" ");

    const svg = drawn("svg", { width, height, role: "img" });
    svg.setAttribute("aria-label", this.#sentence());
    for (let step = 0; step <= NUM_GRID_LINES; step += 1) {
      const reward = first.reward + (range * step) / NUM_GRID_LINES;
      svg.append(drawn("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(reward), y2: y(reward) }));
      svg.append(drawn("text", { class: "y", x: MARGIN.left - 8, y: y(reward) + 4 }, decimal(reward)));
    }
    for (const n of ticks(last.n, (width - MARGIN.left) / 40)) {
      svg.append(drawn("text", { class: "x", x: x(n), y: height - 8 }, n));
    }
    svg.append(drawn("polygon", { class: "area", points: `${x(1)},${floor} ${line} ${x(last.n)},${floor}` }));
    svg.append(drawn("polyline", { class: "line", points: line }));
    for (const { n, reward } of this.#points) {
      const dot = drawn("circle", { cx: x(n), cy: y(reward), r: this.#points.length > 20 ? 2.5 : 4 });
      dot.append(drawn("title", {}, `best of ${n}: ${decimal(reward, 3)}`));
      svg.append(dot);
    }
    this.#plot.replaceChildren(svg);
  }
}

/** The labels of the x axis: powers of two, and the last n if there is room for it. */
function ticks(last, room) {
  const powers = Array.from({ length: Math.floor(Math.log2(last)) + 1 }, (_, power) => 2 ** power);
  const gap = Math.log2(last / powers.at(-1)) / Math.log2(last);
  return gap * room > 1 ? [...powers, last] : powers;
}

function drawn(name, attributes, text = "") {
  const element = document.createElementNS(SVG, name);
  for (const [attribute, value] of Object.entries(attributes)) element.setAttribute(attribute, value);
  element.textContent = text;
  return element;
}
