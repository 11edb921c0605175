"""Best-of-N by optillm 0.4.0 (`bon`): N answers in one request, then the policy grades them one at a time.

This script runs in optillm's environment.
"""

import json
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from openai import OpenAI
from optillm.bon import best_of_n_sampling


def answer(request: dict[str, Any]) -> dict[str, Any]:
    client = OpenAI(api_key="unused", base_url=f"{request['url']}/v1", max_retries=0, timeout=600)

    def best_of_n(_: int) -> Any:
        return best_of_n_sampling(
            "You are a helpful assistant.",
            request["prompt"],
            client,
            request["model"],
            request["n"],
            request_config={"max_tokens": request["max_tokens"]},
        )

    with ThreadPoolExecutor(request["requests"]) as threads:
        results = list(threads.map(best_of_n, range(request["requests"])))
    return {"tokens": [tokens for _, tokens in results], "text": results[0][0]}


def main() -> None:
    logging.disable(logging.INFO)  # it logs a line for every request
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:  # noqa: BLE001 (every failure is reported to the benchmark)
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
