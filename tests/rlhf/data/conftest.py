import pytest

from rlhf.config import RunConfig
from rlhf.models.tiny import train_tokenizer
from tests.rlhf.data.rows import written


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["hello, how are you?"] * 5, 280)


@pytest.fixture
def config(tmp_path):
    """A function from files of rows and settings to a run that reads `train.jsonl` (and `held_out.jsonl`)."""

    def make(train, held_out=None, **settings):
        role = {"train": [{"path": "train.jsonl"}]}
        (tmp_path / "train.jsonl").write_text(written(train))
        if held_out is not None:
            (tmp_path / "held_out.jsonl").write_text(written(held_out))
            role["held_out"] = [{"path": "held_out.jsonl"}]
        roles = dict.fromkeys(("demonstrations", "preferences", "prompts"), role)
        return RunConfig.model_validate({"name": "x", "data": {"root": tmp_path} | roles | settings})

    return make
