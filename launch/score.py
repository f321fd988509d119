"""`rlhf score`: what a reward model, or a DPO policy, says of pairs or completions."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import reward_data
from launch.implicit_reward import ImplicitReward, load_implicit_reward
from launch.model_folder import model_folder
from reward_data import DataError, Demonstration, Message, Preference, prompt_of
from rlhf.chat import format_of
from rlhf.data import pad
from rlhf.errors import UserError
from rlhf.evaluation.items import Item
from rlhf.evaluation.statistics import Estimate, bootstrap_mean, proportion
from rlhf.models import Encoder, ScalarModel, load_encoder, load_reward_scalar, load_tokenizer, positions
from rlhf.runs import artifacts

Row = Preference | Demonstration
BadRows = Literal["refuse", "skip"]
Reward = ScalarModel | Encoder | ImplicitReward


@dataclass(frozen=True)
class Text:
    """One response with its prompt, as the reward model reads it."""

    row: int
    ids: list[int]
    prompt: int = 0  # how many of them come before the response, where that was asked for


def score(model: str, file: str, out: str, batch_size: int, precision: str, bad_rows: BadRows) -> list[dict[str, Any]]:
    """Score every response in `file` with the reward model `model`, write one line per row to `out`, and print a summary.

    Returns the lines. UserError (2, 3 or 4) for a place that cannot be written, bad data, and no reward model.
    """
    check_out(Path(out))
    rows, refused, findings = load_rows(file, bad_rows)
    folder = model_folder(model)
    tokenizer, scalar = load_tokenizer(folder), load_reward_model(folder)
    texts, unfit = texts_for(scalar, tokenizer, rows)
    refuse_unfit(unfit, bool(texts), bad_rows)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with Progress(*bar_columns(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("scoring", total=len(texts))
        scores = score_texts(
            scalar.to(device), tokenizer.pad_token_id, texts, batch_size, precision, lambda n: bar.advance(task, n)
        )
    lines = to_lines(rows, texts, scores)
    artifacts.write_atomic(Path(out), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    for finding in findings:
        print(f"data: {finding}", file=sys.stderr)
    for reason in [*refused, *unfit]:
        print(f"left out: {reason}", file=sys.stderr)
    if refused or unfit:
        print(f"left out: {len(refused) + len(unfit)} rows in all", file=sys.stderr)
    Console().print(table(summary(lines, [rows[line["row"]] for line in lines]), len(lines), out))
    return lines


def check_out(out: Path) -> None:
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(
            f"--out: {out} {'is a folder' if out.is_dir() else 'lies in no folder that exists'}; name a file"
        )


def load_rows(file: str, bad_rows: BadRows) -> tuple[list[Row], list[str], list[str]]:
    """Pairs if the file holds pairs, else prompts with one completion; rows that were left out; what was not read."""
    try:
        loaded = reward_data.load("preferences", file, bad_rows=bad_rows)
    except DataError:  # the second reading says what is wrong with the file, if anything is
        loaded = reward_data.load("answers", file, bad_rows=bad_rows)
    return loaded.rows, loaded.refused, loaded.findings


def load_reward_model(folder: Path) -> Reward:
    if implicit := load_implicit_reward(folder):
        return implicit.eval()
    if encoder := load_encoder(folder):
        return encoder.eval()
    return load_reward_scalar(folder)


def texts_for(model: Reward, tokenizer: Any, rows: Sequence[Row | Item]) -> tuple[list[Text], list[str]]:
    """As `encode`, with what this model can hold and asks for."""
    return encode(tokenizer, rows, positions(model.config), isinstance(model, ImplicitReward))


def encode(
    tokenizer: Any, rows: Sequence[Row | Item], limit: int | None, count_prompts: bool = False
) -> tuple[list[Text], list[str]]:
    """The texts of each row, chosen before rejected, and why rows are left out that the format or the model cannot hold.

    `count_prompts`: with the length of their prompts, which only a DPO policy's score asks for.
    """
    chat = format_of(tokenizer)
    texts: list[Text] = []
    unfit: list[str] = []
    for number, row in enumerate(rows):
        try:
            messages, sides = parts(row)
            encoded = [chat.encode_response(messages, side) for side in sides]
            longest = max(map(len, encoded))
            if limit is not None and longest > limit:
                raise UserError(f"{longest} tokens, and the model has {limit} positions", 3)
            prompt = len(chat.encode_prompt(messages)) if count_prompts else 0
            texts += [Text(number, ids, prompt) for ids in encoded]
        except UserError as error:
            unfit.append(f"{row.source}: {error.message}")
    return texts, unfit


def refuse_unfit(unfit: Sequence[str], any_left: bool, bad_rows: BadRows) -> None:
    if unfit and (bad_rows == "refuse" or not any_left):
        raise UserError(f"{unfit[0]} ({len(unfit)} such rows; fix them, or leave them out: --bad-rows skip)", 3)


def parts(row: Row | Item) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """The prompt of a row and its responses."""
    if isinstance(row, Item):
        return row.prompt, row.responses
    responses = (row.chosen, row.rejected) if isinstance(row, Preference) else (row.messages[-1].content,)
    return prompt_of(row), responses


def score_texts(
    scalar: Reward,
    pad_id: int,
    texts: Sequence[Text],
    batch_size: int,
    precision: str,
    advance: Callable[[int], object] = lambda count: None,
) -> list[float]:
    """The score of each text. The longest go first: little padding, and too large a batch fails at once."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i].ids))
    scores = [0.0] * len(texts)
    device = next(scalar.parameters()).device
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            tokens_BT, mask_BT = pad([texts[i].ids for i in part], pad_id)
            batch = [tokens_BT.to(device), mask_BT.to(device)]
            if isinstance(scalar, ImplicitReward):
                batch.append(torch.tensor([texts[i].prompt for i in part], device=device))
            scores_B = scalar.score(*batch)
            for i, value in zip(part, scores_B.tolist(), strict=True):
                scores[i] = value
            advance(len(part))
    return scores


def to_lines(rows: Sequence[Row], texts: Sequence[Text], scores: Sequence[float]) -> list[dict[str, Any]]:
    """A line per scored row, in the order of the file: `score`, or `chosen`, `rejected` and `margin`."""
    by_row: dict[int, list[float]] = {}
    for text, value in zip(texts, scores, strict=True):
        by_row.setdefault(text.row, []).append(value)
    lines = []
    for row, values in by_row.items():
        line: dict[str, Any] = {"row": row, "source": rows[row].source}
        if len(values) == 2:
            line |= {"chosen": values[0], "rejected": values[1], "margin": values[0] - values[1]}
        else:
            line |= {"score": values[0]}
        lines.append(line)
    return lines


def summary(lines: Sequence[dict[str, Any]], rows: Sequence[Row]) -> dict[str, Estimate]:
    """Means, clustered by prompt, and for pairs the share in which the chosen response wins; a tie counts half."""
    prompts = [tuple((m.role, m.content) for m in prompt_of(row)) for row in rows]
    names = [name for name in ("score", "chosen", "rejected", "margin") if name in lines[0]]
    found = {f"mean {name}": bootstrap_mean([line[name] for line in lines], prompts) for name in names}
    if "margin" in names:
        wins = [1.0 if line["margin"] > 0 else 0.5 * (line["margin"] == 0) for line in lines]
        found["accuracy"] = proportion(wins, prompts)
    return found


def table(metrics: dict[str, Estimate], rows: int, out: str) -> Table:
    shown = Table(title=f"{rows} rows, scores in {out}", title_justify="left")
    for column in ("", "value", "95 % interval"):
        shown.add_column(column, justify="right" if column else "left")
    for name, estimate in metrics.items():
        shown.add_row(name, f"{estimate.value:.3f}", f"{estimate.low:.3f} … {estimate.high:.3f}")
    return shown


def bar_columns() -> list[Any]:
    return [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
