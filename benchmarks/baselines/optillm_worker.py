"""Best-of-N as optillm 0.4.0 does it (`bon`): N answers in one request, then the policy grades them one by one.

It runs in optillm's environment.
"""

import json
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from openai import OpenAI
from optillm.bon import best_of_n_sampling


def answer(question: dict[str, Any]) -> dict[str, Any]:
    client = OpenAI(api_key="unused", base_url=f"{question['url']}/v1", max_retries=0, timeout=600)

    def one(_: int) -> Any:
        return best_of_n_sampling(
            "You are a helpful assistant.",
            question["prompt"],
            client,
            question["model"],
            question["n"],
            request_config={"max_tokens": question["max_tokens"]},
        )

    with ThreadPoolExecutor(question["requests"]) as threads:
        found = list(threads.map(one, range(question["requests"])))
    return {"tokens": [tokens for _, tokens in found], "text": found[0][0]}


def main() -> None:
    logging.disable(logging.INFO)  # a line for every request
    for line in sys.stdin:
        try:
            told = answer(json.loads(line))
        except Exception as error:  # noqa: BLE001 (whatever it is, the benchmark is told)
            told = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
