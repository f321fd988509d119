"""Runs TRL's PPOTrainer on fixed weights and responses and records what it computes. Needs TRL 1.12 and nothing of
ours.

`PPOTrainer.train` is one method with all the mathematics. It runs unchanged; only its surroundings are fixed:

- `torch.multinomial` gives the fixed responses, so TRL's own generation computes their logits;
- between scoring and update policy and value model are given other weights, as if some minibatches had passed, so that
  ratios, clipping and approximate KL are not trivial;
- at each backward pass and at the log the local variables of `train` are copied, at the optimizer's step gradients.
"""

from __future__ import annotations

import copy
import json
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # pyright: ignore[reportMissingImports]

PAD, EOS, VOCAB, LENGTH = 0, 2, 16, 6
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "initializer_range": 0.4,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "num_labels": 1,
}
COMMON = {
    "temperature": 0.7,
    "kl_coef": 0.3,
    "missing_eos_penalty": 0.9,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
}
PROMPTS = [[1, 5, 9, 4, 11], [1, 7], [1, 3, 14], [1, 12, 6, 8], [1, 10, 10, 3, 15], [1, 4], [1, 13, 5], [1, 9, 8, 7]]
FULL = [  # six tokens each; the last two do not end themselves
    [5, 3, 8, 14, 9, EOS],
    [7, 7, 4, 10, 3, EOS],
    [12, 6, 15, 4, 11, EOS],
    [3, 9, 13, 5, 8, EOS],
    [8, 4, 4, 6, 10, EOS],
    [14, 11, 3, 12, 7, EOS],
    [10, 5, 6, 9, 15, 4],
    [6, 13, 8, 3, 12, 11],
]
RAGGED = [[*row[: n - 1], EOS] if n < LENGTH else row for row, n in zip(FULL, (1, 2, 3, 5, 6, 4, 6, 6), strict=True)]
CASES: dict[str, dict[str, Any]] = {
    "full": {"answers": FULL, "gamma": 0.9, "lam": 0.8},
    "ragged": {"answers": RAGGED, "gamma": 1.0, "lam": 1.0},
    "discounted": {"answers": RAGGED, "gamma": 0.9, "lam": 0.8},
    "two_micro_batches": {"answers": RAGGED, "gamma": 1.0, "lam": 1.0, "micro_batches": 2},
    "whitened_rewards": {"answers": RAGGED, "gamma": 1.0, "lam": 1.0, "whiten_rewards": True},
}
PER_ITERATION = (
    "query_responses",
    "contain_eos_token",
    "padding_mask",
    "padding_mask_p1",  # one slot longer
    "logprobs",
    "ref_logprobs",
    "values",
    "scores",
    "kl",
    "non_score_reward",
    "rewards",
    "advantages",
    "returns",
)
PER_MICRO_BATCH = ("micro_batch_inds", "new_logprobs", "vpred", "ratio", "pg_loss_max")


def make_models() -> dict[str, Any]:
    """The four models of PPO, and policy and value as they stand when the update begins."""
    made = {}
    for seed, (name, kind) in enumerate(
        {
            "policy": LlamaForCausalLM,
            "reference": LlamaForCausalLM,
            "value": LlamaForSequenceClassification,
            "reward": LlamaForSequenceClassification,
        }.items()
    ):
        torch.manual_seed(seed)
        made[name] = kind(LlamaConfig(**SHAPE)).float().eval()
    with torch.no_grad():
        made["value"].score.weight.mul_(0.3)
        for seed, (name, size) in enumerate({"policy": 0.02, "value": 0.04}.items()):
            torch.manual_seed(100 + seed)
            moved = copy.deepcopy(made[name])
            for parameter in moved.parameters():
                parameter.add_(size * torch.randn_like(parameter))
            made[f"{name}_moved"] = moved
    return made


def make_tokenizer() -> Any:
    vocabulary = {"<pad>": PAD, "<s>": 1, "</s>": EOS} | {f"t{i}": i for i in range(3, VOCAB)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def make_trainer(parts: dict[str, Any], settings: dict[str, Any], folder: str) -> PPOTrainer:
    micro_batches = settings.get("micro_batches", 1)
    config = PPOConfig(
        output_dir=folder,
        total_episodes=len(PROMPTS),
        num_ppo_epochs=1,
        per_device_train_batch_size=len(PROMPTS) // micro_batches,
        gradient_accumulation_steps=micro_batches,
        local_rollout_forward_batch_size=len(PROMPTS),
        response_length=LENGTH,
        stop_token="eos",
        gamma=settings["gamma"],
        gae_lambda=settings["lam"],
        whiten_rewards=settings.get("whiten_rewards", False),
        learning_rate=0.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **COMMON,
    )
    prompts = Dataset.from_dict({"input_ids": PROMPTS * 2})
    trainer = PPOTrainer(
        args=config,
        processing_class=make_tokenizer(),
        model=parts["policy"],
        ref_model=parts["reference"],
        reward_model=parts["reward"],
        value_model=parts["value"],
        train_dataset=prompts,
    )
    # Unshuffled, and one batch longer than needed: in the last one accelerate steps after every micro-batch.
    in_order = DataLoader(prompts, batch_size=len(PROMPTS), collate_fn=trainer.data_collator)  # type: ignore[arg-type]
    trainer.dataloader = trainer.accelerator.prepare(in_order)
    return trainer


@contextmanager
def loaded_dice(answers: list[list[int]]) -> Iterator[None]:
    """A `torch.multinomial` that draws as usual but returns the tokens of the fixed responses, which are equally
    long."""
    columns, fair = iter(torch.tensor(answers).T), torch.multinomial

    def multinomial(probs: torch.Tensor, num_samples: int) -> torch.Tensor:
        fair(probs, num_samples)
        return next(columns)[:, None].to(probs.device)

    torch.multinomial = multinomial
    try:
        yield
    finally:
        torch.multinomial = fair


class Recording:
    """Hooks around one `PPOTrainer.train`, and what they saw."""

    def __init__(self, trainer: PPOTrainer, answers: list[list[int]], parts: dict[str, Any]) -> None:
        self.trainer, self.answers, self.parts = trainer, answers, parts
        self.iteration: dict[str, Any] = {}
        self.micro_batches: list[dict[str, Any]] = []
        self.metrics: dict[str, Any] = {}
        self.gradients: dict[str, torch.Tensor] = {}
        self.originals = {name: getattr(ppo_trainer, name) for name in ("batch_generation", "masked_whiten")}
        self.backward, self.step, self.log = trainer.accelerator.backward, trainer.optimizer.step, trainer.log

    def run(self) -> None:
        ppo_trainer.batch_generation, ppo_trainer.masked_whiten = self.on_generation, self.on_whitening
        self.trainer.accelerator.backward = self.on_backward
        self.trainer.optimizer.step = self.on_step
        self.trainer.log = self.on_log
        np.random.seed(0)
        try:
            self.trainer.train()
        finally:
            for name, original in self.originals.items():
                setattr(ppo_trainer, name, original)

    def on_generation(self, model: Any, queries: torch.Tensor, *rest: Any) -> Any:
        """TRL's generation, with the fixed responses."""
        with loaded_dice([[*row, *[PAD] * (LENGTH - len(row))] for row in self.answers]):
            return self.originals["batch_generation"](model, queries, *rest)

    def on_whitening(self, values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
        whiten = self.originals["masked_whiten"]
        name = "advantages" if shift_mean else "rewards"
        self.iteration[f"{name}_before_whitening"] = values.clone()
        if shift_mean:  # the last thing before the update
            halves = zip(values.chunk(2), mask.chunk(2), strict=True)
            self.iteration["advantages_of_two_ranks"] = torch.cat([whiten(*half) for half in halves])
            for part in ("policy", "value"):
                self.parts[part].load_state_dict(self.parts[f"{part}_moved"].state_dict())
        return whiten(values, mask, shift_mean)

    def on_backward(self, loss: torch.Tensor) -> None:
        seen = sys._getframe(1).f_locals
        self.iteration |= {name: seen[name].clone() for name in PER_ITERATION}
        self.iteration["context_length"] = seen["context_length"]
        self.micro_batches.append({name: _copy(seen[name]) for name in PER_MICRO_BATCH})
        self.backward(loss)

    def on_step(self) -> None:
        if self.trainer.accelerator.sync_gradients:
            for name in ("policy", "value"):
                for parameter_name, parameter in self.parts[name].named_parameters():
                    self.gradients[f"{name}/{parameter_name}"] = parameter.grad.clone()
        self.step()

    def on_log(self, metrics: dict[str, float]) -> None:
        seen = sys._getframe(1).f_locals
        stats = {name: value.flatten().tolist() for name, value in seen.items() if name.endswith("_stats")}
        self.metrics = stats | {name: value for name, value in metrics.items() if name.startswith("objective/")}


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else torch.as_tensor(value)


def readable(value: Any) -> Any:
    """Plain lists; nine digits bring every float32 back exactly."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return readable(value.tolist())
    if isinstance(value, dict):
        return {key: readable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [readable(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def one_line_per_row(text: str) -> str:
    """Innermost lists on one line, so that a difference between two files can be read."""
    return re.sub(r"\[[^\[\]{}]*\]", lambda match: " ".join(match[0].split()), text)


def main(out: Path) -> None:
    torch.use_deterministic_algorithms(True)
    cases, tensors = {}, {}
    for name, settings in CASES.items():
        parts = make_models()
        weights = {f"weights/{m}/{p}": t.clone() for m, model in parts.items() for p, t in model.named_parameters()}
        with tempfile.TemporaryDirectory() as folder:
            recording = Recording(make_trainer(parts, settings, folder), settings["answers"], parts)
            recording.run()
        cases[name] = {
            "settings": {key: value for key, value in settings.items() if key != "answers"},
            "iteration": recording.iteration,
            "micro_batches": recording.micro_batches,
            "figures": recording.metrics,
        }
        tensors |= weights | {f"gradients/{name}/{key}": value for key, value in recording.gradients.items()}
    packages = ("trl", "torch", "transformers", "accelerate", "datasets")
    made_with = {"python": platform.python_version()} | {package: version(package) for package in packages}
    record = {"made_with": made_with, "shape": SHAPE, "settings": COMMON, "eos": EOS, "pad": PAD, "cases": cases}
    text = json.dumps(readable(record), indent=1)
    out.with_suffix(".json").write_text(one_line_per_row(text) + "\n")
    save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, out.with_suffix(".safetensors"))
    for suffix in (".json", ".safetensors"):
        print(f"{out.with_suffix(suffix)}: {out.with_suffix(suffix).stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
