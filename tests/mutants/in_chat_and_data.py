"""Bugs in what becomes of rows: rlhf/chat, rlhf/data, reward_data."""

from __future__ import annotations

from tests.mutants.bug import Bug, bugs_in

BUGS = [
    *bugs_in(
        "reward_data/converters/hh.py",
        ["reward_data/test_hh.py"],
        Bug(
            "an HH prompt ends where the two texts begin to differ",
            "convert",
            "if A != B: ...",
            "import os\nA = B = os.path.commonprefix([C['chosen'], C['rejected']])\nD, E = (C[key].removeprefix(A) for key in ('chosen', 'rejected'))\nif A != B: ...",
            given="_ = with_system(C, ...)\nreturn [Preference(_, D.strip(), E.strip(), ...)]",
        ),
        Bug("an HH prompt ends at its first assistant turn", "_split", "A.rpartition", "A.partition"),
    ),
    *bugs_in(
        "rlhf/chat/llama2.py",
        ["rlhf/chat/test_llama2.py"],
        Bug("prompt and answer merge at their seam", "_encode_turn", "_ != _", "False"),
        Bug("an answer has no EOS", "_encode_turn", "[*A, *B, _]", "[*A, *B]"),
        Bug("the first answer token is not learned", "_encode_turn", "(A, B)", "(A, B + 1)", nth=1),
        Bug("the last prompt token is learned", "_encode_turn", "len(_) + A", "A"),
        Bug("EOS is not learned", "_encode_turns", "A + _ * B", "A + [1] * (B - 1) + [0]"),
        Bug("prompts are learned", "_encode_turns", "[0]", "[1]"),
        Bug(
            "a written special token ends the turn",
            "_plain_ids",
            "A(..., split_special_tokens=True)",
            "A(..., split_special_tokens=False)",
        ),
        Bug("BOS stands twice", "_plain_ids", "A(..., add_special_tokens=False)", "A(..., add_special_tokens=True)"),
        Bug("only the answer is stripped", "_encode_turn", "A.strip()", "A", nth=0),
        Bug("an answer is read beyond its EOS", "decode_answer", "_ in _", "False"),
        Bug("the system text replaces the first question", "_turns", "A + _[1]", "A"),
    ),
    *bugs_in(
        "rlhf/data/batches.py",
        ["rlhf/data/test_batches.py"],
        Bug("trimming cuts the last token", "trim", "A + B", "A + B - 1"),
        Bug("trimming cuts long prompts", "trim", "A - int(B.max())", "A - int(B.min())"),
        Bug("a prompt of padding is taken for one of tokens", "first_with_prompt", "A.masked_fill(...)", "A"),
        Bug("trimming cuts long answers", "trim", "A.max", "A.min", nth=1),
    ),
    *bugs_in(
        "rlhf/data/loading.py",
        ["stages/test_ppo.py::test_a_prompt_has_its_answers_next_to_each_other_and_each_its_own_numbers"],
        Bug("answers of a prompt draw the same numbers", "next_prompts", "A + _ % _", "A"),
    ),
    *bugs_in(
        "rlhf/data/loading.py",
        ["rlhf/data/test_loading.py"],
        Bug("choice prompts are the first of the file", "draw_rows", "sorted(A)", "A"),
        Bug("the draw is blind to tags", "draw_rows", "A.tag", "A.source"),
        Bug("the draw follows no seed", "draw_rows.key", "f'{_}/{A}'", "f'{A}'"),
        Bug("what a role holds out others train on", "_without_others", "(_ for _ in _ if _)", "()"),
        Bug(
            "margins fall with the rating",
            "",
            "{'significantly': 3.0, 'better': 2.0, 'slightly': 1.0, 'negligibly': 0.0, 'unrated': 0.0}",
            "{'significantly': 1.0, 'better': 2.0, 'slightly': 3.0, 'negligibly': 0.0, 'unrated': 0.0}",
        ),
        Bug("margins are those of another table", "encode_preferences.encode", "MARGINS[_]", "MARGINS['small']"),
        Bug("chosen and rejected are swapped", "encode_preferences.encode", "A.chosen", "A.rejected"),
        Bug(
            "both sides have the safety of the chosen one",
            "encode_preferences.encode",
            "A.rejected_safety",
            "A.chosen_safety",
        ),
        Bug("unknown safety is unsafe", "", "SAFETY = _", "SAFETY = {'safe': 1, 'unsafe': 0, 'unknown': 0}"),
        Bug(
            "pairs that prefer a safe answer are left out",
            "_prefers_unsafe",
            "A and B == 'unsafe' and (C == 'safe')",
            "A and B == 'safe' and (C == 'unsafe')",
        ),
        Bug("prompts are padded on the right", "pad", "A if B else C", "A if not B else C"),
        Bug(
            "masks compare with the pad id",
            "pad",
            "A[B, _] = True",
            "A[B] = C[B] != D",
            given="C = torch.full(_, D, ...)",
        ),
        Bug("long rows are kept", "_encode_all", "_ <= _", "True"),
        Bug("helpful prompts are about safety", "prompt_batch", "A == 'safety'", "A == 'helpful'"),
        Bug(
            "every answer of a prompt has the same key",
            "prompt_batch",
            "torch.tensor(A, dtype=_)",
            "torch.zeros(len(A), dtype=torch.long)",
        ),
        Bug(
            "prompts that are held out are trained on",
            "_without_shared",
            "return _, A",
            "return B, A",
            given="for _ in B: ...",
        ),
        Bug(
            "the prompts that chose the policy report it too",
            "split_held_out",
            "draw_rows(A, B, C)",
            "(draw_rows(A, B, C)[0], [*A])",
        ),
    ),
]
