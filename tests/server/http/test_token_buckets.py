"""Token buckets: 60 in 60 s is one a second; all worked by hand."""

import pytest

from server.http.api_keys import Bucket


@pytest.fixture
def bucket() -> Bucket:
    return Bucket(60, 60, now_s=0)


def test_all_of_it_may_be_spent_at_once_and_then_none(bucket: Bucket) -> None:
    assert bucket.wait_s(60, now_s=0) == 0
    bucket.take(60, now_s=0)
    assert bucket.wait_s(1, now_s=0) == 1
    assert bucket.wait_s(15, now_s=0) == 15


def test_it_refills_evenly_and_not_beyond_its_capacity(bucket: Bucket) -> None:
    bucket.take(60, now_s=0)
    assert bucket.wait_s(10, now_s=4) == 6
    assert bucket.wait_s(60, now_s=1000) == 0
    bucket.take(60, now_s=1000)
    assert bucket.wait_s(1, now_s=1000) == 1


def test_more_than_it_holds_may_be_taken_when_it_is_full_and_is_a_debt(bucket: Bucket) -> None:
    assert bucket.wait_s(90, now_s=0) == 0
    bucket.take(90, now_s=0)
    assert bucket.wait_s(1, now_s=0) == 31
    assert bucket.wait_s(90, now_s=0) == 90  # until it is full again


def test_what_was_not_used_is_given_back(bucket: Bucket) -> None:
    bucket.take(50, now_s=0)
    bucket.take(-40, now_s=0)
    assert bucket.wait_s(50, now_s=0) == 0
    bucket.take(-1000, now_s=0)
    bucket.take(60, now_s=0)
    assert bucket.wait_s(1, now_s=0) == 1
