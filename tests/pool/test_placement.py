"""Placement: the policy first, then the most free space; a refusal explains each device."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockvirt.errors import PoolFull
from blockvirt.pool.placement import Candidate, Policy, choose
from blockvirt.units import GIB, MIB

FAST = Candidate("1", "fast", 10 * GIB, {"tier": "ssd"})
LARGE = Candidate("2", "large", 100 * GIB, {"tier": "disk"})
BROKEN = Candidate("3", "broken", 900 * GIB, {"tier": "ssd"}, problem="the directory cannot be reached")


@pytest.mark.parametrize(
    ("policy", "chosen"),
    [
        (Policy(), LARGE),
        (Policy(devices=("fast",)), FAST),
        (Policy(devices=("fast", "large")), LARGE),
        (Policy(labels={"tier": "ssd"}), FAST),
        (Policy(devices=("fast", "broken"), labels={"tier": "ssd"}), FAST),
    ],
)
def test_the_policy_decides_then_the_space(policy: Policy, chosen: Candidate) -> None:
    assert choose([FAST, LARGE, BROKEN], policy, MIB) is chosen


def test_a_refusal_says_why_of_each() -> None:
    with pytest.raises(PoolFull) as caught:
        choose([FAST, LARGE, BROKEN], Policy(("fast", "broken", "typo"), {"tier": "ssd"}), 20 * GIB)
    assert caught.value.details["devices"] == {
        "fast": "has 10GiB left",
        "large": "is not among the devices of the volume's placement",
        "broken": "cannot be used: the directory cannot be reached",
        "typo": "is no device of this pool",
    }
    assert "fast has 10GiB left" in caught.value.cause
    with pytest.raises(PoolFull, match="no device can take 1MiB") as caught:
        choose([], Policy(), MIB)
    assert caught.value.cause == "the pool has no device"
    with pytest.raises(PoolFull) as caught:
        choose([LARGE], Policy(labels={"tier": "ssd", "rack": "1"}), 1)
    assert "rack=1, tier=ssd" in caught.value.cause


CANDIDATES = st.lists(
    st.builds(
        Candidate,
        st.just("x"),
        st.sampled_from("abcdef"),
        st.integers(0, 5),
        st.dictionaries(st.sampled_from("kl"), st.sampled_from("12"), max_size=2),
        st.sampled_from(["", "", "broken"]),
    ),
    max_size=5,
    unique_by=lambda candidate: candidate.name,
)
POLICIES = st.builds(
    Policy,
    st.lists(st.sampled_from("abcdef"), max_size=3).map(tuple),
    st.dictionaries(st.sampled_from("kl"), st.sampled_from("12"), max_size=1),
)


@given(CANDIDATES, POLICIES, st.integers(1, 5))
def test_what_is_chosen_fits_and_nothing_better_does(
    candidates: list[Candidate], policy: Policy, needed_bytes: int
) -> None:
    fitting = [
        candidate
        for candidate in candidates
        if not candidate.problem
        and candidate.free_bytes >= needed_bytes
        and (not policy.devices or candidate.name in policy.devices)
        and all(candidate.labels.get(key) == value for key, value in policy.labels.items())
    ]
    if not fitting:
        with pytest.raises(PoolFull) as caught:
            choose(candidates, policy, needed_bytes)
        assert {candidate.name for candidate in candidates} <= caught.value.details["devices"].keys()
        return
    chosen = choose(candidates, policy, needed_bytes)
    assert chosen in fitting
    assert chosen.free_bytes == max(candidate.free_bytes for candidate in fitting)
    assert choose(candidates[::-1], policy, needed_bytes) is chosen
