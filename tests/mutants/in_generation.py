"""Bugs in sampling: rlhf/generation."""

from __future__ import annotations

from tests.mutants.bug import Bug, bugs_in

BUGS = [
    *bugs_in(
        "rlhf/generation/counter_rng.py",
        [
            "rlhf/generation/test_counter_rng.py::test_keyed_numbers_are_those_of_whole_number_arithmetic",
            "rlhf/generation/test_counter_rng.py::test_tokens_follow_the_softmax",
            "rlhf/generation/test_counter_rng.py::test_a_picked_token_is_where_the_cumulative_distribution_passes_the_number",
            "rlhf/generation/test_counter_rng.py::test_what_rounding_leaves_falls_to_no_impossible_token",
            "rlhf/generation/test_counter_rng.py::test_every_place_in_a_large_vocabulary_is_found",
        ],
        Bug("sampling is greedy", "pick_token", "_[_].clamp(...)", "A.argmax(-1)", given="A.shape"),
        Bug(
            "unlikely tokens are never sampled (top-p)",
            "pick_token",
            "A = B",
            "A, C = (B, C.where(C > 0.05, 0.0))",
            nth=0,
            given="C.shape",
        ),
        Bug("logits are flattened", "pick_token", "A = B", "A, C = (B, C.sqrt())", nth=0, given="C.shape"),
        Bug(
            "tokens of probability 0 are sampled at 0",
            "_first_above",
            "torch.searchsorted(..., right=True)",
            "torch.searchsorted(..., right=False)",
        ),
        Bug("the last token gets what rounding leaves", "_first_above", "A.minimum(_)", "A"),
        Bug("tokens before the block are not counted", "pick_token", "A - _", "A", nth=3),
        Bug("the last block is left out", "pick_token", "A if B % BLOCK else _", "A if B < BLOCK else []"),
        Bug("every position draws the same number", "_hash", "(A, B, *_)", "(A, B)"),
        Bug("every prompt draws the same number", "_hash", "(A, _, *B)", "(A, *B)"),
        Bug("every iteration draws the same number", "_hash", "(_, A, *B)", "(A, *B)"),
        Bug("every seed draws the same number", "_hash", "torch.full_like(A, _)", "torch.zeros_like(A)"),
        Bug(
            "keys are added up",
            "_hash",
            "_ ^ _",
            "torch.full_like(A, B) + C + A + sum(D)",
            given="_ = _mix(torch.full_like(A, B))\nfor _ in (C, A, *D): ...",
        ),
        Bug("negative hashes shift in ones", "_shift_right", "A & _", "A"),
        Bug("a number may be 1", "keyed_uniform", "A * _", "A / (2.0**24 - 1)"),
    ),
    *bugs_in(
        "rlhf/generation/cuda_graph.py",
        ["rlhf/generation/test_cuda_graph.py"],
        Bug("a graph outlives the cache that it was recorded for", "StepGraphs.__call__", "_ != A", "A < 0"),
        Bug(
            "rows that are gone see nothing",
            "StepGraphs._input",
            "A[:B].masked_fill_(...)",
            "A[B:] = -torch.inf; A[:B].masked_fill_(...)",
        ),
        Bug("a graph has fewer rows than the cache", "rows_of_graph", "-(-A // B) * B", "max(A // B, 1) * B"),
    ),
    *bugs_in(
        "rlhf/generation/in_process.py",
        ["rlhf/generation/test_decoders.py", "rlhf/generation/test_in_process.py"],
        Bug("the sampler ignores the temperature", "_Run._draw", "A.div_(_)", "A"),
        Bug("sampling cannot be ended from outside", "InProcessSampler.sample", "if A is not None: ...", ""),
        Bug(
            "all tokens of an answer draw the same number",
            "_Run._draw",
            "keyed_uniform(*A, B, _)",
            "keyed_uniform(*A, B, 0)",
        ),
        Bug("a number belongs to a row, not to a prompt", "_Run._draw", "_.ids_B[A]", "A"),
        Bug("a prompt is read for each of its answers", "_Run.admit", "self.prompt_B[A]", "A"),
        Bug(
            "answers begin as those of the first prompt", "_Run.admit", "self._draw(A[B], C)", "self._draw(A[B * 0], C)"
        ),
        Bug("copies are of the rows that came first", "_Run.admit", "_ + A", "A"),
        Bug("rows stay when they have ended", "_Run._release", "_ & A", "A"),
    ),
    *bugs_in(
        "rlhf/generation/sampler.py",
        ["rlhf/generation/test_in_process.py"],
        Bug("only the first stop id ends an answer", "is_stop", "(C == A for A in B)", "(C == A for A in B[:1])"),
    ),
    *bugs_in(
        "rlhf/generation/kv_cache.py",
        ["rlhf/generation/test_kv_cache.py"],
        Bug("a row sees a column of its predecessor", "SlotCache.mask_SC", "A[B]", "A[B] - 1"),
        Bug("a row that moves keeps its old mask", "SlotCache.keep", "self.start_S[_] = _", ""),
        Bug("a copied row lacks what its source has read", "SlotCache.fork", "_ = _[_, _, _]", ""),
        Bug("a copied row has the mask of its predecessor", "SlotCache.fork", "self.start_S[_] = _", ""),
        Bug("positions are one too far", "SlotCache.position_S", "A - 1", "A"),
        Bug("a row sees columns that are not yet written", "SlotCache.mask_SC", "A & _", "A"),
        Bug("long rows that have gone keep their room", "SlotCache.step", "A or _", "A"),
        Bug("many rows and many columns share no limit", "SlotCache.slots_now", "min(A, _)", "A"),
        Bug("columns are not given up for more rows", "SlotCache.make_room", "self._move(0)", "pass"),
        Bug(
            "a row that moves leaves its last token",
            "SlotCache.keep",
            "A[B, _, _] = A[C, _, D:E]",
            "A[B, :, D:E - 1] = A[C, :, D:E - 1]",
        ),
    ),
    *bugs_in(
        "rlhf/generation/kv_cache.py",
        ["rlhf/generation/test_cuda_graph.py"],
        Bug("keys and values wait for the garbage collection", "SlotLayer.__init__", "weakref.proxy(A)", "A"),
    ),
    *bugs_in(
        "rlhf/generation/llama.py",
        ["rlhf/generation/test_decoders.py"],
        Bug(
            "prompts see what follows",
            "LlamaDecoder.prefill.attend",
            "causal(..., is_causal=True)",
            "causal(..., is_causal=False)",
        ),
        Bug("positions turn the wrong way", "LlamaDecoder._rotation", "[A, B]", "[B, A]", nth=1),
        Bug(
            "key heads go to the wrong query heads",
            "LlamaDecoder.step.attend",
            "A.unflatten(1, (B, _))",
            "A.unflatten(1, (-1, B)).transpose(1, 2)",
        ),
        Bug("a row sees what its slot held before", "LlamaDecoder.step", "float('-inf')", "0.0"),
        Bug("the first logits are of another row", "LlamaDecoder.prefill", "A[B - 1]", "A[B - C]", given="C.tolist"),
        Bug(
            "a scaled rotation is taken for a plain one",
            "is_plain_llama",
            "A and B and C and _ and D and E",
            "A and B and C and D and E",
        ),
    ),
    *bugs_in(
        "rlhf/generation/vllm.py",
        [
            "rlhf/generation/test_vllm.py::test_every_weight_is_handed_over_and_outlives_its_turn",
            "rlhf/generation/test_vllm.py::test_on_a_gpu_the_engine_sleeps_but_while_it_loads_and_samples",
            "rlhf/generation/test_vllm.py::test_what_ends_the_sampling_ends_the_other_rows_and_puts_the_engine_to_sleep",
        ],
        Bug("a weight view outlives its turn", "VLLMSampler.load_weights.copies", "A.to(B, copy=True)", "A.to(B)"),
        Bug(
            "weights are not loaded",
            "VLLMSampler.load_weights",
            "_.collective_rpc('reload_weights', kwargs={'weights_iterator': A})",
            "list(A)",
        ),
        Bug("a head that is the table keeps its old weights", "VLLMSampler.load_weights.copies", "(A, *_)", "(A,)"),
        Bug("the engine never sleeps", "VLLMSampler._sleep", "if _: ...", "if False: ..."),
        Bug(
            "weights are loaded into memory that is gone",
            "VLLMSampler.load_weights",
            "self._wake('weights')",
            "self._wake()",
        ),
        Bug("rows that nobody takes stay in the engine", "VLLMSampler._responses", "list(waiting)", "[]"),
    ),
]
