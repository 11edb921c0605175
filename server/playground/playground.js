// The controller of the page: sends the form, and shows the events of the answer as rows, figures and the curve.

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
const form = byId("request");
let model = null;
/** The AbortController of the request in flight, or null. */
let inFlight = null;

const inWords = (name) => name.replaceAll("_", " ");
const order = () => document.querySelector("[name=order]:checked").value;

/** Loads the served model, scorers and strategies into the form; retries while the server starts. */
async function loadServed() {
  try {
    const served = await api.served(request.key());
    model = served.model.id;
    byId("model").textContent = model;
    byId("reward_model").replaceChildren(...served.model.reward_models.map((name) => new Option(name)));
    byId("strategy").replaceChildren(...served.strategies.map((name) => new Option(inWords(name), name)));
    byId("problem").hidden = true;
    updateForm();
  } catch (refusal) {
    if (!(refusal instanceof api.Refusal)) throw refusal;
    showRefusal(refusal);
    byId("model").textContent = refusal.title;
    if (refusal.status === 503) setTimeout(loadServed, STARTING_RETRY_MS);
  }
}

/** Shows why there is no answer. */
function showRefusal(refusal) {
  const [title, message] = byId("problem").children;
  title.textContent = refusal.title;
  message.textContent = refusal.message + (refusal.retryAfterS ? ` (Retry in ${counted(refusal.retryAfterS, "second")}.)` : "");
  byId("problem").hidden = false;
  if (refusal.status === 401) {
    byId("more").open = true;
    byId("key").focus();
  }
}

/** Updates the button, the enabled fields and the code to the values of the form. */
function updateForm() {
  const bestOf = byId("best_of").value || "N";
  byId("go").textContent = inFlight ? "Stop" : bestOf === "1" ? "Draw one" : `Draw the best of ${bestOf}`;
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

/** Sends the request of the form, and shows its answer as it arrives. */
async function draw() {
  const body = request.streamed(request.body(model));
  const startMs = performance.now();
  const elapsedS = () => (performance.now() - startMs) / 1000;
  const inBlocks = request.inBlocks(body);
  const rows = inBlocks ? 1 : body.best_of; // blockwise has one row: the answer, which grows by each chosen block
  inFlight = new AbortController();
  showStart(rows);
  if (inBlocks) byId("status").textContent = `Choosing each block from ${counted(body.best_of, "candidate")} …`;
  const ticking = setInterval(() => { byId("figure-time").textContent = seconds(elapsedS()); }, TICK_MS);
  let firstS = null;
  let account = null;
  let usage = null;
  try {
    for await (const chunk of api.chunks(request.path(), body, { key: request.key(), signal: inFlight.signal })) {
      usage = chunk.usage ?? usage;
      const [choice] = chunk.choices;
      if (chunk.nbest?.event) {
        firstS ??= elapsedS();
        candidates.update(chunk.nbest, elapsedS());
        showProgress(rows);
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
    showResult(account, usage, firstS, inBlocks);
  } catch (error) {
    candidates.end();
    if (error.name === "AbortError") {
      byId("status").textContent = `Stopped after ${seconds(elapsedS())}; the server cancels the rest.`;
    } else if (error instanceof api.Refusal) {
      byId("run").hidden = candidates.rewards.length === 0;
      byId("status").textContent = "There is no answer.";
      showRefusal(error);
    } else {
      throw error;
    }
    if (candidates.rewards.length < 2) curve.start(0);
  } finally {
    clearInterval(ticking);
    inFlight = null;
    document.body.removeAttribute("aria-busy");
    updateForm();
  }
}

/** Empties the results and shows that `bestOf` candidates are being drawn. */
function showStart(bestOf) {
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
  updateForm();
  if (matchMedia("(max-width: 820px)").matches) byId("results").scrollIntoView();
}

/** Shows the candidates that have ended, the best reward so far and the tokens. */
function showProgress(bestOf) {
  const { rewards } = candidates;
  const best = rewards.length ? `, best so far ${decimal(Math.max(...rewards))}` : "";
  byId("status").textContent = `${candidates.numEnded} of ${bestOf} ended${best}.`;
  if (rewards.length) byId("figure-reward").textContent = decimal(Math.max(...rewards));
  curve.show(rewards);
  showTokens(candidates.numTokens);
}

function showTokens(count) {
  byId("figure-tokens").textContent = whole(count);
  byId("figure-price").textContent = price((count * request.pricePerMillion()) / 1e6);
}

/** Shows the winner and the account of the request. */
function showResult(account, usage, firstS, inBlocks) {
  const { rewards } = candidates;
  const ranking = inBlocks ? [0] : account.ranking; // with blockwise, the ranking is that of the last block
  const [winner] = ranking;
  candidates.decide(ranking, account.not_drawn);
  candidates.sort(order());
  if (rewards.length < 2) curve.start(0);

  const reward = candidates.rewardOf(winner);
  const mean = rewards.reduce((sum, value) => sum + value, 0) / rewards.length;
  byId("figure-reward").textContent = reward === null ? "none" : decimal(reward);
  byId("figure-reward-note").textContent =
    reward === null
      ? `ranked by ${account.ranked_by}`
      : `${inBlocks ? "" : `${decimal(mean)} on average · `}KL at most ${decimal(account.kl_upper_bound)} nats`;
  const { total, queue, generate, score } = account.timings_s;
  byId("figure-time").textContent = seconds(total);
  byId("figure-time-note").textContent =
    `first after ${seconds(firstS)} · queue ${decimal(queue)}, generate ${decimal(generate)}, score ${decimal(score)}`;
  showTokens(usage.total_tokens);
  byId("figure-tokens-note").textContent =
    `${whole(usage.prompt_tokens)} prompt + ${whole(usage.completion_tokens)} drawn · ${whole(account.scored_tokens)} scored`;
  byId("figure-price-note").textContent = `prompt and drawn tokens, ${request.pricePerMillion()} per million`;
  if (inBlocks) {
    byId("status").textContent = `The answer has ${counted(account.blocks, "block")}, each the best of ${account.best_of}.`;
    return;
  }
  const counts = ["completed", "failed", "cancelled", "not_drawn"]
    .filter((end) => account[end])
    .map((end) => `${account[end]} ${inWords(end)}`);
  const stop = account.stopped_by === "all" ? "" : `, stopped by ${inWords(account.stopped_by)}`;
  byId("status").textContent = `Candidate ${winner + 1} wins by ${inWords(account.strategy)}: ${counts.join(", ")}${stop}.`;
  byId("scale").textContent = rewards.length > 1 ? "Bars are scaled from the lowest reward of these candidates to the highest." : "";
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (inFlight) inFlight.abort();
  else if (model) draw();
  else loadServed();
});
form.addEventListener("input", updateForm);
form.addEventListener("invalid", (event) => event.target.closest("details")?.setAttribute("open", ""), { capture: true });
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault(); // in a single-line field, Enter would submit a second time
    if (!inFlight) form.requestSubmit();
  }
  if (event.key === "Escape") inFlight?.abort();
});
byId("key").addEventListener("change", loadServed);
for (const radio of document.querySelectorAll("[name=order]")) {
  radio.addEventListener("change", () => candidates.sort(order()));
}
byId("copy").addEventListener("click", async () => {
  // Browsers allow clipboard access on https and localhost only; elsewhere the code is selected for manual copying.
  try {
    await navigator.clipboard.writeText(byId("snippet").textContent);
    byId("copy").textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(byId("snippet"));
    byId("copy").textContent = "Selected";
  }
  setTimeout(() => { byId("copy").textContent = "Copy"; }, 2000);
});

request.restoreStoredFields();
// Not by the autofocus attribute: the browser complains about it where the user has already focused another field.
if (document.activeElement === document.body) byId("prompt").focus();
loadServed();
