"""What stages record arrives in MLflow."""

import json
import math
from pathlib import Path

import pytest

from rlhf.tracking import base as tracker_module
from rlhf.tracking import open_tracker
from tests.rlhf.tracking.recorded import file_of_run, finished


def test_two_processes_can_create_one_store_without_a_word(first_use):
    assert first_use[1] == ["", ""]


def test_their_runs_are_in_that_store(store, store_client):
    runs = store_client.search_runs([store_client.get_experiment_by_name("tests").experiment_id])
    first = [run for run in runs if run.info.run_name == "first"]
    assert [(run.info.status, run.data.metrics) for run in first] == [("FINISHED", {"loss": 1.0})] * 2


def test_files_of_a_sqlite_store_lie_beside_it(store, store_client):
    location = store_client.get_experiment_by_name("tests").artifact_location
    assert location == (Path(store.uri.removeprefix("sqlite:///")).parent / "mlruns").as_uri()


def test_metrics_arrive_with_their_steps(tmp_path, store, store_client):
    tracker = open_tracker(tmp_path, store, "stage", None, is_writer=True)
    for step in range(130):  # more than one call to MLflow
        tracker.metrics({"sft/loss": 1 / (step + 1)}, step)
    tracker.close()
    history = store_client.get_metric_history(tracker.run_id, "sft/loss")
    assert [(point.step, point.value) for point in history] == [(step, 1 / (step + 1)) for step in range(130)]


def test_a_line_of_more_metrics_than_one_call_takes_arrives(tmp_path, store, store_client):
    run_id = finished(tmp_path, store, metrics=({f"m{number}": number for number in range(1100)}, 1))
    assert len(store_client.get_run(run_id).data.metrics) == 1100


def test_a_metric_that_is_not_finite_arrives_as_nan(tmp_path, store, store_client):
    run_id = finished(tmp_path, store, metrics=({"sft/loss": math.inf}, 1))
    assert math.isnan(store_client.get_run(run_id).data.metrics["sft/loss"])


def test_a_metric_name_that_mlflow_forbids_is_rewritten(tmp_path, store, store_client):
    run_id = finished(tmp_path, store, metrics=({"eval/größe?": 2.0}, 1))
    assert store_client.get_run(run_id).data.metrics == {"eval/gr__e_": 2.0}


def test_params_are_flat_and_cut_to_the_limit(tmp_path, store, store_client):
    many = {f"key{number}": number for number in range(250)}
    run_id = finished(tmp_path, store, params=({"ppo": {"optim": {"lr": 1e-6}}, "long": "x" * 7000, **many},))
    params = store_client.get_run(run_id).data.params
    assert params["ppo.optim.lr"] == "1e-06"
    assert params["long"] == "x" * 6000
    assert len(params) == 252


def test_a_changed_param_of_a_resumed_run_keeps_its_value_and_the_rest_arrives(tmp_path, store, store_client):
    first = finished(tmp_path, store, params=({"lr": 1},))
    second = finished(tmp_path, store, params=({"lr": 2, "new": 3},), metrics=({"loss": 0.5}, 7))
    run = store_client.get_run(first)
    assert second == first
    assert (run.data.params, run.data.metrics) == ({"lr": "1", "new": "3"}, {"loss": 0.5})


def test_dataset_arrives_with_digest_and_role(tmp_path, store, store_client):
    digest = "0123456789abcdef" * 4
    run_id = finished(tmp_path, store, dataset=("preferences", "data/pairs.jsonl", digest, "held_out"))
    (entry,) = store_client.get_run(run_id).inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("preferences", digest[:36])
    assert {tag.key: tag.value for tag in entry.tags} == {"mlflow.data.context": "held_out", "sha256": digest}


def test_rows_of_a_table_are_added_to_earlier_ones(tmp_path, store, store_client):
    tracker = open_tracker(tmp_path, store, "stage", None, is_writer=True)
    tracker.table("samples", [{"prompt": "a", "answer": "b"}])
    tracker.table("samples", [{"prompt": "c", "score": 1}])
    tracker.close()
    table = json.loads(file_of_run(store_client, tracker.run_id, "samples.json"))
    assert table["columns"] == ["prompt", "answer", "score"]
    assert table["data"] == [["a", "b", None], ["c", None, 1.0]]


def test_a_file_arrives(tmp_path, store, store_client):
    (tmp_path / "config.yaml").write_text("seed: 1")
    run_id = finished(tmp_path / "run", store, artifact=(tmp_path / "config.yaml",))
    assert file_of_run(store_client, run_id, "config.yaml") == "seed: 1"


def test_code_revision_and_diff_are_recorded(tmp_path, store, store_client, monkeypatch):
    monkeypatch.setattr(tracker_module, "code_revision", lambda: "abc+changes")
    monkeypatch.setattr(tracker_module, "code_diff", lambda: "-old\n+new\n")
    run_id = finished(tmp_path, store)
    tags = store_client.get_run(run_id).data.tags
    assert (tags["git.revision"], tags["mlflow.source.git.commit"]) == ("abc+changes", "abc")
    assert file_of_run(store_client, run_id, "git.diff") == "-old\n+new\n"


@pytest.mark.parametrize("given", ["", "made by an MLflow that is gone"])
def test_a_nested_run_finds_its_parent_in_the_folder_above(tmp_path, store, store_client, given):
    parent = finished(tmp_path, store)
    child = open_tracker(tmp_path / "reward" / "safety", store, "reward/safety", given, is_writer=True)
    child.close()
    assert store_client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent


def test_a_nested_run_without_a_folder_above_takes_the_given_parent(tmp_path, store, store_client):
    parent = finished(tmp_path / "pipeline", store)
    child = open_tracker(tmp_path / "elsewhere", store, "sft", parent, is_writer=True)
    child.close()
    assert store_client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent


def test_a_failed_run_says_why(tmp_path, store, store_client):
    tracker = open_tracker(tmp_path, store, "stage", None, is_writer=True)
    tracker.close("FAILED", "loss is NaN at step 7")
    run = store_client.get_run(tracker.run_id)
    assert (run.info.status, run.data.tags["failure.reason"]) == ("FAILED", "loss is NaN at step 7")


def test_a_run_that_goes_on_and_finishes_has_no_failure_any_more(tmp_path, store, store_client):
    open_tracker(tmp_path, store, "stage", None, is_writer=True).close("FAILED", "killed")
    run = store_client.get_run(finished(tmp_path, store))
    assert (run.info.status, run.data.tags.get("failure.reason")) == ("FINISHED", None)


def test_a_second_close_changes_nothing(tmp_path, store, store_client):
    tracker = open_tracker(tmp_path, store, "stage", None, is_writer=True)
    tracker.close("FAILED", "first")
    tracker.close("FINISHED")
    assert store_client.get_run(tracker.run_id).info.status == "FAILED"


# --- models -----------------------------------------------------------------------------------------------------------


def a_model(name: str, digest: str, accuracy: float) -> dict:
    dataset = {"name": "preferences, held out", "digest": "0123456789abcdef" * 4}
    metrics = {"held_out/accuracy": accuracy}
    about = {"name": name, "kind": "reward_model", "path": "/runs/first/artifact", "digest": digest}
    return {**about, "metrics": metrics, "step": 3, "dataset": dataset}


def test_models_are_ranked_by_their_metrics_on_a_dataset(tmp_path, store, store_client):
    for name, accuracy in (("a", 0.6), ("b", 0.8), ("c", 0.7)):
        finished(tmp_path / name, store, model=(a_model(f"{name}/reward", f"digest {name}", accuracy),))
    experiment = store_client.get_experiment_by_name("tests").experiment_id
    order = [{"field_name": "metrics.held_out/accuracy", "ascending": False}]
    kind = "model_type = 'reward_model'"
    ranked = store_client.search_logged_models([experiment], filter_string=kind, order_by=order)
    assert [model.name for model in ranked] == ["b-reward", "c-reward", "a-reward"]
    (metric,) = ranked[0].metrics
    assert (metric.value, metric.step, metric.dataset_name) == (0.8, 3, "preferences, held out")
    assert (ranked[0].status, ranked[0].tags["artifact.path"]) == ("READY", "/runs/first/artifact")


def test_a_model_ranks_by_what_a_later_stage_measured_on_it(tmp_path, store, store_client):
    """Also after the event was sent twice, and beside a model that this store does not have."""
    sft = a_model("start", "digest start", 0.5) | {"metrics": {"held_out/loss": 2.0}}
    sft_run = finished(tmp_path / "sft", store, model=(sft,))
    measured = [{"digest": "digest start", "metrics": {"held_out/gold": 0.4}}, {"digest": "of nobody", "metrics": {}}]
    ppo = a_model("end", "digest end", 0.5) | {"metrics": {"held_out/gold": 0.6}, "measured": measured}
    for _ in range(2):
        finished(tmp_path / "ppo", store, model=(ppo,))
    experiment = store_client.get_experiment_by_name("tests").experiment_id
    order = [{"field_name": "metrics.held_out/gold", "ascending": False}]
    ranked = store_client.search_logged_models(
        [experiment], filter_string="metrics.`held_out/gold` > 0", order_by=order
    )
    assert [model.name for model in ranked] == ["end", "start"]
    found = {metric.key: (metric.value, metric.step) for metric in ranked[1].metrics}
    assert found == {"held_out/loss": (2.0, 3), "held_out/gold": (0.4, 0)}
    assert ranked[1].source_run_id == sft_run


def test_a_model_that_is_sent_again_is_there_once(tmp_path, store, store_client):
    model = a_model("twice", "digest twice", 0.5)
    run_id = finished(tmp_path, store, model=(model,))
    finished(tmp_path, store, model=(model,))
    experiment = store_client.get_experiment_by_name("tests").experiment_id
    found = store_client.search_logged_models([experiment], filter_string="name = 'twice'")
    assert [one.source_run_id for one in found] == [run_id]


def test_the_experiment_has_a_view_with_the_columns_that_matter(store, first_use, store_client):
    tags = store_client.get_experiment_by_name("tests").tags
    state = json.loads(json.loads(tags["mlflow.sharedViewState.rlhf"])["state"])
    assert {"metrics.`eval/ppo/reward_safety`", "params.`ppo.kl_coef`"} <= {*state["selectedColumns"]}
