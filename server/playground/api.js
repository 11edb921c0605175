// The public API as the page uses it: what is served, and an answer as its events.

const TITLES = {
  400: "The request was refused",
  401: "The server asks for a key",
  403: "This key may not do that",
  404: "That is not served here",
  413: "The request is too large",
  429: "The server is busy",
  503: "The server is not ready",
  504: "Nothing finished in time",
};
const BROKE_OFF = "The answer broke off";

/** Why there is no answer, in words: a title and a sentence with the way out. */
export class Refusal extends Error {
  constructor(title, message, { status = 0, retryAfterS = 0 } = {}) {
    super(message);
    this.title = title;
    this.status = status;
    this.retryAfterS = retryAfterS;
  }
}

async function fetched(path, options, key) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let reply;
  try {
    reply = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server cannot be reached", "See whether it runs, and try again.");
  }
  if (reply.ok) return reply;
  const told = await reply.json().catch(() => ({}));
  throw new Refusal(
    TITLES[reply.status] ?? "The server failed",
    told.error?.message ?? `It answered with status ${reply.status}.`,
    { status: reply.status, retryAfterS: Number(reply.headers.get("Retry-After")) },
  );
}

/** The served model and its scorers, and the strategies that requests may name. */
export async function served(key) {
  const [models, schema] = await Promise.all(
    ["v1/models", "openapi.json"].map(async (path) => (await fetched(path, {}, key)).json()),
  );
  const { anyOf } = schema.components.schemas.NBestOptions.properties.strategy;
  return { model: models.data[0], strategies: anyOf.find((choice) => choice.enum).enum };
}

/** The chunks of a streamed answer, until it is complete. */
export async function* chunks(path, body, { key, signal }) {
  const options = { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, signal };
  const reply = await fetched(path, options, key);
  for await (const data of events(reply.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refusal(BROKE_OFF, chunk.error.message);
    yield chunk;
  }
  throw brokenOff();
}

const brokenOff = () => new Refusal(BROKE_OFF, "The connection ended before the answer did; try again.");

/** The data of server-sent events; comments are skipped. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : brokenOff();
    });
    if (done) return;
    text += value;
    const complete = text.split("\n\n");
    text = complete.pop();
    for (const event of complete) if (event.startsWith("data: ")) yield event.slice("data: ".length);
  }
}
