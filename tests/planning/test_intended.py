"""What counts as a departure from the intended collectives and the intended split of the state."""

import dataclasses

import pytest

from lingbot_jax.planning.collectives import Collective
from lingbot_jax.planning.hlo import Shape
from lingbot_jax.planning.intended import Intended, Matrix, state_faults

INTENDED = Intended(
    mesh={"data": 1, "fsdp": 8, "seq": 8},
    matrices=(
        Matrix((5120, 5120), 40, 2),
        Matrix((5120, 13824), 40, 2),
        Matrix((5120, 64), 1, 4),
        Matrix((4096, 5120), 1, 4),
    ),
    microsteps=1,
    tokens=21 * 1560,
    text=512,
    width=128,
    samples=2,
)
MEANT = INTENDED.bytes()


def sent(kind, dims, axes, size=1.0):
    return INTENDED.faults([Collective(kind, axes, (Shape("bf16", dims, False),), size, 1, "op")])


def test_bytes_follow_the_two_stages():
    whole = 2 * 40 * (5120 * 5120 + 5120 * 13824) + 4 * 5120 * (64 + 4096)
    assert MEANT["all-gather"] == {"seq": 2 * whole / 8 * 7 / 8, "fsdp": 2 * whole * 7 / 8}
    assert MEANT["reduce-scatter"]["fsdp"] == whole * 7 / 8


@pytest.mark.parametrize(
    "kind, dims, axes",
    [
        ("all-gather", (1, 21, 1560, 5120), ("seq",)),
        ("all-gather", (32760, 5120), ("seq",)),
        ("all-gather", (2, 21, 1560, 5120), ("seq",)),
        ("all-gather", (1, 21, 1560, 5, 128), ("seq",)),  # keys of some heads
        ("all-gather", (1, 5120, 21, 1560), ("fsdp", "seq")),
        ("all-reduce", (1, 21, 1560, 5120), ("seq",)),  # a gather as a sum of zero-padded parts
    ],
)
def test_gathered_tokens_are_found(kind, dims, axes):
    assert "the tokens of whole samples (op)" in sent(kind, dims, axes)[0]


@pytest.mark.parametrize(
    "dims, axes",
    [
        ((5120, 5120), ("fsdp", "seq")),
        ((13824, 5120), ("fsdp", "seq")),
        ((1, 13824, 640), ("fsdp",)),
        ((640, 13824), ("seq",)),
        ((5120, 5120), ("fsdp",)),
    ],
)
def test_whole_gradients_are_found(dims, axes):
    assert "a whole gradient, not scattered (op)" in sent("all-reduce", dims, axes)[0]


def test_too_many_bytes_are_found():
    assert not sent("all-gather", (8,), ("seq",), 1.05 * MEANT["all-gather"]["seq"])
    assert "all-gather over seq" in sent("all-gather", (8,), ("seq",), 1.2 * MEANT["all-gather"]["seq"])[0]
    assert "all-reduce: " in sent("all-reduce", (8,), ("fsdp",), MEANT["reduce-scatter"]["fsdp"])[0]


def test_frozen_matrices_are_gathered_and_have_no_gradient():
    half = tuple(dataclasses.replace(m, trains=i == 0) for i, m in enumerate(INTENDED.matrices))
    meant = dataclasses.replace(INTENDED, matrices=half).bytes()
    assert meant["all-gather"] == MEANT["all-gather"]
    assert meant["reduce-scatter"]["fsdp"] == 2 * 40 * 5120 * 5120 * 7 / 8


def test_gradients_of_small_parameters_may_be_summed_or_scattered():
    size = MEANT["reduce-scatter"]["fsdp"]
    small = dataclasses.replace(INTENDED, small=int(size))
    for kind in ("reduce-scatter", "all-reduce"):
        twice = [Collective(kind, ("fsdp",), (Shape("bf16", (8,), False),), 2 * size, 1, "op")]
        assert INTENDED.faults(twice) and not small.faults(twice)


def test_what_is_meant_is_no_fault():
    assert not sent("all-gather", (5120, 13824), ("fsdp",))
    assert not sent("all-gather", (1, 21, 1560, 64), ("seq",))  # patches of the velocity
    assert not sent("all-to-all", (1, 21, 1560, 5, 128), ("seq",))
    assert not sent("all-reduce", (2, 512, 5120), ("seq",))  # the text's gradient
    assert not sent("all-reduce", (640, 64), ("seq",))  # of the head, small
    assert not sent("all-reduce", (80, 5120), ("data",))  # what was scattered, between replicas
    assert "all-gather over data" in sent("all-gather", (80, 5120), ("data",))[0]


def test_state_that_is_not_split_is_found():
    matrices, vectors = {"parameters": 800, "optimizer": 1600}, {"parameters": 3, "optimizer": 6}
    held = {"parameters": 103, "optimizer": 206}
    assert state_faults(held, matrices, vectors, 8, 305) == []
    assert "optimizer" in state_faults(held | {"optimizer": 212}, matrices, vectors, 8, 305)[0]
    assert "arguments" in state_faults(held, matrices, vectors, 8, 305 + (9 << 20))[0]


def test_pieces_of_less_than_a_register_may_be_summed():
    wide = dataclasses.replace(INTENDED, mesh={"data": 1, "fsdp": 64, "seq": 8})
    over = lambda dims, axes: [Collective("all-reduce", axes, (Shape("bf16", dims, False),), 1.0, 1, "op")]
    assert not wide.faults(over((80, 5120), ("seq",)))  # 10 rows each
    assert wide.faults(over((5120, 5120), ("fsdp",)))
