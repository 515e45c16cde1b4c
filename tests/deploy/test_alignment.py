import pytest

from cmamba_jax.deploy.alignment import MAX_GAP, Alignment
from cmamba_jax.errors import UserError


def add(alignment, time, *names):
    return [(t, set(step)) for t, step in alignment.add(time, dict.fromkeys(names))]


def test_a_step_closes_when_it_is_complete_and_all_before_it_are():
    a = Alignment(("x", "y"), max_delay=3)
    assert add(a, 5, "x") == []
    assert add(a, 6, "y") == [] and add(a, 6, "x") == []
    assert add(a, 5, "y") == [(5, {"x", "y"}), (6, {"x", "y"})]
    assert not a.waiting and not a.late


@pytest.mark.parametrize("max_delay", [0, 1, 3])
def test_a_step_waits_for_max_delay_newer_steps_and_no_longer(max_delay):
    a = Alignment(("x", "y"), max_delay)
    for time in range(max_delay + 1):
        assert add(a, time, "x") == []
    assert add(a, max_delay + 1, "x") == [(0, {"x"})]
    assert add(a, 0, "y") == [] and a.late == {"y": 1}
    assert add(a, 1, "y") == [(1, {"x", "y"})]


def test_gaps_are_steps_without_samples():
    a = Alignment(("x",), max_delay=0)
    assert add(a, 0, "x") == [(0, {"x"})]
    assert add(a, 3, "x") == [(1, set()), (2, set()), (3, {"x"})]


def test_memory_is_bounded_whatever_comes():
    a = Alignment(("x", "y"), max_delay=4)
    for time in (0, *range(10, 500, 7), *range(500, 0, -3), *range(400, 900)):
        add(a, time, "x")
        assert len(a.waiting) <= 5
    before = a.next
    with pytest.raises(UserError, match="steps ahead"):
        add(a, before + MAX_GAP + 1, "x")
    assert a.next == before and len(a.waiting) <= 5


def test_flush_and_restart():
    a = Alignment(("x", "y"), max_delay=9)
    assert a.flush() == [] and add(a, 2, "x") == [] and add(a, 4, "y") == []
    assert [time for time, _ in a.flush()] == [2, 3, 4] and not a.waiting
    add(a, 7, "x")
    a.restart()
    assert a.flush() == [] and add(a, 1, "x", "y") == [(1, {"x", "y"})]
