"""block_order: each epoch shows each block once, and the order can be asked both ways."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from block_order import RECEIPT_BYTES, BlockOrder, block_receipt, step_receipt

SIZES = st.integers(1, 300)


@given(SIZES, st.integers(0, 2**32), st.integers(0, 5))
def test_each_epoch_shows_each_block_once(n_blocks: int, seed: int, epoch: int) -> None:
    order = BlockOrder(n_blocks, seed)
    shown = [order.block(epoch * n_blocks + place) for place in range(n_blocks)]
    assert sorted(shown) == list(range(n_blocks))


@given(st.integers(1, 10**9), st.integers(0, 2**32), st.integers(0, 5), st.data())
def test_the_inverse_is_the_inverse(n_blocks: int, seed: int, epoch: int, data: st.DataObject) -> None:
    order = BlockOrder(n_blocks, seed)
    position = epoch * n_blocks + data.draw(st.integers(0, n_blocks - 1))
    assert order.position(order.block(position), epoch) == position


def test_the_order_is_frozen() -> None:
    """Another order would make an old receipt or checkpoint lie: these numbers never change."""
    order = BlockOrder(10, seed=0)
    assert [order.block(position) for position in range(20)] == FROZEN
    at_a_power_of_four = BlockOrder(16, seed=7)
    assert [at_a_power_of_four.block(position) for position in range(16)] == [
        15, 7, 12, 3, 4, 0, 14, 5, 6, 9, 11, 10, 13, 1, 8, 2,
    ]  # fmt: skip


def test_epochs_and_seeds_differ() -> None:
    orders = [BlockOrder(1000, seed) for seed in (0, 1)]
    epochs = [[order.block(epoch * 1000 + i) for i in range(1000)] for order in orders for epoch in (0, 1)]
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_it_mixes() -> None:
    """Neighbours in the data are not neighbours in the order: the mean distance of a shuffle is a third of the size."""
    order = BlockOrder(3000, seed=7)
    shown = [order.block(i) for i in range(3000)]
    mean = sum(abs(a - b) for a, b in itertools.pairwise(shown)) / 2999
    assert mean == pytest.approx(1000, rel=0.05)


def test_no_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="no block"):
        BlockOrder(0, 0)


def test_receipts_are_frozen_and_prove_what_was_fed() -> None:
    """Of the step, the blocks in their order, the ids and the labels: another one of these is another receipt."""
    first, second = block_receipt(3, b"idsx", b"labl"), block_receipt(9, b"idsy", b"labl")
    assert step_receipt(1, [first, second]).hex() == RECEIPT
    others = [
        step_receipt(2, [first, second]),
        step_receipt(1, [second, first]),
        step_receipt(1, [block_receipt(4, b"idsx", b"labl"), second]),
        step_receipt(1, [block_receipt(3, b"idsz", b"labl"), second]),
        step_receipt(1, [block_receipt(3, b"idsx", b"lab!"), second]),
    ]
    assert len({RECEIPT, *(other.hex() for other in others)}) == 6
    assert all(len(other) == RECEIPT_BYTES for other in others)


RECEIPT = "c35a841b25b5b22b66ede19895d3f8a9"
FROZEN = [7, 8, 2, 6, 9, 3, 0, 4, 5, 1, 6, 2, 5, 4, 8, 0, 9, 3, 7, 1]
