// Turns the form into a request body, and stores the price and the key in the browser.

const PRICE = "nbest.price";
const KEY = "nbest.key";

const field = (id) => document.getElementById(id);
const number = (id) => (field(id).value === "" ? null : Number(field(id).value));

export const kind = () => document.querySelector("[name=kind]:checked").value;
export const key = () => field("key").value.trim();
export const pricePerMillion = () => number("price");
export const seed = () => number("seed");
export const path = () => (kind() === "chat" ? "v1/chat/completions" : "v1/completions");

/** Restores the stored fields and stores later changes: the price in the browser, the key only in this tab. */
export function restoreStoredFields() {
  field("price").value = localStorage.getItem(PRICE) ?? "";
  field("key").value = sessionStorage.getItem(KEY) ?? "";
  field("price").addEventListener("input", () => localStorage.setItem(PRICE, field("price").value));
  field("key").addEventListener("input", () => sessionStorage.setItem(KEY, key()));
}

/** Values for the required options of the stopping policies. */
const STOPPING = {
  adaptive: () => ({}),
  speculative_rejection: () => ({ checkpoints: [Math.max(1, Math.round(number("max_tokens") / 4))] }),
  straggler_cut: () => ({ wait_share: 0.75 }),
};

export const inBlocks = (body) => body.nbest.strategy === "blockwise";

/**
 * The body of the request, without streaming.
 *
 * @throws {SyntaxError} the field of other fields is not a JSON object
 */
export function body(model) {
  const others = field("others").value.trim();
  const added = others ? JSON.parse(others) : {};
  if (added === null || typeof added !== "object" || Array.isArray(added)) throw new SyntaxError("not an object");
  const text = field("prompt").value;
  const prompt = kind() === "chat" ? { messages: [{ role: "user", content: text }] } : { prompt: text };
  const strategy = field("strategy").value;
  const policy = field("stopping").value;
  return {
    model,
    ...prompt,
    max_tokens: number("max_tokens"),
    temperature: number("temperature"),
    ...(seed() !== null && { seed: seed() }),
    best_of: number("best_of"),
    ...added,
    nbest: {
      // The strategy majority uses no reward model, and the server refuses a request that names one.
      ...(strategy !== "majority" && { reward_model: field("reward_model").value }),
      strategy,
      // Only blockwise has blocks, and it cannot be combined with a stopping policy.
      ...(strategy === "blockwise" && number("block_tokens") !== null && { block_tokens: number("block_tokens") }),
      ...(strategy !== "blockwise" && policy && { stopping: { policy, ...STOPPING[policy]() } }),
      ...(number("deadline_s") !== null && { deadline_s: number("deadline_s") }),
      ...added.nbest,
    },
  };
}

/** The same request as a stream with the events of every candidate; blockwise streams the chosen blocks instead. */
export function streamed(whole) {
  return {
    ...whole,
    stream: true,
    stream_options: { include_usage: true },
    nbest: { ...whole.nbest, ...(!inBlocks(whole) && { stream_candidates: true }) },
  };
}
