"""The order in which a run reads its examples: a function of seed and position."""

import math

import numpy as np

_MOST_BLOCKS_KEPT = 1 << 20  # the largest number of blocks whose order is kept in memory for each epoch (8 MB)
_ROUNDS = 8


class Order:
    """The index of the example at each position of an endless sequence, for a source of `examples` examples.

    Epoch e is the positions e·examples … (e + 1)·examples − 1 and has every example once, in an order of its own. The
    order is one of blocks, each of `block` consecutive examples, which stay together. The examples after the last block
    of full length end each epoch.

    Up to 2^20 blocks, all orders of the blocks are equally likely, and those of three epochs at most are kept. Beyond,
    each block is computed from its position, for about 0.1 µs, and nothing is kept.
    """

    def __init__(self, examples: int, seed: int, stream: int = 0, block: int = 1) -> None:
        """Different `stream` numbers give the same seed independent orders."""
        self.examples, self._seed, self._stream, self._block = examples, seed, stream, block
        self._blocks = examples // block
        self._epochs: dict[int, np.ndarray] = {}

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The indices of the examples at `positions`, both int64 [n]."""
        epochs, places = np.divmod(positions, self.examples)
        indices = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indices[chosen] = self._in_epoch(int(epoch), places[chosen])
        return indices

    def _in_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        if self._block == 1:
            return self._blocks_in_epoch(epoch, places)
        blocks, within = np.divmod(places, self._block)
        whole = blocks < self._blocks
        blocks[whole] = self._blocks_in_epoch(epoch, blocks[whole])
        return blocks * self._block + within

    def _blocks_in_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """The block numbers at `places` of this epoch's order, which has only blocks of full length."""
        if self._blocks > _MOST_BLOCKS_KEPT:
            return permuted(places, self._blocks, self._bits(epoch, stream=self._stream).random_raw(_ROUNDS))
        order = self._epochs.get(epoch)
        if order is None:
            order = np.random.Generator(self._bits(epoch, stream=self._stream)).permutation(self._blocks)
            # Threads may read on both sides of an epoch's end, so the epochs beside this one are kept.
            self._epochs = {e: o for e, o in self._epochs.items() if abs(e - epoch) <= 1} | {epoch: order}
        return order[places]

    def _bits(self, epoch: int, stream: int) -> np.random.Philox:
        # The third word of the counter keeps streams apart; in the fourth, `augmented` has a 1.
        return np.random.Philox(key=[self._seed, epoch], counter=[0, 0, stream, 0])


def permuted(places: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of 0 … count − 1, computed for some places alone.

    A place is written as left·b + right, with a·b ≥ count and both near √count. Each round of this Feistel network adds
    a hash of one half to the other, modulo a or b, so it can be undone. A result that is not below `count` goes through
    the rounds again until it is; about one in √count does (Black and Rogaway, Ciphers with arbitrary finite domains).

    Args:
      places: int64, any shape.
      count: 1 or more.
      keys: uint64, one for each round.

    Returns:
      int64, of the shape of `places`.
    """
    a = np.uint64(math.isqrt(count - 1) + 1)
    b = np.uint64(-(-count // int(a)))
    result = places.astype(np.uint64)
    again = np.ones(result.shape, bool)
    while again.any():
        left, right = np.divmod(result[again], b)
        for number, key in enumerate(keys):
            if number % 2:
                right = (right + _hash(left, key)) % b
            else:
                left = (left + _hash(right, key)) % a
        result[again] = left * b + right
        again = result >= count
    return result.astype(np.int64)


def _hash(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """32 bits of x and the key, mixed by two multiplications (the constants are those of MurmurHash3's last step)."""
    x = (x ^ key) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x >> np.uint64(32)
