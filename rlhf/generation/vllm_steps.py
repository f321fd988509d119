"""vLLM stepped by a caller, who adds and removes responses between two steps."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlhf.generation.vllm import Capacity, cache_bytes, open_llm, sampling_params, share_free


class Sampled(NamedTuple):
    name: str
    token: int
    logprobs: dict[int, float]
    """Of the model itself, at temperature 1: of the token and, as far as they were asked for, of the likeliest ones."""


class VLLMSteps:
    def __init__(self, folder: Path, of_token: int, device: torch.device, capacity: Capacity) -> None:
        """`of_token`: bytes of its keys and values. What does not fit into memory waits inside of vLLM."""
        self._llm = open_llm(
            model=str(folder),
            skip_tokenizer_init=True,
            generation_config="vllm",  # no defaults from the folder
            dtype="bfloat16" if device.type == "cuda" else "float32",
            logprobs_mode="raw_logprobs",
            max_num_seqs=capacity.rows,
            max_model_len=capacity.max_length,
            kv_cache_memory_bytes=cache_bytes(of_token, 1, device, capacity),
            gpu_memory_utilization=share_free(device),
            distributed_executor_backend="uni",
        )
        self._vocab_size = self._llm.llm_engine.model_config.get_vocab_size()

    def add(self, name: str, prompt: Sequence[int], stop_ids: Sequence[int], **sampling: Any) -> None:
        """`sampling`: of vLLM's SamplingParams."""
        params = sampling_params(stop_ids, self._vocab_size, whole=False, **sampling)
        self._llm.llm_engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)

    def step(self) -> Iterator[Sampled]:
        for output in self._llm.llm_engine.step():
            completion = output.outputs[0]
            logprobs = completion.logprobs or [{}] * len(completion.token_ids)
            for token, known in zip(completion.token_ids, logprobs, strict=True):
                yield Sampled(output.request_id, token, {other: value.logprob for other, value in known.items()})

    def abort(self, names: Sequence[str]) -> None:
        """Those that have ended are let pass."""
        self._llm.llm_engine.abort_request(list(names))

    def close(self) -> None:
        del self._llm
        gc.collect()  # an engine has reference cycles
