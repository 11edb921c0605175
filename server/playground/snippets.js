// The request as code to copy. The code never contains the key: it reads the key from the environment.

const KEY_VARIABLE = "NBEST_API_KEY";
const CLIENT_ARGUMENTS = ["model", "messages", "prompt", "max_tokens", "temperature", "seed"];

const PATHS = { chat: "/v1/chat/completions", completion: "/v1/completions" };

export function asCurl(base, kind, body, hasKey) {
  const key = hasKey ? ` \\\n  -H "Authorization: Bearer $${KEY_VARIABLE}"` : "";
  const json = JSON.stringify(body, null, 2).replaceAll("'", String.raw`'\''`);
  return `curl -s ${base}${PATHS[kind]} \\\n  -H 'Content-Type: application/json'${key} \\\n  -d '${json}'\n`;
}

export function asPython(base, kind, body, hasKey) {
  const extraFields = Object.entries(body).filter(([name]) => !CLIENT_ARGUMENTS.includes(name));
  const call = Object.entries({ ...body, extra_body: Object.fromEntries(extraFields) })
    .filter(([name]) => name === "extra_body" || CLIENT_ARGUMENTS.includes(name))
    .map(([name, value]) => `    ${name}=${literal(value, 1)},\n`);
  const [method, text] =
    kind === "chat" ? ["chat.completions", "message.content"] : ["completions", "text"];
  return [
    ...(hasKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${base}/v1", api_key=${hasKey ? `os.environ["${KEY_VARIABLE}"]` : '"unused"'})`,
    `reply = client.${method}.create(\n${call.join("")})`,
    `print(reply.choices[0].reward, reply.choices[0].${text})`,
    "",
  ].join("\n");
}

/** A JSON value in Python's syntax. */
function literal(value, depth) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const parts = Array.isArray(value)
    ? value.map((item) => literal(item, depth + 1))
    : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${literal(item, depth + 1)}`);
  const line = open + parts.join(", ") + close;
  if (line.length < 80 && !line.includes("\n")) return line;
  const indent = "    ".repeat(depth);
  return `${open}\n${parts.map((part) => `${indent}    ${part},\n`).join("")}${indent}${close}`;
}
