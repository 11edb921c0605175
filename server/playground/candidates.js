// The list of candidates: a row for each from the start, filled in as the events come.

import { counted, decimal, seconds } from "./format.js";

const ENDS = { stop: "ended by itself", length: "cut by max tokens", content_filter: "cut by a filter" };
const MOVE = { duration: 400, easing: "cubic-bezier(.2, .7, .2, 1)" };
/** How much of its bar the lowest reward still fills, so that it can be seen. */
const LEAST_SHARE = 0.03;

class Row {
  constructor(template, index, seed) {
    this.index = index;
    this.seed = seed;
    this.numTokens = 0;
    this.element = template.content.firstElementChild.cloneNode(true);
    this.element.dataset.index = index;
    this.part("place").textContent = index + 1;
    this.become("drawing", "");
  }

  part(name) {
    return this.element.querySelector(`.${name}`);
  }

  become(state, chip) {
    this.state = state;
    this.element.dataset.state = state;
    this.part("chip").textContent = chip;
  }

  finish({ text, finish_reason, num_tokens, cumulative_logprob }, elapsedS) {
    this.become("finished", finish_reason === "length" ? "cut" : "");
    this.numTokens = num_tokens;
    this.part("text").textContent = text.trim();
    const facts = [
      counted(num_tokens, "token"),
      `finished after ${seconds(elapsedS)}`,
      ENDS[finish_reason],
      cumulative_logprob === null ? null : `log-probability ${decimal(cumulative_logprob)}`,
      this.seed === null ? null : `seed ${this.seed}`,
    ];
    this.part("note").textContent = facts.filter(Boolean).join(" · ");
  }

  /** The answer is whole: what there is to tell is its end, the text has come before. */
  close(finishReason, elapsedS) {
    this.become("finished", finishReason === "length" ? "cut" : "");
    this.part("note").textContent = `finished after ${seconds(elapsedS)} · ${ENDS[finishReason]}`;
  }

  score(reward) {
    this.reward = reward;
    this.part("reward").textContent = reward === null ? "no reward" : decimal(reward);
  }

  fail(reason) {
    this.become("failed", "failed");
    this.part("text").textContent = reason;
  }

  cancel() {
    this.become("cancelled", "cancelled");
    this.part("text").textContent = "stopped before it finished";
  }

  spare() {
    this.become("spared", "not drawn");
    this.part("text").textContent = "not worth its tokens any more";
  }

  win() {
    this.become("winner", "winner");
    this.element.querySelector("details").open = true;
  }
}

/** The rows of one request. */
export class Candidates {
  #list;
  #rows = [];
  #ranking = [];

  constructor(list) {
    this.#list = list;
  }

  start(count, seed) {
    const template = document.getElementById("candidate");
    this.#ranking = [];
    this.#rows = Array.from({ length: count }, (_, index) => new Row(template, index, seed === null ? null : seed + index));
    this.#list.replaceChildren(...this.#rows.map((row) => row.element));
  }

  /** Takes an event of the stream. */
  hear(event, elapsedS) {
    const row = this.#rows[event.index];
    if (event.event === "finished") row.finish(event, elapsedS);
    if (event.event === "failed") row.fail(event.reason);
    if (event.event === "scored") {
      row.score(event.reward);
      this.#scaleBars();
    }
  }

  /** More text of the only candidate. */
  grow(text) {
    this.#rows[0].part("text").textContent += text;
  }

  /** The only candidate, of which all text has been told, is whole. */
  close({ finish_reason, reward }, elapsedS) {
    this.#rows[0].close(finish_reason, elapsedS);
    this.#rows[0].score(reward);
    this.#scaleBars();
  }

  /** All is known: the ranking, best first, that the last `numSpared` were not drawn, and that no other ends any more. */
  decide(ranking, numSpared) {
    this.#ranking = ranking;
    for (const row of this.#rows.slice(this.#rows.length - numSpared)) row.spare();
    this.end();
    this.#rows[ranking[0]].win();
  }

  /** Nothing more comes. */
  end() {
    for (const row of this.#rows) if (row.state === "drawing") row.cancel();
  }

  /** Puts the rows in order, and lets them be seen moving there. */
  sort(order) {
    const rest = this.#rows.filter((row) => !this.#ranking.includes(row.index));
    const best = [...this.#ranking.map((index) => this.#rows[index]), ...rest];
    const rows = order === "best" ? best : this.#rows;
    const tops = new Map(rows.map((row) => [row, row.element.getBoundingClientRect().top]));
    this.#list.append(...rows.map((row) => row.element));
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
    for (const [row, top] of tops) {
      const moved = top - row.element.getBoundingClientRect().top;
      if (moved) row.element.animate([{ transform: `translateY(${moved}px)` }, { transform: "none" }], MOVE);
    }
  }

  get numEnded() {
    return this.#rows.filter((row) => row.state !== "drawing").length;
  }

  get numTokens() {
    return this.#rows.reduce((sum, row) => sum + row.numTokens, 0);
  }

  /** The rewards that there are, in the order of drawing. */
  get rewards() {
    return this.#rows.map((row) => row.reward).filter((reward) => typeof reward === "number");
  }

  rewardOf(index) {
    return this.#rows[index].reward ?? null;
  }

  /** Bars go from the lowest reward of the pool to the highest: rewards have no zero and no end. */
  #scaleBars() {
    const low = Math.min(...this.rewards);
    const range = Math.max(...this.rewards) - low;
    for (const row of this.#rows) {
      if (typeof row.reward !== "number") continue;
      const share = range === 0 ? 1 : LEAST_SHARE + (1 - LEAST_SHARE) * ((row.reward - low) / range);
      row.part("fill").style.setProperty("--share", share);
    }
  }
}
