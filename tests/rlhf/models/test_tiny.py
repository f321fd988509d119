import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.config import RunConfig
from rlhf.errors import UserError
from rlhf.models import resolve, tiny


@pytest.fixture
def config(runs_dir):
    return run_config(runs_dir)


def run_config(runs_dir: Path, seed: int = 0, **shape: int) -> RunConfig:
    source = {"train": [{"path": "talk.jsonl"}]}
    (runs_dir.parent / "talk.jsonl").write_text("".join(map(demonstration, range(40))))
    small = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "layers": 1, "heads": 2} | shape
    return RunConfig.model_validate(
        {
            "name": "small",
            "runs_dir": runs_dir,
            "seed": seed,
            "model": {"tiny": small},
            "data": {"root": runs_dir.parent, "demonstrations": source, "preferences": source, "prompts": source},
        }
    )


def demonstration(number: int) -> str:
    turns = [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": f"{number} is said"}]
    return json.dumps({"messages": turns, "tag": "helpful"}) + "\n"


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_folder_is_ordinary(config):
    folder = resolve(config)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert folder == config.folder / "base"
    assert 260 < model.config.vocab_size == len(tokenizer) <= 300
    assert not model.config.tie_word_embeddings
    special = (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert special == ("<unk>", "<s>", "</s>", "<pad>")
    assert tokenizer.eos_token_id == model.config.eos_token_id


def test_second_call_makes_nothing(config):
    folder = resolve(config)
    marked = folder / "model.safetensors"
    before = marked.stat().st_mtime_ns
    assert resolve(config) == folder
    assert marked.stat().st_mtime_ns == before
    assert [path.name for path in config.folder.iterdir()] == ["base"]


def test_seed_decides_the_weights(config, runs_dir):
    torch.manual_seed(1)
    first = weights(resolve(config))
    torch.manual_seed(2)
    other = weights(resolve(run_config(runs_dir, seed=1)))
    assert weights(resolve(config)) == first
    assert other != first


def test_random_state_of_the_caller_is_left_alone(config):
    before = torch.get_rng_state()
    resolve(config)
    assert torch.equal(torch.get_rng_state(), before)


def test_changed_shape_makes_it_anew(config, runs_dir):
    resolve(config)
    folder = resolve(run_config(runs_dir, layers=2))
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 2
    assert [path.name for path in config.folder.iterdir()] == ["base"]


def test_failure_leaves_nothing_behind(config, monkeypatch):
    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(tiny, "save_causal", full_disk)
    with pytest.raises(OSError, match="no space"):
        resolve(config)
    assert list(config.folder.iterdir()) == []


def test_what_another_process_made_meanwhile_is_kept(config, monkeypatch):
    folder = config.folder / "base"
    save = tiny.save_causal

    def save_while_another_finishes(model, work, tokenizer):
        monkeypatch.setattr(tiny, "save_causal", save)
        tiny.make_tiny(config)
        (folder / "theirs").touch()
        save(model, work, tokenizer)

    monkeypatch.setattr(tiny, "save_causal", save_while_another_finishes)
    assert resolve(config) == folder
    assert (folder / "theirs").exists()
    assert [path.name for path in config.folder.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("shape", "key"), [({"vocab_size": 200}, "vocab_size is 200"), ({"hidden_size": 18}, "hidden_size 18")]
)
def test_impossible_shapes_are_refused(runs_dir, shape, key):
    with pytest.raises(UserError, match=key) as error:
        resolve(run_config(runs_dir, **shape))
    assert error.value.exit_code == 2


@given(st.text())
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_digits_are_single_tokens(tokenizer):
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
