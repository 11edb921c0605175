// The page at work: the form is sent, and its events become rows, figures and the curve.

import * as api from "./api.js";
import { Candidates } from "./candidates.js";
import { Curve } from "./curve.js";
import { counted, decimal, price, seconds, whole } from "./format.js";
import * as request from "./request.js";
import { asCurl, asPython } from "./snippets.js";

const TICK_MS = 100;
const STARTING_RETRY_MS = 2000;

const byId = (id) => document.getElementById(id);
const candidates = new Candidates(byId("candidates"));
const curve = new Curve(byId("curve"));
const form = byId("ask");
let model = null;
/** Stops the request under way; null where there is none. */
let stopping = null;

const inWords = (name) => name.replaceAll("_", " ");
const order = () => document.querySelector("[name=order]:checked").value;

async function meet() {
  try {
    const served = await api.served(request.key());
    model = served.model.id;
    byId("model").textContent = model;
    byId("reward_model").replaceChildren(...served.model.reward_models.map((name) => new Option(name)));
    byId("strategy").replaceChildren(...served.strategies.map((name) => new Option(inWords(name), name)));
    byId("problem").hidden = true;
    describe();
  } catch (refusal) {
    if (!(refusal instanceof api.Refusal)) throw refusal;
    show(refusal);
    byId("model").textContent = refusal.title;
    if (refusal.status === 503) setTimeout(meet, STARTING_RETRY_MS);
  }
}

/** Says in words why there is no answer. */
function show(refusal) {
  const [title, message] = byId("problem").children;
  title.textContent = refusal.title;
  message.textContent = refusal.message + (refusal.retryAfterS ? ` (In ${counted(refusal.retryAfterS, "second")}.)` : "");
  byId("problem").hidden = false;
  if (refusal.status === 401) {
    byId("more").open = true;
    byId("key").focus();
  }
}

/** What the form says now: on the button and as code. */
function describe() {
  const bestOf = byId("best_of").value || "N";
  byId("go").textContent = stopping ? "Stop" : bestOf === "1" ? "Draw one" : `Draw the best of ${bestOf}`;
  const strategy = byId("strategy").value;
  byId("reward_model").disabled = strategy === "majority";
  byId("stopping").disabled = strategy === "blockwise";
  byId("block_tokens").disabled = strategy !== "blockwise";
  const base = location.href.replace(/[?#].*$/, "").replace(/\/$/, "");
  const language = document.querySelector("[name=language]:checked").value;
  const write = language === "curl" ? asCurl : asPython;
  try {
    byId("others").setCustomValidity("");
    byId("snippet").textContent = write(base, request.kind(), request.body(model), Boolean(request.key()));
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    byId("others").setCustomValidity('Write a JSON object here, such as {"top_p": 0.9}, or nothing.');
    byId("snippet").textContent = "";
  }
}

async function draw() {
  const body = request.streamed(request.body(model));
  const begunMs = performance.now();
  const elapsedS = () => (performance.now() - begunMs) / 1000;
  const inBlocks = request.inBlocks(body);
  const rows = inBlocks ? 1 : body.best_of; // of blocks, the answer as it is chosen
  stopping = new AbortController();
  begin(rows);
  if (inBlocks) byId("status").textContent = `Choosing each block from ${counted(body.best_of, "candidate")} …`;
  const ticking = setInterval(() => { byId("figure-time").textContent = seconds(elapsedS()); }, TICK_MS);
  let firstS = null;
  let account = null;
  let usage = null;
  try {
    for await (const chunk of api.chunks(request.path(), body, { key: request.key(), signal: stopping.signal })) {
      usage = chunk.usage ?? usage;
      const [choice] = chunk.choices;
      if (chunk.nbest?.event) {
        firstS ??= elapsedS();
        candidates.hear(chunk.nbest, elapsedS());
        progress(rows);
      } else if (chunk.nbest) {
        account = chunk.nbest;
      }
      if (choice && rows === 1) {
        const text = choice.delta?.content ?? choice.text ?? "";
        if (text) firstS ??= elapsedS();
        candidates.grow(text);
        if (inBlocks && choice.finish_reason) candidates.close(choice, elapsedS());
      }
    }
    conclude(account, usage, firstS, inBlocks);
  } catch (error) {
    candidates.end();
    if (error.name === "AbortError") {
      byId("status").textContent = `Stopped after ${seconds(elapsedS())}; the server gave up the rest.`;
    } else if (error instanceof api.Refusal) {
      byId("run").hidden = candidates.rewards.length === 0;
      byId("status").textContent = "There is no answer.";
      show(error);
    } else {
      throw error;
    }
    if (candidates.rewards.length < 2) curve.start(0);
  } finally {
    clearInterval(ticking);
    stopping = null;
    document.body.removeAttribute("aria-busy");
    describe();
  }
}

function begin(bestOf) {
  document.body.setAttribute("aria-busy", "true");
  byId("problem").hidden = true;
  byId("empty").hidden = true;
  byId("run").hidden = false;
  curve.start(bestOf);
  byId("scale").textContent = "";
  for (const part of byId("figures").querySelectorAll("dd")) part.textContent = "";
  byId("figure-price-box").hidden = request.pricePerMillion() === null;
  candidates.start(bestOf, request.seed());
  byId("status").textContent = `Drawing ${counted(bestOf, "candidate")} …`;
  describe();
  if (matchMedia("(max-width: 820px)").matches) byId("results").scrollIntoView();
}

function progress(bestOf) {
  const { rewards } = candidates;
  const best = rewards.length ? `, best so far ${decimal(Math.max(...rewards))}` : "";
  byId("status").textContent = `${candidates.numEnded} of ${bestOf} ended${best}.`;
  if (rewards.length) byId("figure-reward").textContent = decimal(Math.max(...rewards));
  curve.show(rewards);
  tellTokens(candidates.numTokens);
}

function tellTokens(count) {
  byId("figure-tokens").textContent = whole(count);
  byId("figure-price").textContent = price((count * request.pricePerMillion()) / 1e6);
}

/** The account of the answer, in figures. */
function conclude(account, usage, firstS, inBlocks) {
  const { rewards } = candidates;
  const ranking = inBlocks ? [0] : account.ranking; // that of the last block says nothing of the answer
  const [winner] = ranking;
  candidates.decide(ranking, account.not_drawn);
  candidates.sort(order());
  if (rewards.length < 2) curve.start(0);

  const reward = candidates.rewardOf(winner);
  const mean = rewards.reduce((sum, one) => sum + one, 0) / rewards.length;
  byId("figure-reward").textContent = reward === null ? "none" : decimal(reward);
  byId("figure-reward-note").textContent =
    reward === null
      ? `ranked by ${account.ranked_by}`
      : `${inBlocks ? "" : `${decimal(mean)} on average · `}KL at most ${decimal(account.kl_upper_bound)} nats`;
  const { total, queue, generate, score } = account.timings_s;
  byId("figure-time").textContent = seconds(total);
  byId("figure-time-note").textContent =
    `first after ${seconds(firstS)} · queue ${decimal(queue)}, generate ${decimal(generate)}, score ${decimal(score)}`;
  tellTokens(usage.total_tokens);
  byId("figure-tokens-note").textContent =
    `${whole(usage.prompt_tokens)} prompt + ${whole(usage.completion_tokens)} drawn · ${whole(account.scored_tokens)} scored`;
  byId("figure-price-note").textContent = `prompt and drawn tokens at ${request.pricePerMillion()} a million`;
  if (inBlocks) {
    byId("status").textContent = `Written in ${counted(account.blocks, "block")}, each the best of ${account.best_of}.`;
    return;
  }
  const counts = ["completed", "failed", "cancelled", "not_drawn"]
    .filter((end) => account[end])
    .map((end) => `${account[end]} ${inWords(end)}`);
  const stop = account.stopped_by === "all" ? "" : `, stopped by ${inWords(account.stopped_by)}`;
  byId("status").textContent = `Candidate ${winner + 1} wins by ${inWords(account.strategy)}: ${counts.join(", ")}${stop}.`;
  byId("scale").textContent = rewards.length > 1 ? "Bars go from the lowest reward of these candidates to the highest." : "";
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (stopping) stopping.abort();
  else if (model) draw();
  else meet();
});
form.addEventListener("input", describe);
form.addEventListener("invalid", (event) => event.target.closest("details")?.setAttribute("open", ""), { capture: true });
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault(); // in a field of one line it would submit once more
    if (!stopping) form.requestSubmit();
  }
  if (event.key === "Escape") stopping?.abort();
});
byId("key").addEventListener("change", meet);
for (const radio of document.querySelectorAll("[name=order]")) {
  radio.addEventListener("change", () => candidates.sort(order()));
}
byId("copy").addEventListener("click", async () => {
  // Browsers give the clipboard to https and localhost only; elsewhere the code is selected, ready to be copied.
  try {
    await navigator.clipboard.writeText(byId("snippet").textContent);
    byId("copy").textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(byId("snippet"));
    byId("copy").textContent = "Selected";
  }
  setTimeout(() => { byId("copy").textContent = "Copy"; }, 2000);
});

request.remember();
meet();
