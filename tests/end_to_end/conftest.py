"""The server that the end-to-end tests share, and a client of it."""

from collections.abc import Iterator

import openai
import pytest

from server.config import Settings
from tests.end_to_end.served import Served, serve


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """One real server for all tests here, in float32, so that a candidate does not depend on its batch."""
    settings = Settings(
        reward_models={
            "movie-sentiment": "movie-sentiment",
            "likely": "logprob",
            "certain": "self_certainty",
            "judge": "judge:self",
        },
        dtype="float32",
        reward_dtype="float32",
        max_model_len=1024,
        kv_cache_gib=1,
        max_num_seqs=32,
        max_best_of=32,
    )
    with serve(settings) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0) as client:
        yield client
