"""The order in which blocks are trained on: a frozen permutation that can be asked both ways.

    order = BlockOrder(n_blocks=10, seed=0)
    order.block(position)      # which block stands at a place of the endless stream of epochs
    order.position(block, epoch)   # and back: where an epoch shows a block

Each epoch shows every block once. The permutation is a Feistel network over the next power of four with cycle-walking
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): plain integer arithmetic, so no library's random
generator can change it, nothing is stored, and "which step saw this block" is a calculation. It does not know batch or
world size.

    step_receipt(7, [block_receipt(block, input_ids, labels) for each block of step 7])   ->   16 bytes

A receipt proves what a step was fed: anyone who has the blocks and the order can compute it again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

ROUNDS = 8
MASK = 2**64 - 1


def mix(value: int) -> int:
    """Return 64 well-mixed bits: the finaliser of SplitMix64 (Steele, Lea, Flood, 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


class BlockOrder:
    """A permutation of `n_blocks` blocks for each epoch, of (seed, epoch, n_blocks) alone."""

    def __init__(self, n_blocks: int, seed: int) -> None:
        if n_blocks < 1:
            raise ValueError("there is no block to put in order.")
        self.n_blocks, self.seed = n_blocks, seed
        self.half_bits = max(1, ((n_blocks - 1).bit_length() + 1) // 2)
        self.half_mask = (1 << self.half_bits) - 1

    def block(self, position: int) -> int:
        """Return the block at `position` (0-based, over all epochs) of the stream."""
        epoch, place = divmod(position, self.n_blocks)
        keys = self._keys(epoch)
        while True:
            left, right = place >> self.half_bits, place & self.half_mask
            for key in keys:
                left, right = right, left ^ (mix(key ^ right) & self.half_mask)
            place = left << self.half_bits | right
            if place < self.n_blocks:
                return place

    def position(self, block: int, epoch: int) -> int:
        """Return the position in the stream at which `epoch` shows `block`."""
        keys, place = self._keys(epoch)[::-1], block
        while True:
            left, right = place >> self.half_bits, place & self.half_mask
            for key in keys:
                left, right = right ^ (mix(key ^ left) & self.half_mask), left
            place = left << self.half_bits | right
            if place < self.n_blocks:
                return epoch * self.n_blocks + place

    def _keys(self, epoch: int) -> list[int]:
        base = mix(mix(self.seed) ^ epoch)
        return [mix(base + number) for number in range(ROUNDS)]


RECEIPT_BYTES = 16


def block_receipt(block: int, input_ids: bytes, labels: bytes) -> bytes:
    """Return 16 bytes of SHA-256 over a block's number (8 bytes) and what the model saw of it: int32, little-endian."""
    return hashlib.sha256(block.to_bytes(8, "little") + input_ids + labels).digest()[:RECEIPT_BYTES]


def step_receipt(step: int, blocks: Iterable[bytes]) -> bytes:
    """Return 16 bytes of SHA-256 over a step's number (from 1) and the receipts of its blocks, in the order's order."""
    return hashlib.sha256(step.to_bytes(8, "little") + b"".join(blocks)).digest()[:RECEIPT_BYTES]
