// The form as a request body, and what the page remembers of it.

const PRICE = "nbest.price";
const KEY = "nbest.key";

const field = (id) => document.getElementById(id);
const number = (id) => (field(id).value === "" ? null : Number(field(id).value));

export const kind = () => document.querySelector("[name=kind]:checked").value;
export const key = () => field("key").value.trim();
export const pricePerMillion = () => number("price");
export const seed = () => number("seed");
export const path = () => (kind() === "chat" ? "v1/chat/completions" : "v1/completions");

/** The price stays in this browser, the key in this tab. */
export function remember() {
  field("price").value = localStorage.getItem(PRICE) ?? "";
  field("key").value = sessionStorage.getItem(KEY) ?? "";
  field("price").addEventListener("input", () => localStorage.setItem(PRICE, field("price").value));
  field("key").addEventListener("input", () => sessionStorage.setItem(KEY, key()));
}

/** Options of the stopping policies, where a policy has no default for what it needs. */
const STOPPING = {
  adaptive: () => ({}),
  speculative_rejection: () => ({ checkpoints: [Math.max(1, Math.round(number("max_tokens") / 4))] }),
  straggler_cut: () => ({ wait_share: 0.75 }),
};

export const inBlocks = (body) => body.nbest.strategy === "blockwise";

/**
 * The request for a whole answer.
 *
 * @throws {SyntaxError} the other fields are no JSON object
 */
export function body(model) {
  const others = field("others").value.trim();
  const added = others ? JSON.parse(others) : {};
  if (added === null || typeof added !== "object" || Array.isArray(added)) throw new SyntaxError("not an object");
  const text = field("prompt").value;
  const asked = kind() === "chat" ? { messages: [{ role: "user", content: text }] } : { prompt: text };
  const strategy = field("strategy").value;
  const policy = field("stopping").value;
  return {
    model,
    ...asked,
    max_tokens: number("max_tokens"),
    temperature: number("temperature"),
    ...(seed() !== null && { seed: seed() }),
    best_of: number("best_of"),
    ...added,
    nbest: {
      // Counting votes asks no reward model, and the server refuses to name one beside it.
      ...(strategy !== "majority" && { reward_model: field("reward_model").value }),
      strategy,
      // Blocks are drawn whole, and nothing but them has a length.
      ...(strategy === "blockwise" && number("block_tokens") !== null && { block_tokens: number("block_tokens") }),
      ...(strategy !== "blockwise" && policy && { stopping: { policy, ...STOPPING[policy]() } }),
      ...(number("deadline_s") !== null && { deadline_s: number("deadline_s") }),
      ...added.nbest,
    },
  };
}

/** The same request for a stream that tells what becomes of every candidate; blocks tell what has been chosen. */
export function streamed(whole) {
  return {
    ...whole,
    stream: true,
    stream_options: { include_usage: true },
    nbest: { ...whole.nbest, ...(!inBlocks(whole) && { stream_candidates: true }) },
  };
}
