"""The order of training rows: whole random batches, rows of like length side by side, every epoch another order."""

import random
from statistics import stdev

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import SFTConfig
from rlhf.errors import UserError
from stages.trl_trainer import epoch_order, in_training_order


def padding(order, lengths, batch_size):
    """Share of the tokens that are padding, over all slices of `batch_size` rows."""
    batches = [[lengths[i] for i in order[s : s + batch_size]] for s in range(0, len(order), batch_size)]
    return 1 - sum(map(sum, batches)) / sum(max(b) * len(b) for b in batches)


def rows_of(numbers, **settings):
    dataset = Dataset.from_dict({"row": list(range(numbers))})
    config = SFTConfig(**settings)
    return in_training_order(dataset, [1] * numbers, config, "sft", seed=0)["row"]


@given(lengths=st.lists(st.integers(1, 99), min_size=1, max_size=80), batch_size=st.integers(1, 9))
def test_an_epoch_has_every_row_of_its_whole_batches_once(lengths, batch_size):
    order = epoch_order(lengths, batch_size, "0")
    assert len(order) == len(lengths) // batch_size * batch_size
    assert len(set(order)) == len(order)
    assert set(order) <= set(range(len(lengths)))


def test_padding_of_forward_passes_falls_to_less_than_half_of_that_of_a_random_order():
    lengths = random.Random(0).choices(range(20, 80), k=640)
    shuffled = random.Random(1).sample(range(640), 640)
    assert padding(epoch_order(lengths, 16, "0"), lengths, 4) < padding(shuffled, lengths, 4) / 2


def test_batches_are_not_drawn_by_length():
    """Else those of short rows would weigh a token more than those of long ones."""
    lengths = random.Random(0).choices(range(20, 80), k=640)
    order = epoch_order(lengths, 16, "0")
    means = [sum(lengths[i] for i in order[start : start + 16]) / 16 for start in range(0, 640, 16)]
    assert stdev(means) < 1.5 * stdev(lengths) / 4  # that of the mean of 16 random rows, and some room


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
    orders = [tuple(rows_of(40, epochs=3, batch_size=8)[start : start + 40]) for start in (0, 40, 80)]
    orders.append(tuple(epoch_order([1] * 40, 8, "another")))
    assert len(set(orders)) == 4


def test_a_part_of_an_epoch_is_whole_batches_too():
    assert len(rows_of(40, epochs=1.5, batch_size=8)) == 56
    assert len(rows_of(43, epochs=1, batch_size=8)) == 40


def test_less_than_one_batch_is_refused():
    with pytest.raises(UserError, match=r"sft: 7 packed rows .* are less than one batch; lower sft.batch_size \(8\)"):
        rows_of(7, batch_size=8)
