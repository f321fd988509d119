"""Training goes on with another number of ranks, or under another ZeRO stage, as if nothing had changed.

The file is also the program of each rank: `test_training_state.py FOLDER`. Two ranks write, three and one read.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rlhf.config import HardwareConfig, OptimConfig
from rlhf.distributed import engine as module
from rlhf.distributed.engine import LocalEngine, open_engine
from rlhf.errors import UserError
from tests.whole import full_state
from tests.worker_group import leave, run_ranks

OPTIM = OptimConfig(lr=0.05, schedule="cosine", min_warmup_steps=2, max_grad_norm=0.3)
STAGES = (0, 2, 3)
BEFORE, AFTER, ROWS = 2, 2, 12


class Net(nn.Module):
    """Odd sizes, so that shards need padding; one frozen matrix, one buffer that is kept and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.frozen, self.last = nn.Linear(7, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("passing", torch.tensor(1.0), persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        return self.last(torch.tanh(self.frozen(torch.tanh(self.first(rows))))) * self.get_buffer("scale")


def new_net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Net()


def rows_of(step: int) -> Tensor:
    return torch.randn(ROWS, 7, generator=torch.Generator().manual_seed(step))


def train(engine: module.Engine, steps: range, rank: int, ranks: int) -> None:
    for step in steps:
        mine = rows_of(step)[rank::ranks]
        engine.backward(engine(mine).pow(2).sum(), ROWS, last=True)
        engine.step()


def never_stopped() -> dict[str, Tensor]:
    """torch alone: AdamW, the clip and the schedule written out."""
    net = new_net()
    net.get_buffer("scale").fill_(1.5)
    matrices = [p for p in net.parameters() if p.requires_grad and p.dim() == 2]
    vectors = [p for p in net.parameters() if p.requires_grad and p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": OPTIM.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps)
    for step in range(BEFORE + AFTER):
        for group in adam.param_groups:
            group["lr"] = OPTIM.lr * module.learning_rate_fraction(step, OPTIM, 8)
        adam.zero_grad()
        (net(rows_of(step)).pow(2).sum() / ROWS).backward()
        torch.nn.utils.clip_grad_norm_([*matrices, *vectors], OPTIM.max_grad_norm)
        adam.step()
    return {name: tensor.detach() for name, tensor in net.named_parameters()}


def opened(stage: int, local: bool) -> module.Engine:
    return open_engine(new_net(), OPTIM, 8, HardwareConfig(zero_stage=stage), local)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two ranks after the first steps, one per ZeRO stage, and of one process."""
    folder = tmp_path_factory.mktemp("two")
    alone = opened(0, local=True)
    alone.module.get_buffer("scale").fill_(1.5)
    train(alone, range(BEFORE), 0, 1)
    alone.save(folder / "alone")
    run_ranks(__file__, folder, 2)
    return folder


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.integration
@pytest.mark.parametrize("stage", [*STAGES, "alone"])
def test_one_process_goes_on(written: Path, stage: int | str) -> None:
    engine = opened(0, local=True)
    engine.load(written / f"{stage}")
    train(engine, range(BEFORE, BEFORE + AFTER), 0, 1)
    assert_near(full_state(engine.module), never_stopped())


@pytest.mark.integration
def test_three_ranks_go_on(written: Path) -> None:
    run_ranks(__file__, written, 3)
    found = torch.load(written / "found.pt")
    assert len(found) == 9
    for state in found.values():
        assert_near(state, never_stopped())


def test_a_checkpoint_of_another_model_or_without_a_part_is_refused(tmp_path: Path) -> None:
    engine = opened(0, local=True)
    train(engine, range(1), 0, 1)
    engine.save(tmp_path)
    larger = LocalEngine(nn.Linear(7, 50), OPTIM, 8, HardwareConfig())
    with pytest.raises(UserError, match="lacks 350 elements of weight"):
        larger.load(tmp_path)
    state = torch.load(tmp_path / "rank-0.pt")
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        state[kind]["last.weight"] = state[kind]["last.weight"][:-4].clone()
    torch.save(state, tmp_path / "rank-0.pt")
    with pytest.raises(UserError, match="lacks 4 elements of last.weight"):
        engine.load(tmp_path)
    (tmp_path / "rank-0.pt").unlink()
    with pytest.raises(UserError, match="holds no training state"):
        engine.load(tmp_path)


def main(folder: Path) -> None:
    from rlhf.distributed import collectives

    module.import_deepspeed()
    torch.set_num_threads(1)
    rank, ranks = collectives.rank(), collectives.world_size()
    found = {}
    for stage in STAGES:
        if ranks == 2:
            engine = opened(stage, local=False)
            engine.module.get_buffer("scale").fill_(1.5)
            train(engine, range(BEFORE), rank, ranks)
            engine.save(folder / f"{stage}")
            continue
        for saved in (0, 2, 3):
            engine = opened(stage, local=False)
            engine.load(folder / f"{saved}")
            train(engine, range(BEFORE, BEFORE + AFTER), rank, ranks)
            found[f"{saved} -> {stage}"] = full_state(engine.module)
    if rank == 0 and found:
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
