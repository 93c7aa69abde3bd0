from __future__ import annotations

from diffalign.trainers.batches import Draw, RowStream, micro_batches

SQUARE, WIDE = (8, 8), (6, 10)


def flat(stream: RowStream, steps: int) -> list[Draw]:
    return [draw for step in range(steps) for draw in stream.step(step)]


def test_each_epoch_visits_every_example_once():
    draws = flat(RowStream([SQUARE] * 10, 4, seed=0), 5)
    for epoch in (0, 1):
        assert sorted(d.example for d in draws if d.epoch == epoch) == list(range(10))
    assert [d.example for d in draws[:10]] != [d.example for d in draws[10:]]


def test_a_step_is_the_same_however_it_is_reached():
    stream = RowStream([SQUARE] * 10, 4, seed=3)
    late = stream.step(7)
    stream.step(0)
    assert RowStream([SQUARE] * 10, 4, seed=3).step(7) == late == stream.step(7)
    assert RowStream([SQUARE] * 10, 4, seed=4).step(7) != late


def test_the_order_depends_on_the_global_batch_only_through_buckets():
    """One bucket: steps of 8 and pairs of steps of 4 see the same rows in the same order."""
    buckets = [SQUARE] * 11
    assert flat(RowStream(buckets, 8, 0), 3) == flat(RowStream(buckets, 4, 0), 6)


def test_buckets_come_in_runs_of_a_global_batch():
    buckets = [SQUARE] * 8 + [WIDE] * 8
    stream = RowStream(buckets, 4, seed=0)
    for step in range(4):
        assert len({buckets[d.example] for d in stream.step(step)}) == 1
    assert len({tuple(buckets[d.example] for d in stream.step(s)) for s in range(4)}) == 2  # and the runs are mixed


def test_a_data_set_smaller_than_the_batch_is_visited_again_as_another_epoch():
    draws = RowStream([SQUARE] * 3, 8, seed=0).step(0)
    assert len(draws) == 8
    assert len(set(draws)) == 8


def test_micro_batches_have_one_shape_and_lose_nothing():
    buckets = [SQUARE, WIDE, SQUARE, WIDE, SQUARE]
    draws = [Draw(i, 0) for i in range(5)]
    parts = list(micro_batches(draws, buckets, 2))
    assert all(len({buckets[d.example] for d in part}) == 1 and len(part) <= 2 for part in parts)
    assert sorted(d.example for part in parts for d in part) == list(range(5))
