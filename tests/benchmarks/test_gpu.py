"""`make gpu`: its parts, its limit and its record, as far as a CPU can show them."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu


def record_of(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The commands that are run, none of which is: the second fails, the others write a result."""
    ran: list[list[str]] = []

    def run(command: list[str], _: float) -> str:
        ran.append(command)
        if len(ran) == 2:
            return "exit code 1"
        if "--out" in command:
            Path(command[-1]).write_text(json.dumps({"results": {"ran": len(ran)}}))
        return "well"

    monkeypatch.setattr(gpu, "_run", run)
    return ran


def test_the_record_has_every_part_and_how_it_ended(parts: list[list[str]], tmp_path: Path) -> None:
    assert gpu.main(["--quick", "--records", str(tmp_path)]) == 1
    record = record_of(tmp_path)
    assert record["date"] and record["device"] and record["torch"] and len(record["revision"]) == 40
    assert list(record["parts"]) == [part.name for part in gpu.PARTS]
    ends = [part["ended"] for part in record["parts"].values()]
    assert ends == ["well", "exit code 1", *["well"] * (len(ends) - 2)]
    assert record["parts"]["quickstart"]["results"] is None and record["parts"]["update-1b"]["results"] == {"ran": 3}
    assert record["parts"]["update-1b"]["command"] == "python -m benchmarks.update --quick"


def test_a_part_that_is_run_again_replaces_its_own_figures_alone(parts: list[list[str]], tmp_path: Path) -> None:
    assert gpu.main(["sync-1b", "--quick", "--records", str(tmp_path)]) == 0
    gpu.main(["quickstart", "--quick", "--records", str(tmp_path)])
    assert gpu.main(["quickstart", "--quick", "--records", str(tmp_path)]) == 0
    found = record_of(tmp_path)["parts"]
    assert {name: part["results"] for name, part in found.items()} == {"sync-1b": {"ran": 1}, "quickstart": {"ran": 3}}


@pytest.mark.parametrize("part", [part for part in gpu.PARTS if part.module != "pytest"], ids=lambda part: part.name)
@pytest.mark.parametrize("quick", [True, False])
def test_the_arguments_are_those_of_the_benchmark(part: gpu.Part, quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parser takes them; what would follow is cut off."""
    module = importlib.import_module(f"benchmarks.{part.module}")
    seen: list[Any] = []

    class Parsed(Exception):
        pass

    def parse(self: Any, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        seen.append((found, unknown))
        raise Parsed

    monkeypatch.setattr("argparse.ArgumentParser.parse_args", parse)
    monkeypatch.setattr(sys, "argv", [part.module, *part.command(quick)[2:], "--out", "out.json"])
    with pytest.raises(Parsed):
        module.main()
    ((found, unknown),) = seen
    assert unknown == [] and found.out == Path("out.json")


def test_a_part_that_takes_too_long_is_ended_with_its_children() -> None:
    start = time.monotonic()
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    assert gpu._run([sys.executable, "-c", child], 1.5) == "stopped after 1.5 s"
    assert time.monotonic() - start < 20
    assert gpu._run([sys.executable, "-c", "raise SystemExit(3)"], 60) == "exit code 3"


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU here; --quick"):
        gpu.main([])


def test_devices_become_names_of_files() -> None:
    assert gpu.slug("NVIDIA H200") == "nvidia-h200" and gpu.slug("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"
