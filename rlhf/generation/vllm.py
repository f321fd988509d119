"""Sampling with vLLM inside the training process: one engine per worker, which gets its weights in memory.

vLLM is optional (`make vllm`); nothing is imported from it before a sampler is made.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.config import SamplingConfig
from rlhf.data.batches import PromptBatch, Rollout
from rlhf.distributed import collectives
from rlhf.generation.counter_rng import keyed_seed
from rlhf.generation.sampler import rollout_of
from rlhf.models import load_config, weights_that_fit
from rlhf.profiling.roofline import ModelSize, size_of

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process, so that it can be given tensors
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
CACHE_FRACTION = 0.25  # maximum fraction of free memory for keys and values
BLOCK = 128  # tokens per block of vLLM's cache on a CPU; fewer on a GPU


@dataclass(frozen=True)
class Capacity:
    """Of an engine: rows that each of its ranks samples at once, tokens of a row (prompt and response), and the ranks,
    one after another, that share the engine."""

    rows: int
    max_length: int
    tensor_parallel: int = 1


@dataclass(frozen=True)
class Described:
    """A model without its weights."""

    size: ModelSize
    shapes: dict[str, torch.Size]
    tied: dict[str, list[str]]
    vocab_size: int
    kv_heads: int


def described(folder: Path, dtype: torch.dtype) -> Described:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(folder), dtype=dtype).requires_grad_(False)
    text = model.config.get_text_config()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return Described(size_of(model), shapes, tied_names(model), text.vocab_size, text.num_key_value_heads)


@dataclass(frozen=True)
class Request:
    """A prompt; `mine`: of this rank, whose row it is, and not of another one of the engine."""

    row: int
    tokens: list[int]
    seed: int
    mine: bool


class VLLMSampler:
    """Samples with vLLM from the architecture in `folder`. Its weights are not read: call `load_weights` first.

    All ranks must make their samplers at the same time. On a GPU the engine frees its memory after each `sample`. A
    response depends on the batch only by rounding of the logits.

    Ranks that share an engine keep a part of every weight each, and sample the rows of all of them. They must load and
    sample at the same time.
    """

    def __init__(
        self,
        folder: Path,
        stop_ids: Sequence[int],
        pad_id: int,
        precision: str,
        device: torch.device,
        capacity: Capacity,
    ) -> None:
        self.stop_ids, self.pad_id, self.tensor_parallel = stop_ids, pad_id, capacity.tensor_parallel
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        model = described(folder, self.dtype)
        self.size, self.tied, self.shapes = model.size, model.tied, model.shapes
        self.vocab_size = model.vocab_size
        self.positions = (0, 0)
        self.in_group = dist.is_initialized()
        self.sleeps = device.type == "cuda"
        self.asleep: set[str] = set()
        self.llm = open_llm(
            model=str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            generation_config="vllm",  # no defaults from the folder
            dtype=str(self.dtype).removeprefix("torch."),
            # On a CPU vLLM packs the head, but not again after a reload if the head is tied to the embedding.
            hf_overrides={"tie_word_embeddings": False},
            logprobs_mode="processed_logprobs",  # after the temperature
            max_num_seqs=capacity.rows * capacity.tensor_parallel,
            max_model_len=capacity.max_length,
            kv_cache_memory_bytes=cache_bytes(self.size.cache_bytes, model.kv_heads, device, capacity),
            tensor_parallel_size=capacity.tensor_parallel,
            enable_prefix_caching=False,  # cached prefixes would outlive the weights
            enable_sleep_mode=self.sleeps,
            gpu_memory_utilization=share_free(device),
            # With several ranks the process group exists, and each engine is a group in it.
            distributed_executor_backend="external_launcher" if collectives.world_size() > 1 else "uni",
        )
        self._sleep()

    @torch.no_grad()
    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> int:
        """Replaces all weights, given with their names in transformers; returns the number of bytes copied."""
        self._wake("weights")
        total = 0

        def copies() -> Iterator[tuple[str, Tensor]]:
            nonlocal total
            for name, tensor in named_tensors:
                total += tensor.numel() * tensor.element_size()
                # vLLM keeps tensors until a layer is complete, but a gathered one is freed before that.
                for target in (name, *self.tied.get(name, ())):
                    yield target, tensor.to(self.dtype, copy=True)

        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": copies()})
        return total

    def take(self, path: str | Path) -> bool:
        """Loads the weights of the model in `path`, tensor by tensor. Returns False, and reads nothing, if that model has
        another shape."""
        named = weights_that_fit(path, self.shapes)
        if named is not None:
            self.load_weights(named)
        return named is not None

    @torch.no_grad()
    def sample(
        self,
        prompts: PromptBatch,
        settings: SamplingConfig,
        seed: int,
        iteration: int,
        go_on: Callable[[], None] | None = None,
    ) -> Rollout:
        """Responses for every prompt. R is `settings.max_new_tokens`; the engine has its own number of rows.

        A row's generator starts from (seed, iteration, prompt id). `go_on`: see `Sampler`.
        """
        B, R, device = len(prompts.ids_B), settings.max_new_tokens, prompts.tokens_BP.device
        tokens_BR = torch.full((B, R), self.pad_id, dtype=torch.int64)
        logprobs_BR = torch.zeros((B, R), dtype=torch.float32)
        length_B = torch.zeros(B, dtype=torch.int64)

        self._wake("weights", "kv_cache")
        try:
            for row, tokens, logprobs in self._responses(self._requests(prompts, settings, seed, iteration), settings):
                length_B[row] = n = len(tokens)
                tokens_BR[row, :n], logprobs_BR[row, :n] = torch.tensor(tokens), torch.tensor(logprobs)
                if go_on is not None:
                    go_on()
        finally:
            self._sleep()
        self.positions = (int(prompts.mask_BP.sum()), int((length_B - 1).sum()))
        return rollout_of(prompts, tokens_BR.to(device), logprobs_BR.to(device), length_B.to(device), self.stop_ids)

    def _requests(self, prompts: PromptBatch, settings: SamplingConfig, seed: int, iteration: int) -> list[Request]:
        """Those of all ranks of the engine, in the order of the ranks."""
        seeds = keyed_seed(seed, iteration, prompts.ids_B).tolist()
        rows = enumerate(zip(prompts.tokens_BP, prompts.mask_BP, seeds, strict=True))
        mine = [Request(row, tokens_P[mask_P].tolist(), seed, mine=True) for row, (tokens_P, mask_P, seed) in rows]
        if self.tensor_parallel == 1:
            return mine
        from vllm.distributed import get_tp_group  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

        group = get_tp_group()
        of_ranks: list[Any] = [None] * self.tensor_parallel
        dist.all_gather_object(of_ranks, mine, group.cpu_group)
        return [
            replace(request, mine=rank == group.rank_in_group)
            for rank, requests in enumerate(of_ranks)
            for request in requests
        ]

    def _responses(
        self, requests: Sequence[Request], settings: SamplingConfig
    ) -> Iterator[tuple[int, list[int], list[float]]]:
        """(row, tokens, logprobs) of every response of this rank when it ends."""
        engine, waiting = self.llm.llm_engine, {}
        try:
            for number, request in enumerate(requests):
                waiting[str(number)] = request
                engine.add_request(str(number), {"prompt_token_ids": request.tokens}, self._params(request, settings))
            while engine.has_unfinished_requests():
                for output in engine.step():
                    request, completion = waiting.pop(output.request_id), output.outputs[0]
                    if not request.mine:
                        continue
                    tokens = list(completion.token_ids)
                    of_each = zip(completion.logprobs, tokens, strict=True)
                    yield request.row, tokens, [of_token[token].logprob for of_token, token in of_each]
        finally:  # else, where the caller ends it, the other rows would be left for the next call
            engine.abort_request(list(waiting))

    def _params(self, request: Request, settings: SamplingConfig) -> Any:
        return sampling_params(
            self.stop_ids,
            self.vocab_size,
            whole=True,
            temperature=settings.temperature,
            max_tokens=settings.max_new_tokens,
            seed=request.seed,
            logprobs=0,  # of the sampled token alone
        )

    def _wake(self, *parts: str) -> None:
        if sleeping := self.asleep.intersection(parts):
            self.llm.wake_up(tags=sorted(sleeping))
            self.asleep -= sleeping

    def _sleep(self) -> None:
        """Moves weights to main memory and drops keys and values, to free memory for the trainer."""
        if self.sleeps:
            self.llm.sleep(level=1)
            self.asleep = {"weights", "kv_cache"}

    def close(self) -> None:
        """Frees the weights, in main memory too; nothing can be sampled afterwards."""
        with _group_kept() if self.in_group else nullcontext():
            del self.llm
            gc.collect()  # an engine has reference cycles


def sampling_params(stop_ids: Sequence[int], vocab_size: int, whole: bool, **own: Any) -> Any:
    """For token ids that end with one of `stop_ids`, told at their end (`whole`) or as they come. `own`: of vLLM's
    SamplingParams."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
    from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    return SamplingParams(
        ignore_eos=True,  # the model's own EOS; ours is the next line
        stop_token_ids=[stop for stop in stop_ids if stop < vocab_size],  # vLLM refuses others
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY if whole else RequestOutputKind.DELTA,
        **own,
    )


def open_llm(**settings: Any) -> Any:
    os.environ.update(SETTINGS)
    with _process_kept():
        from vllm import LLM  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
        from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

        if current_platform.is_cpu():  # after a part of a prompt vLLM rewinds the row's generator, which a CPU's cannot
            settings["enable_chunked_prefill"] = False
        with _no_shared_memory():
            return LLM(**settings)


@contextmanager
def _process_kept() -> Iterator[None]:
    """vLLM changes the environment, seeds torch, and on a CPU forbids `torch.set_num_threads`. This restores the
    trainer's state.
    """
    environment, threads, set_num_threads = dict(os.environ), torch.get_num_threads(), torch.set_num_threads
    with torch.random.fork_rng():
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(threads)
            os.environ.clear()
            os.environ.update(environment)


@contextmanager
def _no_shared_memory() -> Iterator[None]:
    """On a CPU vLLM gives the shared memory of its ranks the same name in every run, so that a second one on the machine,
    or one after a killed one, cannot start. Without it the ranks use their process group."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    share = CpuCommunicator._all_group_ranks_share_shm_group_name
    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False
    try:
        yield
    finally:
        CpuCommunicator._all_group_ranks_share_shm_group_name = share


@contextmanager
def _group_kept() -> Iterator[None]:
    """A dropped engine destroys the process group, even one that it did not make: this keeps the trainer's."""
    destroy = dist.destroy_process_group

    def destroy_parts(group: dist.ProcessGroup | None = None) -> None:
        if group is not None:
            destroy(group)

    dist.destroy_process_group = destroy_parts
    try:
        yield
    finally:
        dist.destroy_process_group = destroy


def tied_names(model: Any) -> dict[str, list[str]]:
    """The name of the embedding, with that of the head if they are tied."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(part): f"{name}.weight" for name, part in model.named_modules()}
    return {names[id(table)]: [names[id(head)]]} if head.weight is table.weight else {}


def share_free(device: torch.device) -> float:
    """The fraction of a device's memory that vLLM may use; it refuses to start if less is free. On a CPU its
    default."""
    if device.type != "cuda":
        return 0.92
    free, total = torch.cuda.mem_get_info(device)
    return 0.98 * free / total


def cache_bytes(of_token: int, kv_heads: int, device: torch.device, capacity: Capacity) -> int:
    """Memory of one rank for the keys and values of all rows at full length, if available; with less, vLLM lets rows
    wait. Ranks divide the heads of a row, and all have the same amount. `of_token`: bytes of all its keys and values."""
    ranks = capacity.tensor_parallel
    blocks = capacity.rows * ranks * -(-capacity.max_length // BLOCK) + 1
    wanted = of_token * BLOCK * blocks // min(ranks, kv_heads)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    there = int(CACHE_FRACTION * free)
    return min(wanted, there if ranks == 1 else -collectives.largest(-there))
