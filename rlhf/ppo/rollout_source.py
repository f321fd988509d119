"""Rollouts, sampled on demand or, one step off-policy, in the background of the update.

Only this file uses threads. If one side fails while the other works, the stage ends with that error, and neither waits
for the other.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch

from reward_data import Prompt
from rlhf.config import RunConfig
from rlhf.data import next_prompts
from rlhf.data.batches import PromptBatch, Rollout, select, to
from rlhf.distributed import collectives
from rlhf.distributed.tensor_files import load_tensors
from rlhf.generation import Sampler
from rlhf.ppo.step_profiler import PhaseTimer

Result = TypeVar("Result")
CPU = torch.device("cpu")
# Time for a stopped thread to end its forward pass. A thread that waits for a failed rank is abandoned.
STOP_S = 10.0


class Cancelled(Exception):
    """Ends a thread whose result is not needed any more."""


class BackgroundTask(Generic[Result]):
    """Runs `work` in a thread, on CUDA on a stream of its own. It starts at once.

    `work` gets a function to call repeatedly, which raises if the `with` block has failed.
    """

    def __init__(self, work: Callable[[Callable[[], None]], Result], device: torch.device) -> None:
        self._work, self._threads = work, torch.get_num_threads()
        self._error: BaseException | None = None
        self._unwanted = threading.Event()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self.seconds = 0.0  # that the work took
        self._thread = threading.Thread(target=self._run, name="background", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises the error of the work, if it failed."""
        if self._error is not None:
            raise self._error

    def result(self) -> Result:
        """Waits for the work and returns its result."""
        self._thread.join()
        self.check()
        return self._result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            self._unwanted.set()
            self._thread.join(STOP_S)

    def _run(self) -> None:
        start = time.perf_counter()
        torch.set_num_threads(self._threads)  # OpenMP has one number per thread, and starts with all processors
        try:
            with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
                self._result = self._work(self._go_on)
                if self._stream is not None:
                    self._stream.synchronize()
        except BaseException as error:  # noqa: BLE001  the other thread raises it
            self._error = error
        self.seconds = time.perf_counter() - start

    def _go_on(self) -> None:
        if self._unwanted.is_set():
            raise Cancelled


@dataclass
class Prefetched:
    """This rank's rollout for the next iteration, sampled by the policy of one update earlier.

    Part of every checkpoint, because the weights that sampled it are gone when it is used.
    """

    rollout: Rollout | None = None  # on the CPU
    positions: tuple[int, int] = (0, 0)  # what the sampler reported

    def keep(self, rollout: Rollout, positions: tuple[int, int]) -> None:
        self.rollout, self.positions = to(rollout, CPU), positions

    def take(self) -> tuple[Rollout, tuple[int, int]] | None:
        """Returns the kept rollout and forgets it."""
        taken, self.rollout = self.rollout, None
        return None if taken is None else (taken, self.positions)

    def save(self, folder: Path) -> None:
        if self.rollout is not None:
            folder.mkdir(parents=True, exist_ok=True)
            state = {"rollout": vars(self.rollout), "positions": self.positions}
            torch.save(state, self._file(folder, collectives.rank()))

    def load(self, folder: Path) -> None:
        """Takes this rank's rows from those that all ranks saved, of whatever number; nothing where none were saved. All
        ranks must call it."""
        ranks = collectives.broadcast_result(lambda: self._ranks(folder))
        if not ranks:
            return
        saved = [load_tensors(self._file(folder, rank)) for rank in range(ranks)]
        rows = {name: torch.cat([each["rollout"][name] for each in saved]) for name in saved[0]["rollout"]}
        whole = Rollout(**rows)
        rank, world = collectives.rank(), collectives.world_size()
        self.rollout = select(whole, collectives.shard(len(whole.tokens_BT), rank, world))
        if ranks == world:
            self.positions = saved[rank]["positions"]
        else:  # of all ranks, in equal parts
            in_prompts, in_steps = (sum(each["positions"][i] for each in saved) // world for i in (0, 1))
            self.positions = (in_prompts, in_steps)

    def _ranks(self, folder: Path) -> int:
        """How many ranks saved a rollout."""
        return next(rank for rank in itertools.count() if not self._file(folder, rank).exists())

    @staticmethod
    def _file(folder: Path, rank: int) -> Path:
        return folder / f"rank-{rank}.pt"


@dataclass(frozen=True)
class Sampled:
    """One iteration's prompts, and this rank's responses to its shard."""

    batch: PromptBatch  # of all ranks
    prompts: list[Prompt]  # the records of this rank's rows
    rollout: Rollout  # this rank's rows
    staleness: int  # updates between the policy that sampled and the one that is trained


def records_of(batch: PromptBatch, prompts: Sequence[Prompt], group_size: int) -> list[Prompt]:
    """The records of the prompts in a batch of `next_prompts`."""
    return [prompts[key // group_size % len(prompts)] for key in batch.ids_B.tolist()]


class RolloutSource:
    """Rollouts, one per iteration. The sampler holds the policy of the last sync."""

    def __init__(
        self, config: RunConfig, sampler: Sampler, tokenizer: Any, prompts: Sequence[Prompt], timer: PhaseTimer
    ) -> None:
        self._config, self._sampler, self._tokenizer, self._prompts = config, sampler, tokenizer, prompts
        self._timer = timer
        self.prefetched = Prefetched()  # a part of every checkpoint
        self._shard = collectives.shard(config.ppo.batch_size, collectives.rank(), collectives.world_size())

    def next(self, iteration: int) -> Sampled:
        """The iteration's prompts and this rank's responses, sampled now unless they were prefetched."""
        with self._timer("sampling"):
            batch = self._prompts_of(iteration)
            kept = self.prefetched.take()
            if kept is not None:
                rollout, self._sampler.positions = kept  # restores what the sampler reported
            else:
                rollout = self._sample(batch, iteration)
        rows = records_of(select(batch, self._shard), self._prompts, self._config.ppo.group_size)
        return Sampled(batch, rows, rollout, staleness=int(kept is not None))

    @contextlib.contextmanager
    def prefetching(self, iteration: int) -> Iterator[Callable[[], None]]:
        """The context of an update. One step off-policy, it samples the responses of `iteration` in the background,
        with the weights from before the update.

        Yields a function for the update to call repeatedly, which raises the error of sampling.
        """
        ppo, timer = self._config.ppo, self._timer
        if not ppo.sampling.one_step_off_policy or iteration > ppo.iterations:
            with timer("update"):
                yield lambda: None
            return
        batch = self._prompts_of(iteration)
        with BackgroundTask(lambda go_on: self._sample(batch, iteration, go_on), timer.device) as sampling:
            with timer("update"):
                yield sampling.check
            start = time.perf_counter()
            with timer("sampling"):
                self.prefetched.keep(sampling.result(), self._sampler.positions)
        timer.overlap("sampling", max(sampling.seconds - (time.perf_counter() - start), 0.0))

    def _prompts_of(self, iteration: int) -> PromptBatch:
        return next_prompts(self._tokenizer, self._prompts, self._config, iteration)

    def _sample(self, batch: PromptBatch, iteration: int, go_on: Callable[[], None] | None = None) -> Rollout:
        mine = to(select(batch, self._shard), self._timer.device)
        return self._sampler.sample(mine, self._config.ppo.sampling, self._config.seed, iteration, go_on)
