"""`rlhf score`, `chat` and `import-gguf`: one model at a time."""

from __future__ import annotations

import argparse

from launch.commands.arguments import add_scoring, command, not_negative, positive, silence_deepspeed


def add(commands: argparse._SubParsersAction) -> None:
    score = command(commands, "score", _score, "reward scores of pairs or completions")
    score.add_argument("model", metavar="MODEL", help="a reward model's folder")
    score.add_argument(
        "file", metavar="FILE", help="pairs or prompts with completions, in any form that training reads"
    )
    score.add_argument("--out", required=True, metavar="OUT.jsonl", help="one line of scores per row")
    add_scoring(score)

    chat = command(commands, "chat", _chat, "talk with a model in the terminal")
    chat.add_argument("model", metavar="MODEL", help="a model's folder or hub name")
    chat.add_argument("--temperature", type=not_negative, default=0.7, help="0 takes the likeliest token (default 0.7)")
    chat.add_argument("--max-new-tokens", type=positive, default=512, metavar="N", help="default 512")

    gguf = command(commands, "import-gguf", _import_gguf, "turn a GGUF file into an ordinary model folder")
    gguf.add_argument("source", metavar="SOURCE", help="a GGUF file, or an installed package that holds one")
    gguf.add_argument("out", metavar="OUT", help="the folder to make")


def _score(args: argparse.Namespace, _: list[str]) -> int:
    silence_deepspeed()
    from launch.score import score

    score(args.model, args.file, args.out, args.batch_size, args.precision, args.bad_rows)
    return 0


def _chat(args: argparse.Namespace, _: list[str]) -> int:
    silence_deepspeed()
    from launch.chat import chat

    chat(args.model, args.temperature, args.max_new_tokens)
    return 0


def _import_gguf(args: argparse.Namespace, _: list[str]) -> int:
    silence_deepspeed()
    from rlhf.models import import_gguf

    print(f"{import_gguf(args.source, args.out)}: an ordinary model folder now")
    return 0
