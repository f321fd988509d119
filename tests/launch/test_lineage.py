"""`rlhf lineage`: what a model was made from, and what of that is missing or changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import yaml

from launch import cli
from rlhf.config import TrackingConfig
from rlhf.runs import artifacts
from rlhf.tracking import open_tracker

ROWS = {
    "demonstrations": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "prompts": {"messages": [{"role": "user", "content": "c"}]},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two stages without weights: its folder."""
    data = {}
    for role, row in ROWS.items():
        for part in ("train", "held_out"):
            (tmp_path / f"{role}.{part}.jsonl").write_text(json.dumps(row) + "\n")
        data[role] = {part: [{"path": f"{role}.{part}.jsonl"}] for part in ("train", "held_out")}
    settings = {"model": {"path": str(tmp_path / "base")}, "data": {"root": str(tmp_path), **data}}
    (tmp_path / "base").mkdir()
    sft = stage(tmp_path / "run/sft", "sft", sources(tmp_path, "demonstrations"), settings)
    stage(tmp_path / "run/ppo", "ppo", {"sft": sft.digest, **sources(tmp_path, "prompts")}, settings)
    return tmp_path / "run"


def sources(folder: Path, role: str) -> dict[str, str]:
    files = [f"{role}.{part}.jsonl" for part in ("train", "held_out")]
    return {f"{role}: {file}": hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in files}


def stage(folder: Path, kind: str, parents: dict[str, str], settings: dict) -> artifacts.Artifact:
    (folder / "artifact").mkdir(parents=True)
    (folder / "artifact/model.safetensors").write_bytes(kind.encode())
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "made_by.json").write_text(json.dumps({"from": artifacts.digest_of([f"{kind} settings", parents])}))
    return artifacts.complete(folder / "artifact", kind, parents, f"{kind} settings", {})


def lineage(capsys: pytest.CaptureFixture, model: Path | str, uri: str = "sqlite:///none.db") -> tuple[int, str]:
    code = cli.main(["lineage", str(model), "--tracking-uri", uri])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("folder", ["ppo", "ppo/artifact"])
def test_the_tree_goes_back_to_the_data(run: Path, capsys: pytest.CaptureFixture, folder: str) -> None:
    code, shown = lineage(capsys, run / folder)
    digests = {
        kind: json.loads((run / kind / "artifact/manifest.json").read_text())["digest"][:12] for kind in ("sft", "ppo")
    }
    data = {name: digest[:12] for role in ROWS for name, digest in sources(run.parent, role).items()}
    revision = artifacts.code_revision()
    assert code == 0
    assert shown.splitlines() == [
        f"ppo {digests['ppo']}",
        f"│   in {run}/ppo/artifact",
        f"│   revision {revision}",
        f"│   settings ppo settings {run}/ppo/config.yaml",
        f"├── sft {digests['sft']}",
        f"│   │   in {run}/sft/artifact",
        f"│   │   revision {revision}",
        f"│   │   settings sft settings {run}/sft/config.yaml",
        f"│   ├── demonstrations: demonstrations.train.jsonl {data['demonstrations: demonstrations.train.jsonl']}",
        f"│   ├── demonstrations: demonstrations.held_out.jsonl {data['demonstrations: demonstrations.held_out.jsonl']}",
        f"│   └── model: {run.parent}/base",
        f"├── prompts: prompts.train.jsonl {data['prompts: prompts.train.jsonl']}",
        f"└── prompts: prompts.held_out.jsonl {data['prompts: prompts.held_out.jsonl']}",
        "Everything is there and as it was.",
    ]


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda run: (run / "sft/artifact/manifest.json").unlink(), "sft: missing"),
        (lambda run: (run / "ppo/artifact/model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda run: (run / "sft/artifact/model.safetensors").write_bytes(b"sfx"), "other content than when"),
        (lambda run: (run.parent / "prompts.train.jsonl").unlink(), "prompts: prompts.train.jsonl: missing"),
        (lambda run: (run.parent / "base").rmdir(), "base does not exist"),
        (
            lambda run: (run.parent / "prompts.train.jsonl").write_text(json.dumps(ROWS["prompts"]) + "\n\n"),
            "prompts: prompts.train.jsonl: changed",
        ),
    ],
)
def test_what_is_missing_or_changed_is_said(run: Path, capsys: pytest.CaptureFixture, damage, fault: str) -> None:
    damage(run)
    code, shown = lineage(capsys, run / "ppo")
    assert fault in shown and code == 4


def test_a_parent_that_was_made_anew_is_not_the_parent(run: Path, capsys: pytest.CaptureFixture) -> None:
    artifacts.begin(run / "sft/artifact")
    (run / "sft/artifact/model.safetensors").write_bytes(b"new")
    new = artifacts.complete(run / "sft/artifact", "sft", {}, "", {})
    code, shown = lineage(capsys, run / "ppo")
    assert code == 4 and f"now holds {new.digest[:12]}" in shown


def test_settings_of_a_later_attempt_are_not_taken_for_those_of_the_artifact(
    run: Path, capsys: pytest.CaptureFixture
) -> None:
    (run / "ppo/made_by.json").write_text(json.dumps({"from": "another attempt"}))
    assert "settings ppo settings not the ones beside it" in lineage(capsys, run / "ppo")[1]


def test_a_version_whose_folders_are_gone_is_told_from_the_registry(
    run: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for kind, inputs in (("sft", ()), ("ppo", ("sft",))):
        artifact = artifacts.load(run / kind / "artifact")
        tracker = open_tracker(run / kind, TrackingConfig(uri=uri), kind, None, is_writer=True)
        data = {f"data.{name}": digest for name, digest in artifact.parents.items() if name not in inputs}
        registered = {
            "name": f"rlhf-{kind}",
            "description": "",
            "inputs": {name: artifact.parents[name] for name in inputs},
            "tags": {"artifact.kind": kind, **data},
        }
        tracker.model(
            {"name": kind, "kind": "policy", "path": str(artifact.path), "digest": artifact.digest, "metrics": {}}
            | {"step": 0, "dataset": {"name": "d", "digest": "0"}, "registered": registered}
        )
        tracker.close()
    assert lineage(capsys, "models:/rlhf-ppo@candidate", uri)[0] == 0
    (run / "ppo/artifact/manifest.json").unlink()
    code, shown = lineage(capsys, "models:/rlhf-ppo/1", uri)
    assert code == 4 and "├── sft" in shown.replace("└──", "├──") and "demonstrations: demonstrations.train" in shown
    assert f"ppo: missing: {run}/ppo/artifact" in shown


def test_a_folder_without_an_artifact_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["lineage", str(tmp_path)]) == 4
    assert "no complete artifact" in capsys.readouterr().err
