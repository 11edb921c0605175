"""Token buckets: a bucket of 60 in 60 s refills by 1 a second; the expected numbers are computed by hand."""

import pytest

from server.http.token_buckets import TokenBucket


@pytest.fixture
def bucket() -> TokenBucket:
    return TokenBucket(60, 60, now_s=0)


def test_a_full_bucket_may_be_spent_at_once_and_is_then_empty(bucket: TokenBucket) -> None:
    assert bucket.wait_s(60, now_s=0) == 0
    bucket.take(60, now_s=0)
    assert bucket.wait_s(1, now_s=0) == 1
    assert bucket.wait_s(15, now_s=0) == 15


def test_it_refills_evenly_up_to_its_capacity(bucket: TokenBucket) -> None:
    bucket.take(60, now_s=0)
    assert bucket.wait_s(10, now_s=4) == 6
    assert bucket.wait_s(60, now_s=1000) == 0
    bucket.take(60, now_s=1000)
    assert bucket.wait_s(1, now_s=1000) == 1


def test_more_than_the_capacity_may_be_taken_from_a_full_bucket_and_leaves_a_debt(bucket: TokenBucket) -> None:
    assert bucket.wait_s(90, now_s=0) == 0
    bucket.take(90, now_s=0)
    assert bucket.wait_s(1, now_s=0) == 31
    assert bucket.wait_s(90, now_s=0) == 90  # until it is full again


def test_a_negative_amount_is_returned_to_the_bucket(bucket: TokenBucket) -> None:
    bucket.take(50, now_s=0)
    bucket.take(-40, now_s=0)
    assert bucket.wait_s(50, now_s=0) == 0
    bucket.take(-1000, now_s=0)
    bucket.take(60, now_s=0)
    assert bucket.wait_s(1, now_s=0) == 1
