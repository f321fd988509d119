from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from launch import settings
from launch.settings import dump, load
from rlhf.config import RunConfig
from rlhf.errors import UserError

ROWS = "{demonstrations: {train: []}, preferences: {train: []}, prompts: {train: []}}"
RUN = f"""\
name: mine
model: mini
hardware: laptop
stages: [fast]
data: {ROWS}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with layers of its own and room for run files."""
    files = {
        "configs/model/mini.yaml": "path: my/model\n",
        "configs/stage/fast.yaml": "sft: {batch_size: 8, optim: {lr: 1e-3}}\nppo: {iterations: 3}\n",
        "configs/stage/faster.yaml": "ppo: {iterations: 2}\n",
        "configs/run/mine.yaml": RUN,
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_run(project: Path, text: str) -> str:
    (project / "configs/run/mine.yaml").write_text(text)
    return "configs/run/mine.yaml"


def mistakes(runfile: str, overrides: list[str]) -> list[str]:
    """The lines of the message, without its headline."""
    with pytest.raises(UserError) as caught:
        load(runfile, overrides)
    assert caught.value.exit_code == 2
    headline, *lines = caught.value.message.splitlines()
    assert headline.startswith(str(len(lines)))
    return [line.strip() for line in lines]


def only_mistake(runfile: str, overrides: list[str]) -> str:
    (line,) = mistakes(runfile, overrides)
    return line


# --- layers


def test_layers_come_from_beside_the_run_file_and_else_from_the_package(project: Path) -> None:
    config = load("configs/run/mine.yaml", [])
    assert config.model.path == "my/model"  # the project's own
    assert config.hardware.workers == 2  # the packaged laptop


def test_a_stage_layer_keeps_the_defaults_that_it_does_not_name(project: Path) -> None:
    optim = load("configs/run/mine.yaml", []).sft.optim
    assert (optim.lr, optim.eps, optim.schedule) == (1e-3, 1e-8, "cosine")


def test_the_run_file_goes_over_its_layers_and_the_command_line_over_all(project: Path) -> None:
    run = write_run(project, RUN + "sft: {epochs: 3, optim: {lr: 2e-3}}\n")
    assert load(run, []).sft.optim.lr == 2e-3
    assert load(run, []).sft.batch_size == 8
    assert load(run, ["--sft.optim.lr", "3e-3"]).sft.optim.lr == 3e-3


def test_a_later_stage_layer_goes_over_an_earlier_one(project: Path) -> None:
    config = load(write_run(project, RUN.replace("[fast]", "[fast, faster]")), [])
    assert (config.sft.batch_size, config.ppo.iterations) == (8, 2)


def test_a_section_may_build_on_a_layer(project: Path) -> None:
    config = load(write_run(project, RUN.replace("laptop", "{base: laptop, precision: bf16}")), [])
    assert (config.hardware.workers, config.hardware.precision) == (2, "bf16")


def test_a_section_may_do_without_a_layer(project: Path) -> None:
    config = load(write_run(project, RUN.replace("laptop", "{workers: 4}").replace("mini", "{path: x}")), [])
    assert (config.hardware.workers, config.hardware.cpus_per_worker, config.model.path) == (4, 1, "x")


def test_listed_reward_models_replace_those_below(project: Path) -> None:
    models = "reward: {models: {all: {own_tag: safety}}}\nppo: {helpfulness_model: all, safety_model: all}\n"
    assert list(load(write_run(project, RUN + models), []).reward.models) == ["all"]


def test_the_command_line_changes_one_reward_model_and_keeps_the_other(project: Path) -> None:
    models = load("configs/run/mine.yaml", ["--reward.models.safety.other_fraction", "0.2"]).reward.models
    assert (models["safety"].other_fraction, models["safety"].own_tag) == (0.2, "safety")
    assert models["helpfulness"].other_fraction == 0.5


def test_a_packaged_run_is_found_by_its_bare_name_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load("quickstart", []).name == "quickstart"


def test_a_run_file_that_is_not_there_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no run file 'quikstart' \(did you mean quickstart\?\)") as caught:
        load("quikstart", [])
    assert caught.value.exit_code == 2


def test_what_is_printed_is_a_run_file_with_the_same_meaning(project: Path) -> None:
    config = load("configs/run/mine.yaml", ["--ppo.optim.lr", "1e-6", "--tracking.uri", "null"])
    (project / "printed.yaml").write_text(dump(config))
    assert load("printed.yaml", []) == config


# --- command line


@pytest.mark.parametrize("override", [["--ppo.optim.lr", "1e-7"], ["--ppo.optim.lr=1e-7"]])
def test_an_override_has_two_spellings(project: Path, override: list[str]) -> None:
    assert load("configs/run/mine.yaml", override).ppo.optim.lr == 1e-7


def test_overrides_are_yaml(project: Path) -> None:
    config = load(
        "configs/run/mine.yaml",
        ["--sft.packing", "false", "--tracking.uri", "null", "--data.root", "some/where", "--name", "2024"]
        + ["--data.prompts.train", "[{path: a.jsonl, limit: 3}]", "--model.lora", "{rank: 4}", "--seed=-1"],
    )
    assert (config.sft.packing, config.tracking.uri, config.name, config.seed) == (False, None, "2024", -1)
    assert config.data.root == Path("some/where")
    assert config.data.prompts is not None
    assert [(s.path, s.limit) for s in config.data.prompts.train] == [("a.jsonl", 3)]
    assert config.model.lora is not None
    assert (config.model.lora.rank, config.model.lora.targets) == (4, "all-linear")


def test_an_override_reaches_into_a_list(project: Path) -> None:
    run = write_run(project, RUN.replace("prompts: {train: []}", "prompts: {train: [{path: a}, {path: b}]}"))
    prompts = load(run, ["--data.prompts.train.1.path", "c"]).data.prompts
    assert prompts is not None and [s.path for s in prompts.train] == ["a", "c"]


def test_a_layer_is_changed_on_the_command_line_and_settings_still_go_over_it(project: Path) -> None:
    hardware = load("configs/run/mine.yaml", ["--hardware.precision", "float32", "--hardware", "gpu-8"]).hardware
    assert (hardware.workers, hardware.gpus_per_worker, hardware.precision) == (8, 1, "float32")


def test_the_last_override_wins(project: Path) -> None:
    assert load("configs/run/mine.yaml", ["--seed", "1", "--seed", "2"]).seed == 2


# --- mistakes


def test_every_mistake_of_every_layer_is_reported_at_once(project: Path) -> None:
    (project / "configs/model/mini.yaml").write_text("pth: my/model\n")
    (project / "configs/stage/fast.yaml").write_text("sft: {batch_size: many}\n\nppo:\n  optim: {lr: -1}\n")
    run = write_run(project, RUN + "reward:\n  margn: small\n  batch_size: 9\n  batch_size: 10\n")
    twice = (
        "configs/run/mine.yaml:9: reward.batch_size: is given twice; first at configs/run/mine.yaml:8; "
        "is 10, which is not a multiple of 4 workers (hardware.workers_per_reward_model)"
    )
    assert mistakes(run, ["--ppo.optm.lr", "1e-6", "--seed", "x", "--hardware.workers_per_reward_model", "4"]) == [
        "configs/model/mini.yaml:1: model.pth: unknown setting (did you mean model.path?)",
        "configs/run/mine.yaml:7: reward.margn: unknown setting (did you mean reward.margin?)",
        twice,
        "configs/stage/fast.yaml:1: sft.batch_size: is 'many', should be a valid integer",
        "configs/stage/fast.yaml:4: ppo.optim.lr: is -1, should be greater than or equal to 0",
        "command line: seed: is 'x', should be a valid integer",
        "command line: ppo.optm: unknown setting (did you mean ppo.optim?)",
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (["--ppo.beta", "0.1"], "ppo.beta: unknown setting (renamed to ppo.kl_coef)"),
        (["--sft.optim.warmup_share", "0"], "unknown setting (renamed to sft.optim.warmup_ratio)"),
        (["--ppo.lr", "1"], "ppo.lr: unknown setting (did you mean ppo.optim.lr?)"),
        (["--batchsize", "1"], "batchsize: unknown setting (did you mean"),
        (["--data.prompts.heldout", "[]"], "unknown setting (did you mean data.prompts.held_out?)"),
        (["--reward.models.safety.own_tg", "x"], "unknown setting (did you mean reward.models.safety.own_tag?)"),
        (["--model.lora", "{rnk: 1}"], "model.lora.rnk: unknown setting (did you mean model.lora.rank?)"),
        (["--stagse", "[fast]"], "stagse: unknown setting (did you mean stages?)"),
        (["--hardware.precision", "bf17"], "is 'bf17', should be 'float32' or 'bf16' (did you mean bf16?)"),
        (["--ppo.iterations", "true"], "command line: ppo.iterations: is True, should be a number"),
        (["--ppo.kl_coef", "false"], "ppo.kl_coef: is False, should be a number"),
        (["--hardware.zero_stage", "true"], "hardware.zero_stage: is True, should be a number"),
        (["--hardware.min_workers", "true"], "hardware.min_workers: is True, should be a number"),
        (["--ppo.gamma", "1.5"], "ppo.gamma: is 1.5, should be less than or equal to 1"),
        (["--ppo.clip_range", ".inf"], "ppo.clip_range: is inf, should be a finite number"),
        (["--model", "null"], "model: should be the name of a layer, or a mapping"),
        (["--model", "tinny"], "there is no model layer 'tinny' (did you mean tiny?)"),
        (["--hardware", "labtop"], "there is no hardware layer 'labtop' (did you mean laptop?)"),
        (["--stages", "[fst]"], "there is no stage layer 'fst' (did you mean fast?)"),
        (["--name", "a/b"], "name: is 'a/b', should match pattern"),
        (["--name", ".."], "name: is '..', should match pattern"),
        (["--seed"], "seed: has no value; write --seed VALUE"),
        (["--frsh", "--seed", "1"], "frsh: has no value; write --frsh VALUE; unknown setting"),
        (["stray"], "stray: is neither an option nor a setting"),
        (["--model.path", "[a"], "model.path: is not valid YAML"),
        (["--ppo.safety_model", "harm"], "ppo.safety_model: is 'harm', but reward.models has helpfulness, safety"),
        (["--pipeline", "[sft, reward, pppo]"], "pipeline.2: is 'pppo', which is no stage (did you mean ppo?)"),
        (
            ["--pipeline", "[sft, distill]"],
            "pipeline.1: is 'distill', which is no stage (there are sft, reward, dpo, ppo)",
        ),
        (["--pipeline", "[reward, sft]"], "pipeline.0: is reward, which starts from sft; move sft before it"),
        (["--pipeline", "[sft, ppo]"], "pipeline.1: is ppo, which starts from reward; add reward before it"),
        (["--pipeline", "[sft, reward, sft]"], "pipeline.2: is sft, which is in the pipeline already; leave it out"),
        (["--pipeline", "[]"], "pipeline: List should have at least 1 item"),
        (["--data.prompts", "null"], "data.prompts: is missing; ppo reads it"),
        (["--ppo.batch_size", "100"], "ppo.batch_size: is 100, not a multiple of minibatch_size 64"),
        (
            ["--ppo.group_size", "3"],
            "ppo.group_size: is 3, which does not divide the 32 rows that a wor",
        ),
        (
            ["--model.attention", "flash_attention_2", "--ppo", "{packing: true, group_size: 2}"],
            "model.attention: is flash_attention_2, which takes no mask",
        ),
    ],
)
def test_a_mistake_is_named(project: Path, override: list[str], expected: str) -> None:
    line = only_mistake("configs/run/mine.yaml", override)
    assert line.startswith("command line: ")
    assert expected in line


def test_a_value_that_fits_no_member_of_a_union_is_one_mistake(project: Path) -> None:
    assert only_mistake("configs/run/mine.yaml", ["--model.lora", "{targets: {a: 1}}"]).startswith(
        "command line: model.lora.targets: should be a valid string; should be a valid list"
    )


def test_missing_settings_do_not_hide_misfits(project: Path) -> None:
    run = write_run(project, "hardware: {workers: 3}\n")
    found = mistakes(run, [])
    assert "configs/run/mine.yaml:1: name: is missing" in found
    assert "configs/run/mine.yaml:1: data: is missing" in found
    assert any("sft.batch_size: is 64, which is not a multiple of 3 workers" in line for line in found)


def test_mistakes_in_the_pipeline_are_told_with_the_others_and_with_their_line(project: Path) -> None:
    run = write_run(project, RUN + "pipeline:\n  - sft\n  - pp0\n  - ppo\nppo: {batch_size: 100}\n")
    assert mistakes(run, ["--sft.batch_size", "3"]) == [
        "configs/run/mine.yaml:8: pipeline.1: is 'pp0', which is no stage (did you mean ppo?)",
        "configs/run/mine.yaml:9: pipeline.2: is ppo, which starts from reward; add reward before it",
        "configs/run/mine.yaml:10: ppo.batch_size: is 100, not a multiple of minibatch_size 64",
        "command line: sft.batch_size: is 3, which is not a multiple of 2 workers (hardware.workers)",
    ]


def test_what_the_pipeline_leaves_out_is_not_asked_for(project: Path) -> None:
    """Neither its data, nor that its settings fit."""
    run = write_run(project, "name: a\npipeline: [sft]\ndata: {demonstrations: {train: []}}\n")
    config = load(run, ["--hardware.workers", "64", "--reward.batch_size", "3", "--ppo.safety_model", "none"])
    assert (config.pipeline, config.data.prompts, config.reward.batch_size) == (["sft"], None, 3)


def test_a_misfit_that_another_mistake_explains_is_left_out(project: Path) -> None:
    assert mistakes(
        "configs/run/mine.yaml", ["--hardware", "{workers: 3, precison: bf16}", "--sft.batch_size", "x"]
    ) == [
        "default: reward.batch_size: is 512, which is not a multiple of 3 workers (hardware.workers)",
        "default: ppo.minibatch_size: is 64, which is not a multiple of 3 workers (hardware.workers)",
        "command line: hardware.precison: unknown setting (did you mean hardware.precision?)",
        "command line: sft.batch_size: is 'x', should be a valid integer",
    ]


def test_a_dotted_key_in_a_file_is_explained(project: Path) -> None:
    run = write_run(project, RUN + "ppo.kl_coef: 0.1\n")
    assert "sections are written nested" in only_mistake(run, [])


@pytest.mark.parametrize("content", [b"name: [", b"\x00\x01\xff", b"- a\n- b\n", b""])
def test_a_broken_run_file_is_a_message(project: Path, content: bytes) -> None:
    (project / "broken.yaml").write_bytes(content)
    assert any(line.startswith("broken.yaml") for line in mistakes("broken.yaml", []))


# --- micro-batches


@pytest.mark.parametrize(("workers", "micro"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_micro_batches_shrink_to_divide_the_share_of_a_worker(project: Path, workers: int, micro: int) -> None:
    config = load("configs/run/mine.yaml", ["--hardware.workers", str(workers), "--sft.micro_batch_size", "16"])
    assert config.sft.micro_batch_size == micro  # of a batch of 8


def test_a_micro_batch_that_fits_is_kept(project: Path) -> None:
    config = load("configs/run/mine.yaml", ["--sft.batch_size", "48", "--sft.micro_batch_size", "6"])
    assert config.sft.micro_batch_size == 6  # of 24 on each of two workers


def test_a_micro_batch_that_does_not_divide_becomes_the_next_smaller_that_does(project: Path) -> None:
    config = load("configs/run/mine.yaml", ["--sft.batch_size", "36", "--sft.micro_batch_size", "8"])
    assert config.sft.micro_batch_size == 6  # of 18 on each of two workers


def test_printed_settings_are_plain_yaml(project: Path) -> None:
    printed = yaml.safe_load(dump(load("configs/run/mine.yaml", [])))
    assert printed["sft"]["optim"]["lr"] == 0.001


def test_every_renamed_setting_has_its_new_name_and_not_its_old_one() -> None:
    places = {tuple(name.rpartition(".")[::2]) for name in settings._all_names(RunConfig)}
    names = {name for _, name in places}
    assert set(settings.RENAMED.values()) - {"other_fraction"} <= names  # that one stands under names of one's own
    for old, new in settings.RENAMED.items():
        assert not {section for section, name in places if name == old} & {s for s, name in places if name == new}
