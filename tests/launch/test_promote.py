"""`rlhf promote`: a policy becomes the champion only if it is better, and a bad one is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from launch import cli
from launch.logged_model import describe
from launch.promote.plan import held_out, plan, rewards_of
from launch.settings import load
from reward_data import Message, Prompt
from rlhf.chat import format_of
from rlhf.config import RunConfig, TinyConfig, public
from rlhf.data import Split, parsed
from rlhf.errors import UserError
from rlhf.models import save_causal
from rlhf.models.tiny import train_tokenizer, untrained_llama
from rlhf.runs import artifacts
from rlhf.tracking import fill_in, open_tracker

SMOKE = Path(__file__).parents[1] / "smoke.yaml"
TEXTS = ["what is it? good answer", "say good. good answer", "answer the question. good"] * 20
REWARDS = """
def useful(responses):
    return [float(any(letter.isalpha() for letter in text)) for text in responses]

def safety(responses):
    return [0.0 for _ in responses]
"""
SETTINGS = {
    "data.gold": "none",
    "ppo.sampling.max_new_tokens": "24",
    "ppo.eval_prompts": "8",
    "ppo.minibatch_size": "8",
}
# Probabilities of the words of a response, whatever came before: "good", a space, the end.
POLICIES = {"bad": (0.02, 0.93, 0.05), "plain": (0.3, 0.2, 0.5), "better": (0.6, 0.05, 0.35)}


def prompts(count: int = 72) -> list[Prompt]:
    return [
        Prompt((Message("user", f"question {n}"),), ("helpful", "safety")[n % 3 == 0], f"p.jsonl:{n}")
        for n in range(count)
    ]


def save_policy(folder: Path, probabilities: tuple[float, ...]) -> None:
    """A Llama whose next token depends on nothing: its hidden state is the same everywhere."""
    tokenizer = train_tokenizer(TEXTS, 300)
    model: Any = untrained_llama(TinyConfig(hidden_size=32, intermediate_size=64, layers=1, heads=2), tokenizer, 0)
    words = [tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in ("good", " ")]
    logits_V = torch.full((len(tokenizer),), -1e4)
    logits_V[[*words, *format_of(tokenizer).stop_ids[:1]]] = torch.tensor(probabilities).log()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.copy_(logits_V[:, None].expand(-1, 32) / 32)
    save_causal(model, folder, tokenizer)


def config_of(folder: Path, name: str) -> RunConfig:
    rewards = {f"ppo.rewards.{one}.function": f"{folder}/mine.py:{one}" for one in ("useful", "safety")}
    values = {"name": name, "runs_dir": str(folder / "runs"), "tracking.uri": f"sqlite:///{folder}/mlflow.db"}
    return load(SMOKE, [word for key, value in (SETTINGS | rewards | values).items() for word in (f"--{key}", value)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs with a policy each, registered in the order of POLICIES."""
    root = tmp_path_factory.mktemp("promote")
    (root / "mine.py").write_text(REWARDS)
    for name, probabilities in POLICIES.items():
        config = config_of(root, name)
        stage = config.folder / "ppo"
        parsed.write(config, {"prompts": Split([], prompts(), {}, [])})
        save_policy(artifacts.begin(stage / "artifact"), probabilities)
        (stage / "config.yaml").write_text(yaml.safe_dump(public(config), sort_keys=False))
        artifact = artifacts.complete(stage / "artifact", "ppo", {"sft": "d"}, "settings", {})
        tracker = open_tracker(stage, config.tracking, "ppo", None, is_writer=True)
        tracker.model(describe(config, artifact))
        tracker.close()
        assert fill_in(stage, config.tracking)
    return root


@pytest.fixture
def promote(folder: Path, capfd: pytest.CaptureFixture):
    def call(*arguments: object) -> tuple[int, str]:
        code = cli.main(["promote", *map(str, arguments), "--tracking-uri", f"sqlite:///{folder}/mlflow.db"])
        return code, "".join(capfd.readouterr())

    return call


def client_of(folder: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{folder}/mlflow.db")


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_a_bad_policy_is_refused_and_a_better_one_promoted_until_it_is_taken_back(folder: Path, promote) -> None:
    runs, client = folder / "runs", client_of(folder)

    def champion() -> str | None:
        version = client.get_registered_model("rlhf-policy").aliases.get("champion")
        return version and client.get_model_version("rlhf-policy", version).tags["run"]

    code, shown = promote(runs / "plain/ppo", "--to", "champion")
    assert code == 0 and "none before" in shown and champion() == "plain"

    code, shown = promote(runs / "bad/ppo")
    assert code == 7 and "Not promoted: reward useful, guard length" in shown and champion() == "plain"
    tags = client.get_model_version("rlhf-policy", "1").tags
    assert tags["gate.verdict"] == "refused: reward useful, guard length"
    assert tags["gate.against"] == "models:/rlhf-policy/2"
    gate = json.loads((runs / "bad/ppo/promotion/gate.json").read_text())
    reward = gate["checks"]["reward useful"]["value"]
    assert tags["gate.reward useful"].startswith(f"{reward['value']:+.3g} [") and reward["high"] < 0
    report = json.loads((runs / "bad/ppo/promotion/report.json").read_text())
    means = [report["models"][one]["rewards"]["useful"]["value"] for one in ("candidate", "champion")]
    assert reward["value"] == pytest.approx(means[0] - means[1])
    assert report["prompts"] == 64  # of 72, 8 chose the iteration

    code, shown = promote("models:/rlhf-policy@candidate")
    assert code == 0 and champion() == "better"
    assert promote("models:/rlhf-policy/3")[1].strip().endswith("is the champion already.")
    code, shown = promote("--undo")
    assert code == 0 and "models:/rlhf-policy/2 is the champion again" in shown and champion() == "plain"
    assert promote("--undo", "models:/rlhf-policy")[0] == 0 and champion() is None
    assert promote("--undo")[0] == 4


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_what_cannot_be_compared_is_an_error(folder: Path, promote, tmp_path: Path) -> None:
    code, shown = promote(folder / "runs/none")
    assert code == 4 and "no complete artifact" in shown
    assert promote()[0] == 2
    (tmp_path / "model.safetensors").write_bytes(b"other")
    artifacts.complete(tmp_path, "ppo", {}, "", {})
    code, shown = promote(tmp_path)
    assert code == 4 and "no version" in shown


def test_prompts_that_chose_the_policy_do_not_judge_it(tmp_path: Path) -> None:
    config = config_of(tmp_path, "one")
    (tmp_path / "mine.py").write_text(REWARDS)
    parsed.write(config, {"prompts": Split([], prompts(20), {}, [])})
    assert len(held_out(config)) == 12
    (config.folder / "ppo").mkdir()
    (config.folder / "ppo/config.yaml").write_text(yaml.safe_dump(public(config), sort_keys=False))
    planned = plan(config.folder / "ppo/artifact", "ppo", None, None)
    assert planned.reward == "useful" and list(planned.rewards) == ["useful", "safety"]
    assert planned.settings.max_new_tokens == 24
    assert plan(config.folder / "ppo/artifact", "ppo", None, "mine=m:f").reward == "mine"
    with pytest.raises(UserError, match="useful, safety"):
        plan(config.folder / "ppo/artifact", "ppo", None, "none")


def test_safety_is_a_guard_and_not_the_reward_that_must_rise(tmp_path: Path) -> None:
    config = load(SMOKE, ["--runs_dir", str(tmp_path), "--data.gold", "none", "--ppo.helpfulness_model", "safety"])
    both = config.model_copy(update={"ppo": config.ppo.model_copy(update={"safety_model": "helpfulness"})})
    (both.folder / "ppo").mkdir(parents=True)
    (both.folder / "ppo/config.yaml").write_text(yaml.safe_dump(public(both), sort_keys=False))
    parsed.write(both, {"prompts": Split([], prompts(20), {}, [])})
    planned = plan(both.folder / "ppo/artifact", "ppo", None, None)
    assert list(planned.rewards) == ["safety", "helpfulness"] and planned.reward == "helpfulness"


def test_gold_comes_first_and_reward_models_are_those_of_the_run(tmp_path: Path) -> None:
    config = load(SMOKE, ["--runs_dir", str(tmp_path)])
    models = {name: str(tmp_path / f"smoke/reward/{name}/artifact") for name in ("helpfulness", "safety")}
    assert rewards_of(config) == {"gold": "reward_data.gold:gold", **models}
    assert next(iter(rewards_of(config))) == "gold"
