"""Models that are sharded by ZeRO-3 while they load, on two ranks: same scores, and whole weights when saved.

The file is also the program of each rank: `test_sharded.py FOLDER`.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlhf.config import HardwareConfig, LoraConfig
from rlhf.models import add_lora, load_causal, load_scalar, load_tokenizer, save_causal, saving
from tests.worker_group import leave, run_ranks

TOKENS = torch.tensor([[5, 6, 7, 8], [9, 10, 3, 3]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
LORA = LoraConfig(rank=4, alpha=8)
RANKS = 2


@pytest.fixture
def folder(scalar, causal_folder, tokenizer, tmp_path):
    """A reward model, and a causal model with a trained adapter."""
    scalar.save(tmp_path / "reward", tokenizer)
    causal = trained(add_lora(load_causal(causal_folder), LORA, "causal", seed=0))
    save_causal(causal, tmp_path / "causal", tokenizer)
    return tmp_path


def trained(model: nn.Module) -> Any:
    """B starts at zero, so an untrained adapter would prove nothing; all ranks must get the same one."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.integration
def test_sharded_models_load_score_and_save_as_whole_ones_do(folder):
    run_ranks(__file__, folder, RANKS, timeout=170)

    read = torch.load(folder / "read.pt")
    reward, causal = load_scalar(folder / "reward"), load_causal(folder / "causal")
    torch.testing.assert_close(read["reward"], reward(TOKENS, MASK))
    torch.testing.assert_close(read["causal"], causal(TOKENS).logits)
    torch.testing.assert_close(read["adapter"], causal(TOKENS).logits)
    torch.testing.assert_close(read["zero head"], torch.zeros(TOKENS.shape))
    assert (read["lora"] - read["reward"]).abs().max() > 1e-2
    for name in ("saved", "saved/adapter", "in files"):
        torch.testing.assert_close(load_scalar(folder / name)(TOKENS, MASK), read["lora"], atol=1e-4, rtol=1e-4)
    writers = [set(found) for found in read["written"]]
    assert all(writers) and not writers[0] & writers[1]
    assert {file.name for file in (folder / "in files").glob("*.safetensors")} == writers[0] | writers[1]


@torch.no_grad()
def main(folder: Path) -> None:
    from rlhf.distributed.collectives import gather_objects
    from rlhf.distributed.engine import open_engine, sharded_loading

    hardware = HardwareConfig()
    with sharded_loading(hardware, local=False):
        models: dict[str, Any] = {
            "reward": load_scalar(folder / "reward"),
            "causal": load_causal(folder / "causal"),
            "adapter": load_causal(folder / "causal" / "adapter"),
            "zero head": load_scalar(folder / "causal"),
            "lora": load_scalar(folder / "reward"),
        }
    models["lora"] = trained(add_lora(models["lora"], LORA, "scalar", seed=0))
    engines = {name: open_engine(model, None, 1, hardware, local=False) for name, model in models.items()}
    read = {name: engines[name](TOKENS, MASK) for name in ("reward", "zero head", "lora")}
    read |= {name: engines[name](TOKENS).logits for name in ("causal", "adapter")}
    tokenizer, written, write_file = load_tokenizer(folder / "reward"), [], saving.write_file
    models["lora"].save(folder / "saved", tokenizer, all_ranks=True)
    saving.FILE_BYTES = 20_000
    saving.write_file = lambda path, *given: written.append(path.name) or write_file(path, *given)
    models["lora"].save(folder / "in files", tokenizer, all_ranks=True)
    read["written"] = gather_objects(written)
    if torch.distributed.get_rank() == 0:
        torch.save(read, folder / "read.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
