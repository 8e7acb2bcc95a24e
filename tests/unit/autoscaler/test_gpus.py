"""Test which GPUs a replica gets, and which claim wins if two replicas chose the same GPU."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.autoscaler.domain.gpus import (
    Gpu,
    GpuClaim,
    NoRoom,
    from_label,
    place,
    read_inventory,
    stands,
    to_label,
    visible,
)
from tidegate.kernel.protocol.models import Resources

A, B, C = Gpu("GPU-a", 16_000), Gpu("GPU-b", 16_000), Gpu("GPU-c", 80_000)


def whole(count: int) -> Resources:
    return Resources(gpus=count)


def share(memory_mb: int) -> Resources:
    return Resources(gpus=0, gpu_memory_mb=memory_mb)


def test_whole_gpus_are_those_that_nobody_holds_smallest_first():
    assert place([C, B, A], [], whole(1)) == {"GPU-a": 16_000}
    held = [GpuClaim("x-0-1", {"GPU-a": 16_000}), GpuClaim("y-0-1", {"GPU-b": 1})]
    assert place([C, B, A], held, whole(1)) == {"GPU-c": 80_000}
    assert place([C, B, A], [], whole(3)).keys() == {"GPU-a", "GPU-b", "GPU-c"}


def test_a_share_goes_where_it_leaves_the_least_behind():
    held = [GpuClaim("x-0-1", {"GPU-b": 10_000})]
    assert place([A, B, C], held, share(6_000)) == {"GPU-b": 6_000}
    assert place([A, B, C], held, share(6_001)) == {"GPU-a": 6_001}
    assert place([A, B, C], held, share(40_000)) == {"GPU-c": 40_000}


def test_who_wants_none_gets_none():
    assert place([A], [], whole(0)) == {}
    assert place([], [], whole(0)) == {}


def test_a_wish_that_cannot_be_met_says_what_stands_in_its_way():
    with pytest.raises(NoRoom, match="this host has no GPU"):
        place([], [], whole(1))
    held = [GpuClaim("x-0-1", {"GPU-a": 9_000})]
    with pytest.raises(NoRoom, match=r"GPU-a has 7000 of 16000 MiB free \(used by x-0-1"):
        place([A], held, share(8_000))
    with pytest.raises(NoRoom, match="needs 2 whole GPUs"):
        place([A, B], held, whole(2))


def test_of_two_claims_the_earlier_one_stands():
    first = GpuClaim("x-0-1", {"GPU-a": 16_000}, (1, "10:00:00.000000001", "id"))
    second = GpuClaim("y-0-1", {"GPU-a": 1}, (1, "10:00:00.000000002", "id"))
    assert stands([A], [first, second], first)
    assert not stands([A], [first, second], second)
    assert not stands([A], [], GpuClaim("z-0-1", {"GPU-gone": 1})), "a claim on a missing GPU does not stand"


@given(st.lists(st.integers(1, 16_000), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_claims_that_stand_never_exceed_the_memory(sizes, random):
    """In any order, each decides alone, the claims that stand fit together, and the first always stands."""
    claims = [GpuClaim(f"r-{n}-1", {"GPU-a": mb}, (1, f"{n:03}", "")) for n, mb in enumerate(sizes)]
    random.shuffle(claims)
    standing = [claim for claim in claims if stands([A], claims, claim)]
    assert sum(claim.shares["GPU-a"] for claim in standing) <= A.memory_mb
    assert min(claims, key=lambda claim: claim.order) in standing


@given(st.lists(st.one_of(st.integers(1, 2).map(whole), st.integers(1, 20_000).map(share)), max_size=12))
def test_nothing_is_ever_given_twice(wishes):
    claims: list[GpuClaim] = []
    for number, wish in enumerate(wishes):
        try:
            claims.append(GpuClaim(f"r-{number}-1", place([A, B, C], claims, wish)))
        except NoRoom:
            continue
    for gpu in (A, B, C):
        assert sum(claim.shares.get(gpu.uuid, 0) for claim in claims) <= gpu.memory_mb
        if any(claim.shares.get(gpu.uuid) == gpu.memory_mb for claim in claims):
            assert sum(gpu.uuid in claim.shares for claim in claims) == 1


def test_labels_go_there_and_back_and_strange_ones_are_passed_over():
    shares = {"GPU-b": 2, "GPU-a": 1}
    assert to_label(shares) == "GPU-a=1,GPU-b=2"
    assert from_label(to_label(shares)) == shares
    assert from_label("") == {}
    assert from_label("GPU-a,=3,GPU-b=x,GPU-c=7") == {"GPU-c": 7}


def test_the_listing_of_nvidia_smi():
    listing = "GPU-5a1b, 81559, NVIDIA H100 80GB HBM3\nGPU-77, 16384, Tesla T4\n\nFailed to initialize\n"
    assert read_inventory(listing) == (
        Gpu("GPU-5a1b", 81_559, "NVIDIA H100 80GB HBM3"),
        Gpu("GPU-77", 16_384, "Tesla T4"),
    )


def test_whole_ones_and_a_share_cannot_both_be_asked_for():
    with pytest.raises(ValueError, match="set only one of them"):
        Resources(gpus=1, gpu_memory_mb=1)


@pytest.mark.parametrize(
    ("setting", "left"),
    [
        (None, [A, B, C]),
        ("", []),
        ("1,0", [B, A]),
        ("GPU-c", [C]),
        ("2, GPU-a", [C, A]),
        ("0,7,1", [A]),
        ("-1", []),
        ("0,0", [A]),
        ("GPU-", []),
        ("NoDevFiles", []),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_does(setting, left):
    assert list(visible([A, B, C], setting)) == left
