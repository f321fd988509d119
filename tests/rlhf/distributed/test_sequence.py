"""Sequences that are divided over ranks: what the ranks exchange, and models that read slices, against models that read all.

Four ranks share sequences in groups of two.
"""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.data.batches import PromptBatch
from rlhf.distributed import collectives
from rlhf.distributed.collectives import data_rank, data_ranks
from rlhf.distributed.sequence import exchange, group_of, rows_of_group, sum_of_slices
from rlhf.errors import UserError
from rlhf.models import ScalarModel, check_slices, divide_sequences, recompute_activations, slices
from rlhf.models.policy import PolicyModel
from stages.sft import IGNORED, response_logprobs

RANKS, TOGETHER = 4, 2
LIMIT_S = 60.0  # of the ranks, in which a lost one leaves the others waiting
TOKENS, RESPONSE = 11, 4  # an odd number: the last slice is longer than what is left for it
KEY_HEADS = (1, 2, 4, 3)  # of four query heads: fewer than ranks, as many, more; of six: not divisible by ranks
KINDS = ("padded", "packed", "shared", "recomputed", "sft", "sft packed", "values")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("slices")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=on_a_rank, args=(rank, folder)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT_S)
        process.kill()
    return [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(RANKS)]


def test_ranks_of_a_group_follow_one_another(found):
    assert [(f["group"], f["rows of"]) for f in found] == [
        ((2, 0), (0, 2)),
        ((2, 1), (0, 2)),
        ((2, 0), (1, 2)),
        ((2, 1), (1, 2)),
    ]


def test_heads_are_exchanged_for_positions(found):
    """Element = 100 · head + position, with 4 heads and 6 positions."""
    for f in found:
        first = f["group"][1] * 2
        assert f["exchanged"] == [[100 * head + place for place in range(6)] for head in (first, first + 1)]
        assert f["back"] and f["gradient back"]


def test_values_of_all_slices_are_everywhere_and_each_gradient_counts_for_the_group(found):
    assert all(f["sum"] == [1.0, 2.0] and f["gradient of sum"] == [6.0, 10.0] for f in found)


def test_a_group_has_the_rows_of_its_ranks(found):
    assert [f["rows"] for f in found] == [[0, 1, 10, 11]] * 2 + [[20, 21, 30, 31]] * 2
    assert all(f["own rows"] == [10 * rank, 10 * rank + 1] for rank, f in enumerate(found))


def test_shards_of_groups_are_joined_once(found):
    assert [f["shard"] for f in found] == [[0, 1, 2]] * 2 + [[3, 4, 0]] * 2
    assert all(f["joined"] == [0, 10, 20, 30, 40] for f in found)


@pytest.mark.parametrize("heads", KEY_HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_slices_say_and_learn_what_a_whole_model_does(found, kind, heads):
    """Values are the same on all ranks; the mean of the ranks' gradients is the gradient of the mean over groups."""
    torch.manual_seed(0)
    model = make_model(heads, kind)
    values = torch.stack([read(model, kind, of_group) for of_group in range(RANKS // TOGETHER)])
    torch.stack([weighted(of_group) for of_group in values]).mean().backward()
    for rank, f in enumerate(found):
        torch.testing.assert_close(f[kind, heads]["values"], values[rank // TOGETHER].detach(), atol=2e-5, rtol=0)
    assert values.abs().max() > 0.5
    for name, parameter in model.named_parameters():
        mean = torch.stack([f[kind, heads]["gradients"][name] for f in found]).mean(0)
        torch.testing.assert_close(mean, parameter.grad, atol=1e-4, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    assert sum(parameter.grad.norm() > 1e-2 for parameter in model.parameters()) > 15


def test_a_family_that_reads_slices_as_whole_rows_is_refused(found):
    assert all("cannot be divided" in f["refused"] and f["accepted"] for f in found)


# --- what is read -----------------------------------------------------------------------------------------------------


def make_model(key_heads: int, kind: str) -> Any:
    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 2}
    queries = 6 if key_heads == 3 else 4
    heads: dict[str, Any] = {"num_attention_heads": queries, "num_key_value_heads": key_heads}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.3, pad_token_id=0))
    model = (
        ScalarModel(llama.model, torch.randn(1, 24))
        if kind == "values"
        else PolicyModel(llama, kind in ("packed", "shared"))
    )
    if kind == "recomputed":
        recompute_activations(model)
    return model


def read(model: Any, kind: str, of_group: int) -> torch.Tensor:
    """Logprobs or values of a batch that belongs to this group."""
    generator = torch.Generator().manual_seed(of_group)
    tokens = torch.randint(1, 20, (3, TOKENS), generator=generator)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, :3] = mask[1, -2:] = mask[2, -1] = False
    if kind == "shared":  # responses to one prompt
        tokens[2, :-RESPONSE], mask[2, :-RESPONSE] = tokens[0, :-RESPONSE], True
    if kind == "values":
        return model(tokens, mask, RESPONSE)
    if not kind.startswith("sft"):
        return model(tokens, mask, RESPONSE, 0.7)[0]
    rows = [tokens[0], tokens[1, :5], tokens[2, :8]]
    labels = [torch.cat([torch.full((2,), IGNORED), row[2:]]) for row in rows]
    if kind == "sft":
        pad = torch.nn.utils.rnn.pad_sequence
        ids, wanted = pad(rows, batch_first=True), pad(labels, batch_first=True, padding_value=IGNORED)
        return response_logprobs(model.causal, wanted, input_ids=ids, attention_mask=(ids > 0).long())
    ends = torch.tensor([0, TOKENS, TOKENS + 5, TOKENS + 13], dtype=torch.int32)
    places = torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": TOKENS, "max_length_k": TOKENS}
    return response_logprobs(
        model.causal, torch.cat(labels)[None], input_ids=torch.cat(rows)[None], position_ids=places, **packed
    )


def weighted(values: torch.Tensor) -> torch.Tensor:
    """The sum with another weight for each value, so that no two can be confused."""
    return (values.flatten() * torch.arange(1, values.numel() + 1)).sum() / values.numel()


# --- the program of a rank --------------------------------------------------------------------------------------------


def on_a_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    group = group_of(TOGETHER)
    assert group is not None
    found: dict[Any, Any] = primitives(rank, group)
    for kind in KINDS:
        for heads in KEY_HEADS:
            found[kind, heads] = of_slices(kind, heads, group)
    found |= refusals(group)
    torch.save(found, folder / f"found-{rank}.pt")
    collectives.barrier()
    dist.destroy_process_group()


def primitives(rank: int, group: Any) -> dict[str, Any]:
    heads, places = torch.arange(4)[None, :, None, None], torch.arange(3)[None, None, :, None] + 3 * group.rank
    whole = (100.0 * heads + places).requires_grad_()
    exchanged = exchange(whole, group)
    back = exchange(exchanged.transpose(1, 2), group)  # [B, S, A, D]
    (back * (back.detach() + 1)).sum().backward()
    x = torch.zeros(2).index_fill(0, torch.tensor(group.rank), group.rank + 1.0).requires_grad_()
    total = sum_of_slices(x, group)
    (total * torch.tensor([3.0, 5.0])).sum().backward()
    row = torch.tensor([10 * rank, 10 * rank + 1])
    rows, own = rows_of_group(PromptBatch(row[:, None], row[:, None] >= 0, row >= 0, row), group)
    shard = collectives.even_shard(5, TOGETHER)
    return {
        "group": (group.ranks, group.rank),
        "rows of": (data_rank(TOGETHER), data_ranks(TOGETHER)),
        "exchanged": exchanged[0, :, :, 0].tolist(),
        "back": torch.equal(back, whole.transpose(1, 2)),
        "gradient back": torch.equal(whole.grad, whole.detach() + 1),
        "sum": total.tolist(),
        "gradient of sum": x.grad.tolist(),  # type: ignore[union-attr]
        "rows": rows.ids_B.tolist(),
        "own rows": rows.ids_B[own].tolist(),
        "shard": shard,
        "joined": collectives.join_shards([10 * i for i in shard], 5, TOGETHER),
    }


def of_slices(kind: str, heads: int, group: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    model = make_model(heads, kind)
    divide_sequences(model.backbone if kind == "values" else model.causal, group)
    values = read(model, kind, data_rank(TOGETHER))
    weighted(values).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"values": values.detach(), "gradients": gradients}


def refusals(group: Any) -> dict[str, Any]:
    model = make_model(2, "padded")
    divide_sequences(model.causal, group)
    found = {"accepted": check_slices(model) is None, "refused": ""}
    given = slices.read_slice
    pretrained = sys.modules["rlhf.models.pretrained"]
    deaf = lambda read, *rest: given(lambda slices, **inputs: read(**inputs), *rest)  # attention is not told of slices
    pretrained.read_slice = deaf  # type: ignore[attr-defined]
    try:
        check_slices(model)
    except UserError as error:
        found["refused"] = error.message
    return found
