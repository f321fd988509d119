from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from launch import cli
from launch.score import Text, encode, load_rows, score_texts, summary, to_lines
from reward_data import Demonstration, Message, Preference
from rlhf.config import TinyConfig
from rlhf.models import ScalarModel, load_scalar, load_tokenizer, save_causal
from rlhf.models.tiny import train_tokenizer, untrained_llama
from tests.rlhf.chat.templates import tokenizer_with

TEXTS = ["what is 2 + 2? it is 4", "sort the words: pear, apple. apple, pear", "say hello. hello!"] * 20
OFFSET = 0.25


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with random weights, centred at OFFSET."""
    tokenizer = train_tokenizer(TEXTS, 300)
    causal = untrained_llama(TinyConfig(hidden_size=32, intermediate_size=64, layers=2, heads=2), tokenizer, seed=0)
    head_1H = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    folder = tmp_path_factory.mktemp("reward") / "model"
    ScalarModel(causal.base_model, head_1H, OFFSET).save(folder, tokenizer)
    return folder


def pair(prompt: str, chosen: str, rejected: str) -> dict:
    messages = [{"role": "user", "content": prompt}]
    return {"prompt": messages, "chosen": chosen, "rejected": rejected, "rating": "better", "tag": "helpful"}


PAIRS = [pair(f"question {n}" * (n % 4 + 1), "good " * (n + 1), "bad") for n in range(9)]
COMPLETIONS = [
    {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "yes " * n}], "tag": "helpful"}
    for n in range(1, 6)
]


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def plain_transformers(folder: Path, prompt: str, answer: str) -> float:
    """The score of one text alone, without padding and without our model code; the format is written out."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    text = tokenizer(f"[INST] {prompt.strip()} [/INST] {answer.strip()} ", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[tokenizer.bos_token_id, *text, tokenizer.eos_token_id]])
    with torch.no_grad():
        return model(ids).logits.item() - OFFSET


def score(model: Path, file: str, out: Path, *options: str) -> int:
    return cli.main(["score", str(model), file, "--out", str(out), *options])


def test_pairs_are_scored_as_plain_transformers_scores_them(reward_model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "pairs.jsonl", PAIRS)
    assert score(reward_model, file, tmp_path / "out.jsonl", "--batch-size", "4") == 0
    lines = read(tmp_path / "out.jsonl")
    assert [line["source"] for line in lines] == [f"{file}:{n}" for n in range(1, 10)]
    for line, row in zip(lines, PAIRS, strict=True):
        prompt = row["prompt"][0]["content"]
        assert line["chosen"] == pytest.approx(plain_transformers(reward_model, prompt, row["chosen"]), abs=1e-4)
        assert line["rejected"] == pytest.approx(plain_transformers(reward_model, prompt, row["rejected"]), abs=1e-4)
        assert line["margin"] == pytest.approx(line["chosen"] - line["rejected"])


def test_a_reward_model_reads_texts_in_the_template_that_it_has(tmp_path: Path) -> None:
    """As its authors' model cards score: the template's ids, up to the end of the turn."""
    tokenizer = tokenizer_with("chatml")
    causal = untrained_llama(TinyConfig(hidden_size=32, intermediate_size=64, layers=2, heads=2), tokenizer, seed=0)
    ScalarModel(causal.base_model, torch.randn(1, 32)).save(tmp_path / "model", tokenizer)
    assert score(tmp_path / "model", write(tmp_path / "rows.jsonl", COMPLETIONS), tmp_path / "out.jsonl") == 0
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    for line, row in zip(read(tmp_path / "out.jsonl"), COMPLETIONS, strict=True):
        ids = tokenizer.apply_chat_template(row["messages"], return_dict=False)
        with torch.no_grad():
            expected = plain(torch.tensor([ids[: len(ids) - 1]])).logits.item()  # without the line end
        assert line["score"] == pytest.approx(expected, abs=1e-4)


def test_completions_have_one_score(reward_model: Path, tmp_path: Path) -> None:
    assert score(reward_model, write(tmp_path / "rows.jsonl", COMPLETIONS), tmp_path / "out.jsonl") == 0
    lines = read(tmp_path / "out.jsonl")
    assert [set(line) for line in lines] == [{"row", "source", "score"}] * 5
    assert lines[2]["score"] == pytest.approx(plain_transformers(reward_model, "q3", "yes yes yes"), abs=1e-4)


def test_prompt_and_completion_fields_are_read(reward_model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": "yes"}, {"prompt": "q", "completion": "no"}])
    assert score(reward_model, file, tmp_path / "out.jsonl") == 0
    assert read(tmp_path / "out.jsonl")[1]["score"] == pytest.approx(
        plain_transformers(reward_model, "q", "no"), abs=1e-4
    )


def test_batches_and_padding_do_not_change_a_score(reward_model: Path) -> None:
    scalar, generator = load_scalar(reward_model).eval(), random.Random(0)
    texts = [Text(n, [generator.randrange(4, 250) for _ in range(generator.randrange(1, 40))]) for n in range(17)]
    alone = score_texts(scalar, 3, texts, 1, "float32")
    for batch_size in (2, 5, 17):
        assert score_texts(scalar, 3, texts, batch_size, "float32") == pytest.approx(alone, abs=1e-5)


def test_bf16_scores_are_near(reward_model: Path) -> None:
    scalar = load_scalar(reward_model).eval()
    texts = [Text(n, list(range(4, 10 + n))) for n in range(5)]
    exact, near = (score_texts(scalar, 3, texts, 2, precision) for precision in ("float32", "bf16"))
    assert near == pytest.approx(exact, abs=0.05)
    assert near != exact


def test_a_stage_folder_stands_for_the_artifact_in_it(reward_model: Path, tmp_path: Path) -> None:
    from rlhf.runs import artifacts

    (tmp_path / "stage").mkdir()
    (tmp_path / "stage/artifact").symlink_to(reward_model)
    file = write(tmp_path / "rows.jsonl", COMPLETIONS)
    assert score(tmp_path / "stage", file, tmp_path / "out.jsonl") == 4  # no manifest yet: unfinished
    artifacts.complete(tmp_path / "stage/artifact", "reward/x", {}, "", {})
    try:
        assert score(tmp_path / "stage", file, tmp_path / "out.jsonl") == 0
    finally:
        (reward_model / artifacts.MANIFEST).unlink()


def test_the_table_gives_means_and_accuracy(
    reward_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score(reward_model, write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "out.jsonl")
    shown = capsys.readouterr().out
    for name in ("mean chosen", "mean rejected", "mean margin", "accuracy", "95 % interval"):
        assert name in shown


def demonstration(prompt: str) -> Demonstration:
    return Demonstration((Message("user", prompt), Message("assistant", "yes")), "helpful", "f:1")


def preference(prompt: str) -> Preference:
    return Preference((Message("user", prompt),), "a", "b", "unrated", "helpful", "unknown", "unknown", "f:1")


def test_accuracy_counts_a_tie_half() -> None:
    rows = [preference(f"q{n}") for n in range(4)]
    texts = [Text(n // 2, []) for n in range(8)]
    lines = to_lines(rows, texts, [2, 1, 1, 2, 3, 3, 5, 1])  # won, lost, tie, won
    metrics = summary(lines, rows)
    assert metrics["accuracy"].value == 2.5 / 4
    assert metrics["mean chosen"].value == (2 + 1 + 3 + 5) / 4
    assert metrics["mean margin"].value == (1 - 1 + 0 + 4) / 4


def test_the_accuracy_interval_is_wilsons() -> None:
    rows = [preference(f"q{n}") for n in range(10)]
    lines = to_lines(rows, [Text(n // 2, []) for n in range(20)], [1.0, 0.0] * 8 + [0.0, 1.0] * 2)
    accuracy = summary(lines, rows)["accuracy"]
    # Wilson for 8 of 10, from Newcombe (1998): .490 to .943
    assert (accuracy.low, accuracy.high) == (pytest.approx(0.490, abs=1e-3), pytest.approx(0.943, abs=1e-3))


# --- bad input


def failed(text: str, capsys: pytest.CaptureFixture[str], out: Path) -> None:
    shown = capsys.readouterr().err
    assert text in shown
    assert "Traceback" not in shown
    assert not out.exists()


def test_rows_that_cannot_be_read_are_refused_or_skipped(
    reward_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write(tmp_path / "pairs.jsonl", [PAIRS[0], pair("q", "", "b"), PAIRS[1]]), tmp_path / "out.jsonl"
    assert score(reward_model, file, out) == 3
    failed("pairs.jsonl:2: ", capsys, out)
    assert score(reward_model, file, out, "--bad-rows", "skip") == 0
    assert [line["source"][-2:] for line in read(out)] == [":1", ":3"]
    assert "left out: " in capsys.readouterr().err


def test_rows_that_the_format_cannot_hold_are_refused_or_skipped(
    reward_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write(tmp_path / "pairs.jsonl", [pair("[INST] q", "a", "b"), PAIRS[0]]), tmp_path / "out.jsonl"
    assert score(reward_model, file, out) == 3
    failed("pairs.jsonl:1: ", capsys, out)
    assert score(reward_model, file, out, "--bad-rows", "skip") == 0
    assert [line["row"] for line in read(out)] == [1]


def test_a_row_longer_than_the_model_is_not_cut(reward_model: Path) -> None:
    tokenizer = load_tokenizer(reward_model)
    rows = [demonstration("q " * 40), demonstration("q")]
    texts, unfit = encode(tokenizer, rows, 30)
    assert [text.row for text in texts] == [1]
    assert unfit[0].startswith("f:1: ")
    assert "and the model has 30 positions" in unfit[0]


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG\r\n\x00\x01", b"version https://git-lfs.github.com/spec/v1\n", b"5\n"]
)
def test_a_file_without_rows_is_refused(
    content: bytes, reward_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    assert score(reward_model, str(tmp_path / "rows.jsonl"), tmp_path / "out.jsonl") == 3
    failed("rows.jsonl", capsys, tmp_path / "out.jsonl")


def test_a_policy_is_no_reward_model(reward_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(reward_model)
    policy = untrained_llama(TinyConfig(hidden_size=32, intermediate_size=64, layers=1, heads=2), tokenizer, seed=0)
    save_causal(policy, tmp_path / "policy", tokenizer)
    assert score(tmp_path / "policy", write(tmp_path / "rows.jsonl", COMPLETIONS), tmp_path / "out.jsonl") == 4
    failed("is no reward model", capsys, tmp_path / "out.jsonl")


def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(tmp_path / "no-model", "no-file", tmp_path / "no/folder/out.jsonl") == 2
    failed("lies in no folder that exists", capsys, tmp_path / "no/folder/out.jsonl")
    assert score(tmp_path / "no-model", "no-file", tmp_path) == 2


def test_pairs_are_recognised_as_pairs(tmp_path: Path) -> None:
    rows, *_ = load_rows(write(tmp_path / "pairs.jsonl", PAIRS), "refuse")
    assert {type(row) for row in rows} == {Preference}
