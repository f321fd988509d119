"""Sampling with vLLM inside the training process: one engine per worker, which gets its weights in memory.

vLLM is optional (`make vllm`); nothing is imported from it before a sampler is made.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
from rlhf.models import load_config
from rlhf.profiling.roofline import ModelSize, size_of

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process, so that it can be given tensors
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
CACHE_FRACTION = 0.25  # maximum fraction of free memory for keys and values
BLOCK = 128  # tokens per block of vLLM's cache on a CPU; fewer on a GPU


class VLLMSampler:
    """Samples with vLLM from the architecture in `folder`. Its weights are not read: call `load_weights` first.

    All ranks must make their samplers at the same time. Rows have at most `max_length` tokens (prompt and response),
    and `rows` of them are sampled at once. On a GPU the engine frees its memory after each `sample`. A response depends
    on the batch only by rounding of the logits.
    """

    def __init__(
        self,
        folder: Path,
        stop_ids: Sequence[int],
        pad_id: int,
        precision: str,
        device: torch.device,
        rows: int,
        max_length: int,
    ) -> None:
        self.stop_ids, self.pad_id = stop_ids, pad_id
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(load_config(folder), dtype=self.dtype).requires_grad_(False)
        self.size, self.tied = size_of(model), tied_names(model)
        self.vocab_size = model.config.get_text_config().vocab_size
        self.positions = (0, 0)
        self.in_group = dist.is_initialized()
        self.sleeps = device.type == "cuda"
        self.asleep: set[str] = set()
        self.llm = _open(
            model=str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            generation_config="vllm",  # no defaults from the folder
            dtype=str(self.dtype).removeprefix("torch."),
            # On a CPU vLLM packs the head, but not again after a reload if the head is tied to the embedding.
            hf_overrides={"tie_word_embeddings": False},
            logprobs_mode="processed_logprobs",  # after the temperature
            max_num_seqs=rows,
            max_model_len=max_length,
            kv_cache_memory_bytes=_cache_bytes(self.size, device, rows, max_length),
            enable_prefix_caching=False,  # cached prefixes would outlive the weights
            enable_sleep_mode=self.sleeps,
            gpu_memory_utilization=_share_free(device),
            # With several ranks the process group exists, and each engine is a group of one rank in it.
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
            for row, tokens, logprobs in self._responses(prompts, settings, seed, iteration):
                length_B[row] = n = len(tokens)
                tokens_BR[row, :n], logprobs_BR[row, :n] = torch.tensor(tokens), torch.tensor(logprobs)
                if go_on is not None:
                    go_on()
        finally:  # else, after an error of `go_on`, the other rows would be left for the next call
            self.llm.llm_engine.abort_request([str(row) for row in (length_B == 0).nonzero()[:, 0].tolist()])
            self._sleep()
        self.positions = (int(prompts.mask_BP.sum()), int((length_B - 1).sum()))
        return rollout_of(prompts, tokens_BR.to(device), logprobs_BR.to(device), length_B.to(device), self.stop_ids)

    def _responses(
        self, prompts: PromptBatch, settings: SamplingConfig, seed: int, iteration: int
    ) -> Iterator[tuple[int, list[int], list[float]]]:
        """(row, tokens, logprobs) of every response when it ends."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

        engine = self.llm.llm_engine
        ends = [
            stop for stop in self.stop_ids if stop < self.vocab_size
        ]  # vLLM refuses stop ids outside the vocabulary
        seeds = keyed_seed(seed, iteration, prompts.ids_B).tolist()
        for row, (tokens_P, mask_P) in enumerate(zip(prompts.tokens_BP, prompts.mask_BP, strict=True)):
            params = SamplingParams(
                temperature=settings.temperature,
                max_tokens=settings.max_new_tokens,
                seed=seeds[row],
                logprobs=0,  # of the sampled token alone
                ignore_eos=True,  # the model's own EOS; ours is the next line
                stop_token_ids=ends,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(str(row), {"prompt_token_ids": tokens_P[mask_P].tolist()}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                completion = output.outputs[0]
                tokens = list(completion.token_ids)
                of_each = [of_token[token].logprob for of_token, token in zip(completion.logprobs, tokens, strict=True)]
                yield int(output.request_id), tokens, of_each

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


def _open(**settings: Any) -> Any:
    os.environ.update(SETTINGS)
    with _process_kept():
        from vllm import LLM  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

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


def _share_free(device: torch.device) -> float:
    """The fraction of a device's memory that vLLM may use; it refuses to start if less is free. On a CPU its
    default."""
    if device.type != "cuda":
        return 0.92
    free, total = torch.cuda.mem_get_info(device)
    return 0.98 * free / total


def _cache_bytes(size: ModelSize, device: torch.device, rows: int, max_length: int) -> int:
    """Memory for the keys and values of all rows at full length, if available; with less, vLLM lets rows wait."""
    wanted = size.cache_bytes * BLOCK * (rows * -(-max_length // BLOCK) + 1)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return min(wanted, int(CACHE_FRACTION * free))
