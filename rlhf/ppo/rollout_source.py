"""Two things at once, the second in a thread: scoring beside sampling, and sampling beside the update.

Either side may fail while the other works. Then the stage ends with that error, and neither waits for the other.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from rlhf.data.batches import Rollout, Scores, cat, select, to
from rlhf.distributed import collectives
from rlhf.ppo.step_profiler import PhaseTimer

Result = TypeVar("Result")
CPU = torch.device("cpu")
# What a stopped thread has to end its forward pass. One that waits for a rank that failed too is left behind.
STOP_S = 10.0


class Unwanted(Exception):
    """Ends a thread of whose result nobody has any more use."""


class Beside(Generic[Result]):
    """`work` in a thread of its own, which starts at once; on CUDA on a stream of its own.

    `work` is given a function to call now and then: it raises once the `with` block around has failed.
    """

    def __init__(self, work: Callable[[Callable[[], None]], Result], device: torch.device) -> None:
        self._work, self._threads = work, torch.get_num_threads()
        self._error: BaseException | None = None
        self._unwanted = threading.Event()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self.seconds = 0.0  # of the work, when it has ended
        self._thread = threading.Thread(target=self._run, name="beside", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises what the work has raised, if it has failed."""
        if self._error is not None:
            raise self._error

    def result(self) -> Result:
        """Waits for the end of the work."""
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
        torch.set_num_threads(self._threads)  # OpenMP keeps the number for each thread, and begins with all processors
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
            raise Unwanted


class ScoringBeside:
    """Scores of this rank's rows, `size` rows at a time, beside their sampling.

    A chunk is the next `size` rows that end here. All reading is done by one thread in the order of the chunks, and every
    rank has equally many of them, so what ranks say to each other within `read` comes in the same order everywhere.
    Sampling must say nothing to other ranks meanwhile. Which rows make a chunk does not depend on time.
    """

    def __init__(self, read: Callable[[Rollout], Scores], size: int, device: torch.device) -> None:
        self._read, self._size = read, size
        self._ended: list[Tensor] = []  # numbers of rows as they ended
        self._waiting: list[Rollout] = []  # for a chunk to be full
        self._chunks: queue.SimpleQueue[Rollout | None] = queue.SimpleQueue()
        self._spans: list[tuple[float, float]] = []  # when each chunk was read
        self._beside = Beside(self._read_all, device)

    def take(self, index_N: Tensor, ended: Rollout) -> None:
        """Rows that have ended, none perhaps; raises what scoring has raised."""
        self._beside.check()
        if not len(index_N):
            return
        self._ended.append(index_N.to(CPU))
        self._waiting.append(to(ended, CPU))  # to the host, so the two streams share no memory
        count = sum(len(part.finished_B) for part in self._waiting)
        self._hand_over(count - count % self._size)

    def finish(self) -> tuple[Scores, list[Tensor], float]:
        """The scores in the order of the batch, the rows of each chunk, and the seconds of reading until this call."""
        now = time.perf_counter()
        self._hand_over(self._size)  # the last chunk may be smaller
        self._chunks.put(None)
        scores, order_B = cat(self._beside.result()), torch.cat(self._ended)
        seconds = sum(max(min(end, now) - start, 0.0) for start, end in self._spans)
        return select(scores, order_B.argsort()), list(order_B.split(self._size)), seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._chunks.put(None)
        self._beside.__exit__(*error)

    def _hand_over(self, count: int) -> None:
        """The first `count` of the rows that wait."""
        if count and self._waiting:
            waiting = cat(self._waiting)
            for start in range(0, count, self._size):
                self._chunks.put(select(waiting, slice(start, start + self._size)))
            self._waiting = [rest] if len((rest := select(waiting, slice(count, None))).finished_B) else []

    def _read_all(self, go_on: Callable[[], None]) -> list[Scores]:
        read: list[Scores] = []
        while (chunk := self._chunks.get()) is not None:
            go_on()
            start = time.perf_counter()
            read.append(self._read(chunk))
            self._spans.append((start, time.perf_counter()))
        return read


@dataclass
class Ahead:
    """This rank's answers that were sampled before their iteration began, by the policy of one update earlier.

    A part of every checkpoint: when they are used, the weights that gave them are gone.
    """

    rollout: Rollout | None = None  # on the CPU
    positions: tuple[int, int] = (0, 0)  # what the sampler told of these answers

    def keep(self, rollout: Rollout, sampler: Any) -> None:
        self.rollout, self.positions = to(rollout, CPU), sampler.positions

    def take(self, sampler: Any) -> Rollout | None:
        """What was sampled ahead, once; the sampler tells again what it told of it."""
        taken, self.rollout = self.rollout, None
        if taken is not None:
            sampler.positions = self.positions
        return taken

    def save(self, folder: Path) -> None:
        if self.rollout is not None:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save({"rollout": vars(self.rollout), "positions": self.positions}, self._file(folder))

    def load(self, folder: Path) -> None:
        """What was saved there; nothing where nothing was sampled ahead, on no rank then. All ranks must call it."""
        if collectives.broadcast_result(lambda: self._file(folder).exists()):
            kept = torch.load(self._file(folder))
            self.rollout, self.positions = Rollout(**kept["rollout"]), kept["positions"]

    @staticmethod
    def _file(folder: Path) -> Path:
        return folder / f"rank-{collectives.rank()}.pt"


def answer_and_read(
    sample: Callable[..., Rollout],
    read: Callable[[Rollout], Scores],
    ahead: Ahead,
    sampler: Any,
    count: int,
    chunks: int,
    timer: PhaseTimer,
) -> tuple[Rollout, Scores, list[Tensor]]:
    """The answers to this rank's `count` prompts, their scores, and which rows were scored together.

    What was sampled ahead is taken as it is; else `sample` is called, and with more than one chunk is given `on_rows`.
    """
    rollout = ahead.take(sampler)
    if rollout is None and chunks > 1:
        with ScoringBeside(read, -(-count // chunks), timer.device) as scoring:
            with timer("sampling"):
                rollout = sample(scoring.take)
            with timer("scoring"):
                scores, read_together, seconds = scoring.finish()
        timer.beside("scoring", seconds)
        return rollout, scores, read_together
    if rollout is None:
        with timer("sampling"):
            rollout = sample()
    with timer("scoring"):
        return rollout, read(rollout), [torch.arange(count)]


def learn_and_sample(
    learn: Callable[..., dict[str, float]],
    sample: Callable[..., Rollout],
    ahead: Ahead,
    sampler: Any,
    timer: PhaseTimer,
) -> dict[str, float]:
    """The update, and beside it the answers of the next iteration, by the weights from before, which the sampler has.

    When it returns the sampler is free again.
    """
    with Beside(lambda go_on: sample(lambda *_: go_on()), timer.device) as sampling:
        with timer("update"):
            metrics = learn(on_minibatch=sampling.check)
        start = time.perf_counter()
        with timer("sampling"):
            ahead.keep(sampling.result(), sampler)
    timer.beside("sampling", max(sampling.seconds - (time.perf_counter() - start), 0.0))
    return metrics
