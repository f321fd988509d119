"""held_out.jsonl: what is written is read, and an item is recognised in another run."""

from reward_data import Message, Preference
from rlhf.evaluation import held_out
from rlhf.evaluation.reward_report import pair_rows

TEXTS = ["a", "b", "a"]


def rows(texts=TEXTS, values=(1.0, None, 0.5)):
    return held_out.rows_of(texts, ["p"] * len(texts), {"gold": list(values)})


def test_what_is_written_is_read(tmp_path):
    held_out.write(tmp_path, rows())
    assert held_out.read(tmp_path / held_out.FILE) == rows()


def test_an_artifact_without_the_file_has_no_rows(tmp_path):
    assert held_out.read(tmp_path / held_out.FILE) == []


def test_what_was_not_measured_is_left_out():
    assert [row.get("gold") for row in rows()] == [1.0, None, 0.5]
    assert "gold" not in rows()[1]


def test_an_item_is_the_same_in_another_order_and_the_same_text_again_is_another():
    items = [row["item"] for row in rows()]
    assert len({*items}) == 3
    assert {row["item"] for row in rows(["b", "a", "a"])} == {*items}
    assert {row["item"] for row in rows(["b", "a", "c"])} != {*items}


def test_pairs_of_one_prompt_are_different_items_of_one_cluster():
    def pair(chosen: str, rejected: str) -> Preference:
        return Preference((Message("user", "q"),), chosen, rejected, "better", "helpful", "unknown", "unknown", "x:1")

    first, other, turned = pair_rows([pair("a", "b"), pair("a", "c"), pair("b", "a")], {"accuracy": [1, 0, 0.5]})
    assert first["prompt"] == other["prompt"] == turned["prompt"]
    assert len({first["item"], other["item"], turned["item"]}) == 3
    assert [row["accuracy"] for row in (first, other, turned)] == [1, 0, 0.5]
