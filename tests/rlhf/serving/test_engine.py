"""What the engine samples: equal to a plain forward pass, whoever else is in the batch, and never a hang."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.models import load_causal
from rlhf.serving import engine as module
from rlhf.serving.batch import MOST_ROWS, Batch, Room, next_group, room_for
from rlhf.serving.engine import EngineDown, QueueFull
from rlhf.serving.model import Ask, ServedModel
from rlhf.serving.rows import Sampling
from tests.rlhf.serving.models import Asked, finishes, make_folder, running, texts

PROMPT = [1, 70, 71, 72, 90, 91]
SAID = "said by a person"
LONG = [1, *range(60, 160)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("policy") / "model")


@pytest.fixture
def model(folder: Path) -> Iterator[ServedModel]:
    served = ServedModel("tiny", folder, most_waiting=200)
    served.stop_ids = frozenset()  # random weights end a response anywhere
    served.engine.start()
    yield served
    served.engine.close()


def ask(prompt: list[int] = PROMPT, max_tokens: int = 12, **more: Any) -> Ask:
    sampling = {key: more.pop(key) for key in ("temperature", "top_p", "top_logprobs") if key in more}
    return Ask([prompt], Sampling(max_tokens, **sampling), **more)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- what is sampled


def test_temperature_0_is_the_greedy_generation_of_transformers(folder: Path, model: ServedModel) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        ids = plain.generate(  # type: ignore[attr-defined]
            torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, 6),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
        )[0, 6:]
    asked = Asked(model, ask(temperature=0.0, top_logprobs=0)).send()
    asked.wait()
    assert [each.token for piece in asked.pieces[0] for each in piece.logprobs] == ids.tolist()
    assert finishes(asked) == ["length"]


def test_logprobs_are_those_of_a_plain_forward_pass(folder: Path, model: ServedModel) -> None:
    """In float32, at temperature 1 and without top_p, whatever the response was sampled with."""
    asked = Asked(model, ask(temperature=0.7, top_p=0.9, top_logprobs=3, seed=3)).send()
    asked.wait()
    told = [each for piece in asked.pieces[0] for each in piece.logprobs]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.tensor([[*PROMPT, *(each.token for each in told)]])
    with torch.no_grad():
        logprobs_TV = plain(tokens).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    assert len(told) == 12
    for each, expected_V in zip(told, logprobs_TV, strict=True):
        assert each.logprob == pytest.approx(float(expected_V[each.token]), abs=1e-4)
        best = expected_V.topk(3)
        assert [token for token, _ in each.top] == best.indices.tolist()
        assert [value for _, value in each.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_the_same_seed_gives_the_same_text_whatever_else_runs(model: ServedModel) -> None:
    alone = Asked(model, ask(n=2, seed=7)).send().wait()
    assert alone[0] != alone[1]
    before = [Asked(model, ask([1, 60 + n], 40, seed=n, temperature=1.5)).send() for n in range(9)]
    among = Asked(model, ask(n=2, seed=7)).send()
    after = [Asked(model, ask(LONG, 5 + n, seed=n, temperature=0.0, top_p=0.5)).send() for n in range(9)]
    assert among.wait() == alone
    for each in (*before, *after):
        each.wait()
    assert Asked(model, ask(n=2, seed=8)).send().wait() != alone


def test_a_narrow_top_p_is_the_likeliest_token(model: ServedModel) -> None:
    likeliest = Asked(model, ask(temperature=0.0)).send().wait()
    assert Asked(model, ask(top_p=1e-6, seed=1)).send().wait() == likeliest
    assert Asked(model, ask(top_p=1.0, seed=1)).send().wait() != likeliest


def test_rows_join_while_others_run(model: ServedModel) -> None:
    """A short request that comes late is done before a long one."""
    long = Asked(model, ask(max_tokens=1500)).send()
    until(lambda: long.rows[0].length > 5)
    Asked(model, ask(max_tokens=5)).send().wait()
    assert running(long.rows) == 1
    model.engine.cancel(long.rows)
    until(lambda: model.engine.running == 0)


def test_more_rows_than_slots_all_get_their_turn(model: ServedModel) -> None:
    asked = [Asked(model, ask([1, 60 + n % 100], 3 + n % 5, seed=n)).send() for n in range(MOST_ROWS + 30)]
    for each in asked:
        each.wait()
    assert {tuple(finishes(each)) for each in asked} == {("length",)}
    assert (model.engine.running, model.engine.waiting) == (0, 0)


def test_a_stop_string_frees_the_row(model: ServedModel) -> None:
    text = Asked(model, ask(max_tokens=30, temperature=0.0)).send().wait()[0]
    stop = text[10:12]
    asked = Asked(model, ask(max_tokens=30, temperature=0.0, stop=(stop,))).send()
    assert asked.wait() == [text[: text.index(stop)]]
    assert finishes(asked) == ["stop"]
    assert asked.rows[0].length < 30


# --- room


def test_prompts_that_join_together_are_one_forward_pass(model: ServedModel) -> None:
    rows = [Asked(model, ask([1] * 600 + [60 + n])).rows[0] for n in range(5)]
    assert next_group(rows, free=64) == 3  # 3 · 601 tokens are at most 2048
    assert next_group(rows, free=2) == 2
    assert next_group([rows[0]] * 9, free=64) == 9  # equal ones are read once
    assert next_group([Asked(model, ask([1] * 5000)).rows[0]], free=64) == 1
    assert next_group([], free=64) == 0


def test_the_cache_is_as_large_as_memory_allows(folder: Path) -> None:
    """By hand: 2 layers, keys and values, 32 numbers of 4 bytes: 512 bytes a token, and one tensor of 4 more."""
    causal = load_causal(folder)
    token, positions = 512 * 5 / 4, causal.config.max_position_embeddings
    large = room_for(causal, int(10.5 * positions * token))
    assert (large.tokens, large.context) == (int(10.5 * positions), positions)
    middle = room_for(causal, int(8 * 5000 * token))  # 4 rows of all positions
    assert (middle.tokens, middle.context) == (40_000, 5000)
    small = room_for(causal, int(1000.5 * token))
    assert (small.tokens, small.context) == (1000, 1000)


def test_many_short_rows_run_where_few_long_ones_would(folder: Path) -> None:
    """By hand, for 4096 tokens on a CPU: 20 of 165 tokens with 32 to spare are 3,940, and 21 would be 4,137; of 1,105 with an
    eighth to spare 3 are 3,729."""
    served = ServedModel("tiny", folder, most_waiting=100)
    served.stop_ids = frozenset()
    alone = [Asked(served, ask([60 + n] * 5, max_tokens=160, seed=n)) for n in range(24)]
    long = [Asked(served, ask([60 + n] * 5, max_tokens=1100, seed=n)) for n in range(4)]
    served.engine.start()
    expected = [asked.send().wait() for asked in alone[:3]]
    served.engine.close()
    room = Room(4096, 2048)
    cpu = torch.device("cpu")
    assert room.fitting([], [165] * 24, cpu) == 20 and room.fitting([165] * 19, [165, 165], cpu) == 1
    assert room.fitting([], [1105] * 4, cpu) == 3 and room.fitting([165] * 10, [1105], cpu) == 0
    assert room.fitting([], [2048] * 4, cpu) == 2
    batch = Batch(load_causal(folder).eval(), room)
    again = [Asked(served, ask([60 + n] * 5, max_tokens=160, seed=n)) for n in range(24)]
    rows = [asked.rows[0] for asked in again]
    assert batch.next_group(rows) == 20
    with torch.no_grad():
        for row, piece in batch.admit(rows[:20]):
            row.sink(piece)
        while batch.rows:
            for row, piece in batch.step():
                row.sink(piece)
            batch.release()
    assert [texts(asked.pieces) for asked in again[:3]] == expected
    assert batch.next_group([asked.rows[0] for asked in long]) == 3


# --- failures


def test_who_cancels_frees_the_slot(model: ServedModel) -> None:
    asked = Asked(model, ask(max_tokens=1500, n=3)).send()
    until(lambda: model.engine.running == 3)
    model.engine.cancel(asked.rows)
    until(lambda: model.engine.running == 0)
    assert Asked(model, ask(max_tokens=3)).send().wait()


def test_a_queue_has_an_end(folder: Path) -> None:
    served = ServedModel("tiny", folder, most_waiting=2)
    served.engine.start()
    until(lambda: served.engine._batch is not None)
    with pytest.raises(QueueFull):
        served.engine.submit(Asked(served, ask(n=MOST_ROWS + 3)).rows)
    assert served.engine.waiting == 0  # all or none
    served.engine.close()


@pytest.mark.parametrize("place", ["admit", "step"])
@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_a_dead_engine_tells_all_that_wait_and_starts_anew(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str, error: type
) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.01)
    expected = Asked(model, ask(seed=1)).send().wait()

    def fail(*_: Any) -> None:
        raise error(SAID)

    with monkeypatch.context() as broken:
        broken.setattr(Batch, place, fail)
        asked = [Asked(model, ask(n=3)).send(), Asked(model, ask(n=3))]
        for each in asked:
            try:
                each.send()
            except EngineDown:  # it was down already
                continue
        asked[0].wait()
        assert finishes(asked[0]) == ["failed"] * 3
    until(lambda: model.engine.up)
    assert Asked(model, ask(seed=1)).send().wait() == expected
    assert model.engine.restarts
    assert SAID not in caplog.text


def test_a_closed_engine_refuses_and_fails_what_ran(model: ServedModel) -> None:
    asked = Asked(model, ask(max_tokens=1500)).send()
    until(lambda: model.engine.running == 1)
    model.engine.close()
    asked.wait()
    assert finishes(asked) == ["failed"]
    with pytest.raises(EngineDown):
        asked.send()
