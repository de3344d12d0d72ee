"""Keys and values of the tokens so far, for a batch of sequences of different lengths.

Row b is one sequence and slot p its token at position p; see `whet.model.attention.KVCache`, which
this implements. Rows are recycled: a new sequence overwrites the row of one that has ended, and the
last row moves into a gap when no new sequence is left.

Memory: 2 x layers x rows x slots x K x H numbers, taken once.
"""

import torch
from torch import Tensor


class Cache:
    """A cache of `rows` sequences of at most `slots` tokens."""

    def __init__(self, rows: int, slots: int) -> None:
        self.rows = rows
        self.slots = slots
        # Per layer (rows, slots, K, H), made when its first k comes. In memory a head's slots lie
        # one after another, as attention reads them: twice as fast as by slots on a CPU.
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._row = torch.empty(0, 1, dtype=torch.long)  # (B, 1): where the next forward writes
        self._text = torch.empty(0, dtype=torch.long)  # (B,): of the next forward's, in each row
        self._seen: int | None = None

    def fill(self, rows: Tensor, text: Tensor) -> "Cache":
        """Makes the next forward write the beginnings of new sequences into `rows` (B,): into row b
        that of its text number `text[b]`, as replies to one prompt begin alike."""
        self._row, self._text, self._seen = rows[:, None], text, None
        return self

    def extend(self, rows: Tensor, seen: int) -> "Cache":
        """Makes the next forward add a token to each of the first B rows; `rows` is arange(B).

        `seen` exceeds every position. The caller counts it, since asking the device would make the
        host wait for it at each token.
        """
        self._row, self._seen = rows[:, None], seen
        return self

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store `k`, `v` (B, T, K, H) at `positions` (B, T); returns what they attend to."""
        if layer == len(self.keys):
            heads, size = k.shape[2:]
            shape = (self.rows, heads, self.slots, size)
            # An unused slot must hold no NaN: 0 x NaN is NaN.
            self.keys.append(k.new_zeros(shape).transpose(1, 2))
            self.values.append(v.new_zeros(shape).transpose(1, 2))
        keys, values = self.keys[layer], self.values[layer]
        if self._seen is None:
            place = self._row, positions[self._text]
            keys.index_put_(place, k[self._text])
            values.index_put_(place, v[self._text])
            return k, v  # a beginning sees itself only
        keys.index_put_((self._row, positions), k)
        values.index_put_((self._row, positions), v)
        rows = len(self._row)
        return keys[:rows, : self._seen], values[:rows, : self._seen]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` slots of row `source` over those of row `target`."""
        for stored in (*self.keys, *self.values):
            stored[target, :length] = stored[source, :length]
