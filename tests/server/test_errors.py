"""Errors travel between processes with everything a client is to be told."""

import pickle

import pytest

from server.errors import ContextLengthError, DeadlineError, NbestError, OverloadedError, http_status


@pytest.mark.parametrize(
    "error",
    [
        ContextLengthError("Shorten it.", param="messages"),
        OverloadedError("Come back.", retry_after_s=7),
        DeadlineError("Too late."),
    ],
)
def test_an_error_survives_the_trip_to_another_process(error: NbestError) -> None:
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert vars(arrived) == vars(error)
    assert (str(arrived), http_status(arrived)) == (str(error), http_status(error))
