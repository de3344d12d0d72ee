"""The plainest cache that keeps the contract of `KVCache`: what the decoder is tested with."""

import itertools


class ListCache:
    """Rows of slots, written one token at a time."""

    def __init__(self, rows, slots):
        self.kept = {}
        self.rows, self.slots = rows, slots

    def write(self, layer, k, v, positions):
        if layer not in self.kept:
            shape = (self.rows, self.slots, *k.shape[2:])
            self.kept[layer] = [k.new_zeros(shape), v.new_zeros(shape)]
        for store, new in zip(self.kept[layer], (k, v), strict=True):
            for row, t in itertools.product(range(k.shape[0]), range(k.shape[1])):
                store[row, positions[row, t]] = new[row, t]
        return self.kept[layer][0].clone(), self.kept[layer][1].clone()
