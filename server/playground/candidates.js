// The list of candidates: one row for each, filled in as the events of the stream arrive.

import { counted, decimal, seconds } from "./format.js";

const FINISH_REASONS = { stop: "complete", length: "cut by max tokens", content_filter: "cut by a content filter" };
const MOVE = { duration: 400, easing: "cubic-bezier(.2, .7, .2, 1)" };
/** The share of its bar that the lowest reward fills, so that it is visible. */
const MIN_SHARE = 0.03;

class Row {
  constructor(template, index, seed) {
    this.index = index;
    this.seed = seed;
    this.numTokens = 0;
    this.element = template.content.firstElementChild.cloneNode(true);
    this.element.dataset.index = index;
    this.part("number").textContent = index + 1;
    this.setState("drawing", "");
  }

  part(name) {
    return this.element.querySelector(`.${name}`);
  }

  setState(state, chip) {
    this.state = state;
    this.element.dataset.state = state;
    this.part("chip").textContent = chip;
  }

  finish({ text, finish_reason, num_tokens, cumulative_logprob }, elapsedS) {
    this.setState("finished", finish_reason === "length" ? "cut" : "");
    this.numTokens = num_tokens;
    this.part("text").textContent = text.trim();
    const facts = [
      counted(num_tokens, "token"),
      `finished after ${seconds(elapsedS)}`,
      FINISH_REASONS[finish_reason],
      cumulative_logprob === null ? null : `log-probability ${decimal(cumulative_logprob)}`,
      this.seed === null ? null : `seed ${this.seed}`,
    ];
    this.part("note").textContent = facts.filter(Boolean).join(" · ");
  }

  /** Ends a row whose text has already been added by `grow`. */
  close(finishReason, elapsedS) {
    this.setState("finished", finishReason === "length" ? "cut" : "");
    this.part("note").textContent = `finished after ${seconds(elapsedS)} · ${FINISH_REASONS[finishReason]}`;
  }

  score(reward) {
    this.reward = reward;
    this.part("reward").textContent = reward === null ? "no reward" : decimal(reward);
  }

  fail(reason) {
    this.setState("failed", "failed");
    this.part("text").textContent = reason;
  }

  cancel() {
    this.setState("cancelled", "cancelled");
    this.part("text").textContent = "cancelled before it finished";
  }

  spare() {
    this.setState("spared", "not drawn");
    this.part("text").textContent = "not drawn, by the stopping policy";
  }

  win() {
    this.setState("winner", "winner");
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

  /** Updates the row of a candidate that finished, failed or was scored. */
  update(event, elapsedS) {
    const row = this.#rows[event.index];
    if (event.event === "finished") row.finish(event, elapsedS);
    if (event.event === "failed") row.fail(event.reason);
    if (event.event === "scored") {
      row.score(event.reward);
      this.#scaleBars();
    }
  }

  /** Adds text to the only row. */
  grow(text) {
    this.#rows[0].part("text").textContent += text;
  }

  /** Ends the only row, whose text is complete. */
  close({ finish_reason, reward }, elapsedS) {
    this.#rows[0].close(finish_reason, elapsedS);
    this.#rows[0].score(reward);
    this.#scaleBars();
  }

  /** Shows the result: the ranking, best first; the last `numSpared` rows were not drawn. */
  decide(ranking, numSpared) {
    this.#ranking = ranking;
    for (const row of this.#rows.slice(this.#rows.length - numSpared)) row.spare();
    this.end();
    this.#rows[ranking[0]].win();
  }

  /** Marks the candidates that have not ended as cancelled. */
  end() {
    for (const row of this.#rows) if (row.state === "drawing") row.cancel();
  }

  /** Sorts the rows, with an animation of their moves. */
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

  /** The rewards received so far, in the order of drawing. */
  get rewards() {
    return this.#rows.map((row) => row.reward).filter((reward) => typeof reward === "number");
  }

  rewardOf(index) {
    return this.#rows[index].reward ?? null;
  }

  /** Scales the bars from the lowest reward of the list to the highest, since rewards have no natural zero or maximum. */
  #scaleBars() {
    const low = Math.min(...this.rewards);
    const range = Math.max(...this.rewards) - low;
    for (const row of this.#rows) {
      if (typeof row.reward !== "number") continue;
      const share = range === 0 ? 1 : MIN_SHARE + (1 - MIN_SHARE) * ((row.reward - low) / range);
      row.part("fill").style.setProperty("--share", share);
    }
  }
}
