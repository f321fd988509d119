"""The cache against a plain list per row, through random comings and goings."""

import random

import pytest
import torch

from rlhf.generation import kv_cache as cache_module
from rlhf.generation.kv_cache import SlotCache

LAYERS, HEADS, SIZE, SLOTS = 2, 2, 3, 5


class Model:
    """A `SlotCache`, and beside it the plain thing: for every row the list of the keys it should see."""

    def __init__(self, most_tokens: int | None = None) -> None:
        self.cache = SlotCache(SLOTS, torch.device("cpu"), most_tokens=most_tokens)
        self.rows, self.next_key = [], 1.0

    def keys(self, count: int) -> list[float]:
        self.next_key += count
        return [self.next_key - i for i in range(count)]

    def admit(self, lengths: list[int]) -> None:
        width = max(lengths)
        newcomers = [self.keys(length) for length in lengths]
        self.cache.admit(torch.tensor(lengths))
        self.rows += newcomers
        self.write([[-1.0] * (width - len(keys)) + keys for keys in newcomers])

    def fork(self, newcomers: list[int]) -> None:
        """Copies of rows that have just come, by their slots."""
        self.cache.fork(torch.tensor(newcomers, dtype=torch.long))
        self.rows += [self.rows[slot] for slot in newcomers]

    def step(self) -> None:
        self.cache.step()
        written = [self.keys(1) for _ in self.rows]
        self.rows = [row + keys for row, keys in zip(self.rows, written, strict=True)]
        seen = self.write(written)
        mask_SL, position_S = self.cache.mask_SL(), self.cache.position_S()
        for keys_LHD, mask_L, position, row in zip(seen, mask_SL, position_S, self.rows, strict=True):
            assert keys_LHD[mask_L, 0, 0].tolist() == row
            assert position == len(row) - 1
            assert keys_LHD.isfinite().all()
        for keys_HCD, mask_C, row in zip(self.cache.layer(0).keys, self.cache.mask_SC(), self.rows, strict=False):
            assert keys_HCD[0, mask_C, 0].tolist() == row

    def write(self, keys: list[list[float]]):
        """Every layer, head and coordinate gets a multiple of the key; returns what the last layer shows, [S, L, H, D]."""
        base = torch.tensor(keys)[:, None, :, None].expand(-1, HEADS, -1, SIZE)
        for number in range(LAYERS):
            seen, negative = self.cache.update(base * (number + 1), -base, number)
            assert torch.equal(seen, -negative * (number + 1))
        return seen.transpose(1, 2) / LAYERS

    def keep(self, alive: list[bool]) -> None:
        from_S = self.cache.keep(torch.tensor(alive)).tolist()
        assert sorted(from_S) == [slot for slot, stays in enumerate(alive) if stays]
        self.rows = [self.rows[slot] for slot in from_S]


@pytest.mark.parametrize("spare", [1, 2, 7, 128])
def test_rows_see_their_own_keys_whoever_comes_and_goes(monkeypatch, spare):
    monkeypatch.setattr(cache_module, "SPARE_COLUMNS", spare)
    choose, model = random.Random(spare), Model()
    for _ in range(300):
        free = SLOTS - len(model.rows)
        event = choose.choice(["admit", "step", "step", "step", "keep"])
        if event == "admit" and free:
            read = choose.randint(1, free)
            model.admit([choose.randint(1, 9) for _ in range(read)])
            model.fork(choose.choices(range(len(model.rows) - read, len(model.rows)), k=choose.randint(0, free - read)))
        elif event == "step" and model.rows:
            model.step()
        elif event == "keep" and model.rows:
            model.keep([choose.random() < 0.7 for _ in model.rows])
    assert model.cache.columns <= 9 + 300 + spare


def test_many_short_rows_or_few_long_ones_share_the_memory(monkeypatch):
    """60 tokens, at most 2 columns to spare: rows are admitted where they and the others fit at the longest of them all."""
    monkeypatch.setattr(cache_module, "SPARE_COLUMNS", 2)
    monkeypatch.setattr(cache_module, "SPARE_FRACTION", {"cpu": 0.0})
    choose, model, most = random.Random(0), Model(most_tokens=60), []
    together = set()
    for _ in range(400):
        event = choose.choice(["admit", "admit", "step", "step", "keep"])
        longest = choose.choice([5, 10, 28])
        if event == "admit" and (len(most) + 1) * (max([*most, longest]) + 2) <= 60 and len(most) < SLOTS:
            model.cache.make_room(len(most) + 1)
            model.admit([choose.randint(1, longest)])
            most.append(longest)
        elif event == "step" and most and all(len(row) < end for row, end in zip(model.rows, most, strict=True)):
            model.step()
        elif most and (event == "keep" or any(len(row) == end for row, end in zip(model.rows, most, strict=True))):
            alive = [len(row) < end and choose.random() < 0.8 for row, end in zip(model.rows, most, strict=True)]
            from_S = model.cache.keep(torch.tensor(alive)).tolist()
            model.rows, most = [model.rows[slot] for slot in from_S], [most[slot] for slot in from_S]
        together.add((len(most), max(most, default=0)))
        for keys in [model.cache.layer(number).keys for number in range(len(model.cache.layers))]:
            assert keys.shape[0] * keys.shape[2] <= 60 and keys.shape[0] >= len(most)
    assert {(5, 10), (2, 28), (1, 28)} <= together


def test_room_is_no_wider_than_the_rows_need(monkeypatch):
    """Short rows that follow each other for long use the same few columns."""
    monkeypatch.setattr(cache_module, "SPARE_COLUMNS", 4)
    model = Model()
    model.admit([3])
    for _ in range(100):
        model.admit([3])
        model.step()
        model.keep([False, True])
    assert model.cache.columns <= 3 + 2 + 1 + 4


def test_room_of_long_rows_that_have_gone_is_given_back(monkeypatch):
    monkeypatch.setattr(cache_module, "SPARE_COLUMNS", 4)
    model = Model()
    model.admit([30, 3])
    model.keep([False, True])
    model.step()
    assert model.cache.columns == 3 + 4
