"""Batch plans: every sample once, one length a batch."""

import numpy as np
import pytest

from cmamba_jax.data import plan

PADDED = plan.bucket_lengths(np.random.default_rng(0).integers(1, 41, 103), (40, 10, 20))


def rows(batches):
    return np.concatenate([batch.rows[batch.rows != plan.FILLER] for batch in batches])


def test_bucket_lengths():
    lengths = np.array([1, 10, 11, 20, 3])
    np.testing.assert_array_equal(plan.bucket_lengths(lengths, (20, 10)), [10, 10, 20, 20, 10])
    np.testing.assert_array_equal(plan.bucket_lengths(lengths, ()), [20] * 5)


@pytest.mark.parametrize("batch_size", [1, 8, 200])
def test_every_sample_once_per_epoch(batch_size):
    for epoch in range(3):
        batches = plan.train_plan(PADDED, batch_size, seed=1, epoch=epoch)
        assert sorted(rows(batches)) == list(range(103))
        for batch in batches:
            assert batch.rows.shape == (batch_size,)
            assert set(PADDED[batch.rows[batch.rows != plan.FILLER]]) == {batch.length}


def test_the_number_of_batches_is_constant_and_fillers_are_few():
    sizes = {len(plan.train_plan(PADDED, 8, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert sizes == {sum(-(-count // 8) for count in np.unique(PADDED, return_counts=True)[1])}


def test_order_depends_on_seed_and_epoch_alone():
    orders = {(s, e): tuple(rows(plan.train_plan(PADDED, 8, seed=s, epoch=e))) for s in range(3) for e in range(3)}
    assert len(set(orders.values())) == 9
    assert orders[2, 1] == tuple(rows(plan.train_plan(PADDED, 8, seed=2, epoch=1)))


def test_buckets_are_mixed():
    lengths = [batch.length for batch in plan.train_plan(PADDED, 8, seed=0, epoch=0)]
    assert lengths != sorted(lengths) and set(lengths) == {10, 20, 40}


def test_evaluation_keeps_the_order():
    batches = plan.eval_plan(PADDED, 8)
    np.testing.assert_array_equal(rows(batches), np.arange(103))
    assert len(batches) == 13
    for batch in batches:
        assert batch.length == PADDED[batch.rows[batch.rows != plan.FILLER]].max()
