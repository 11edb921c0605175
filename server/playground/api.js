// Calls the public API: the served models, and the chunks of a streamed answer.

const TITLES = {
  400: "The request was refused",
  401: "The server requires an API key",
  403: "This key lacks the rights",
  404: "Not served here",
  413: "The request is too large",
  429: "The server is busy",
  503: "The server is not ready",
  504: "No candidate finished in time",
};
const INTERRUPTED = "The answer was interrupted";

/** Why there is no answer, for the user: a title, and a sentence that says what to do. */
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
    throw new Refusal("The server cannot be reached", "Check that it is running, and try again.");
  }
  if (reply.ok) return reply;
  const body = await reply.json().catch(() => ({}));
  throw new Refusal(
    TITLES[reply.status] ?? "The server failed",
    body.error?.message ?? `It answered with status ${reply.status}.`,
    { status: reply.status, retryAfterS: Number(reply.headers.get("Retry-After")) },
  );
}

/** The served model with its scorers, and the names of the strategies. */
export async function served(key) {
  const [models, schema] = await Promise.all(
    ["v1/models", "openapi.json"].map(async (path) => (await fetched(path, {}, key)).json()),
  );
  const { anyOf } = schema.components.schemas.NBestOptions.properties.strategy;
  return { model: models.data[0], strategies: anyOf.find((choice) => choice.enum).enum };
}

/** Yields the chunks of a streamed answer until it is complete. */
export async function* chunks(path, body, { key, signal }) {
  const options = { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, signal };
  const reply = await fetched(path, options, key);
  for await (const data of events(reply.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refusal(INTERRUPTED, chunk.error.message);
    yield chunk;
  }
  throw interrupted();
}

const interrupted = () => new Refusal(INTERRUPTED, "The connection ended before the answer was complete; try again.");

/** Yields the data of server-sent events; comments are skipped. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : interrupted();
    });
    if (done) return;
    text += value;
    const complete = text.split("\n\n");
    text = complete.pop();
    for (const event of complete) if (event.startsWith("data: ")) yield event.slice("data: ".length);
  }
}
