"""Bugs in the fast forms of a layer: rlhf/kernels."""

from __future__ import annotations

from tests.mutants.bug import Bug, bugs_in

BUGS = [
    *bugs_in(
        "rlhf/kernels/attention.py",
        ["rlhf/kernels/test_attention.py"],
        Bug("a token sees the next one", "_blocks", "A.triu(1)", "A.triu(2)"),
        Bug(
            "only the first block of keys is masked",
            "_blocks",
            "A[:, _] = B",
            "A[:, :C] = B",
            given="torch.zeros(C, ...)",
        ),
        Bug(
            "the mean of weights' gradients stays in",
            "_CausalAttention.backward",
            "torch.baddbmm(A, ...)",
            "torch.baddbmm(0 * A, ...)",
        ),
        Bug("gradients of keys forget the scale", "_CausalAttention.backward", "A.mul_(_).to", "A.to"),
        Bug("scores forget the scale", "_weights", "torch.baddbmm(..., alpha=_)", "torch.baddbmm(..., alpha=1)"),
        Bug(
            "a block's keys get the gradient of one block alone", "_CausalAttention.backward", "A += B", "A = B", nth=1
        ),
        Bug("a mask is overlooked", "attend", "A and _ is None and B", "A and B"),
        Bug(
            "packed rows forget the scale",
            "packed_attention",
            "varlen_attn(..., scale=_, window_size=_)",
            "varlen_attn(..., scale=1.0, window_size=(-1, 0))",
        ),
        Bug("packed rows see what follows", "packed_attention", "(_, 0)", "(-1, -1)"),
        Bug(
            "packed rows are read without their windows",
            "_is_for_flash",
            "A and B and C and _ and D",
            "A and B and C and D",
        ),
        Bug("flash attention gets values of another size", "_is_ours", "A and _ == _", "A"),
        Bug(
            "flash attention gets heads that it cannot read",
            "_is_for_flash",
            "A and _ and B and C and D",
            "A and B and C and D",
        ),
        Bug("packed rows are read in float32", "packed_attention", "A.to(_)", "A.float()"),
    ),
    *bugs_in(
        "rlhf/kernels/logprobs.py",
        ["rlhf/kernels/test_logprobs.py"],
        Bug("logits are multiplied by the temperature", "_scaled", "A / B", "A * B"),
        Bug(
            "the temperature does not reach the chunks",
            "logprobs_and_entropy_from_hidden",
            "_Logprobs.apply(A, B, C, _, ...)",
            "_Logprobs.apply(A, B, C, 1.0, ...)",
        ),
        Bug("chunks stay in bfloat16", "_scaled", "_ if _ else A.float() / B", "A / B"),
        Bug("entropy carries a gradient", "_Logprobs.forward", "_.mark_non_differentiable(_)", ""),
        Bug("the entropy of the chunks has the wrong sign", "_read", "A = -B", "A = B"),
        Bug("the gradient does not know the temperature", "_to_gradient", "A / _", "A"),
        Bug("the gradient is that of the logits alone", "_to_gradient", "-_[_]", "0.0"),
        Bug(
            "blocks of the gradient take each other's labels",
            "_to_gradient",
            "A[B, None]",
            "A[:len(C), None]",
            given="C.mul_(-_[B])",
        ),
        Bug("labels are shifted by one", "logprobs_and_entropy_from_hidden", "A.flatten()", "A.flatten().roll(1)"),
        Bug("the weight gets the gradient of one chunk alone", "_Logprobs.backward", "_ == 0", "True"),
        Bug("the weight's gradient begins with what was there", "_Logprobs.backward", "_ == 0", "False"),
        Bug("kept logits are read as those of every chunk", "_Logprobs.backward", "_.last_CV = None", ""),
        Bug("two chunks have logits at once", "_Logprobs.backward", "del _, _", ""),
        Bug("the logits of all positions exist at once", "_Logprobs.forward", "range(0, A, _)", "range(0, A, 10**9)"),
    ),
    *bugs_in(
        "rlhf/kernels/norm.py",
        ["rlhf/kernels/test_norm.py"],
        Bug("the gradient forgets that the scale depends on the input", "_RMSNorm.backward", "A.sub_(_)", "A"),
        Bug(
            "the weight's gradient is that of its input",
            "_RMSNorm.backward",
            "A * B",
            "A * C",
            given="_, B = (_, C * _)",
        ),
        Bug("heads read a rounded norm", "tune_norms", "A and _", "A"),
    ),
]
