"""What the documentation says is so: links lead somewhere, commands and settings exist, rows shown as data are read.

Named blocks (a YAML block whose first line is `# name.yaml`) are files to the commands of the same page.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

import reward_data
from launch.cli import _parser
from launch.settings import find_runfile, load
from launch.sweep.grid import plan
from reward_data.converters import converter_for
from reward_data.files import read_rows
from reward_data.gold import gold_score
from rlhf.config import RunConfig

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted(
        [
            *ROOT.glob("*.md"),
            *ROOT.glob("docs/**/*.md"),
            *ROOT.glob("benchmarks/*.md"),
            *ROOT.glob("launch/clusters/*.md"),
            *ROOT.glob("reward_data/*.md"),
        ]
    )
}
ROOMS = ("rlhf", "stages", "launch", "configs", "reward_data", "tests", "docs", "benchmarks")
COMMANDS = next(action.choices for action in _parser()._actions if action.choices)
EVALUATIONS = (["evaluate", "reward"], ["evaluate", "policy"])
PLACEHOLDERS = {"STAGE": "sft", "RUNFILE": "quickstart"}
NEEDS_NO_SETTINGS = {
    "name": "unnamed",
    "data": {k: {"train": []} for k in ("demonstrations", "preferences", "prompts")},
}


class Block(NamedTuple):
    language: str  # the info string: "sh", "yaml", "jsonl preferences pairs"
    text: str


def blocks(page: str) -> list[Block]:
    return [Block(*found) for found in re.findall(r"^```([^\n]*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)]


def prose(page: str) -> str:
    return re.sub(r"^```[^\n]*\n.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)


def spans(page: str) -> list[str]:
    """Inline code."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: str) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)}


# --- links ------------------------------------------------------------------------------------------------------------


def links(page: str) -> list[str]:
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]+`", "", prose(page)))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def dead_links(name: str, page: str) -> list[str]:
    dead = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        if not target.exists() or (anchor and slug(anchor) not in anchors(target.read_text(encoding="utf-8"))):
            dead.append(link)
    return dead


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name: str) -> None:
    assert dead_links(name, PAGES[name]) == []


# --- commands ---------------------------------------------------------------------------------------------------------


def command_lines(page: str) -> Iterator[list[str]]:
    """The words of every command in `sh` blocks, and of inline code that begins with `rlhf `."""
    texts = [block.text.replace("\\\n", " ") for block in blocks(page) if block.language == "sh"]
    lines = [line for text in texts for line in text.splitlines()]
    for line in [*lines, *(span for span in spans(page) if span.startswith("rlhf "))]:
        for part in line.split(" | ") if "rlhf" in line.partition(" | ")[2] else [line]:
            if words := shlex.split(part, comments=True):
                yield words


def rlhf_words(words: list[str]) -> list[str] | None:
    """What a command hands to `rlhf`; None for a command that does not call it."""
    names = [word.rpartition("/")[2] for word in words]
    for name in ("rlhf", "slurm.sh"):
        if name in names:
            return words[names.index(name) + 1 :]
    return None


def wrong_command(words: list[str]) -> str | None:
    """Why the parser, or the reader of settings, refuses a command; run files are looked for in this folder."""
    if words[1:] in ([], ["…"]) or words in EVALUATIONS:  # a command that is spoken of
        return None if words[0] in COMMANDS else "no such command"
    try:
        args, rest = _parser().parse_known_args([PLACEHOLDERS.get(word, word) for word in words])
    except SystemExit as error:
        return f"exit code {error.code}"
    if not args.takes_settings:
        return f"unknown arguments {rest}" if rest else None
    try:
        plan(args.runfile, rest, args.seeds) if words[0] == "sweep" else load(args.runfile, rest)
    except Exception as error:  # noqa: BLE001  whatever it is, the page shows a command that fails
        return str(error)
    return None


@pytest.fixture
def page_files(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The named YAML blocks of a page, as files in the working folder."""
    monkeypatch.chdir(tmp_path)
    for block in blocks(PAGES[request.node.callspec.params["name"]]):
        if named := re.match(r"# (\S+\.yaml)\n", block.text):
            (tmp_path / named[1]).write_text(block.text)


@pytest.mark.usefixtures("page_files")
@pytest.mark.parametrize("name", PAGES)
def test_every_rlhf_command_would_start(name: str) -> None:
    called = [(words, rlhf_words(words)) for words in command_lines(PAGES[name])]
    refused = {" ".join(words): why for words, ours in called if ours and (why := wrong_command(ours))}
    assert refused == {}


@pytest.mark.parametrize("name", PAGES)
def test_every_make_target_exists(name: str) -> None:
    known = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [words for words in command_lines(PAGES[name]) if words[0] == "make"]
    targets = [words[-1] for words in lines] + [s.split()[-1] for s in spans(PAGES[name]) if s.startswith("make ")]
    assert set(targets) <= known


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_every_yaml_block_is_made_of_settings(name: str, tmp_path: Path) -> None:
    file = tmp_path / "block.yaml"
    for block in blocks(PAGES[name]):
        if block.language == "yaml":
            file.write_text(yaml.safe_dump(complete(yaml.safe_load(block.text))))
            assert wrong_command(["config", str(file)]) is None


def complete(fragment: dict[str, Any]) -> dict[str, Any]:
    """A fragment of a run file with what every run file must have."""
    whole = NEEDS_NO_SETTINGS | fragment
    return whole | {"data": NEEDS_NO_SETTINGS["data"] | fragment.get("data", {})}


def is_setting(keys: list[str], model: Any = RunConfig) -> bool:
    """Whether dotted `keys` name a setting; a name such as NAME or <name> stands for any key of a mapping."""
    if not keys:
        return True
    for member in [model, *get_args(model)]:
        if isinstance(member, type) and issubclass(member, BaseModel):
            field = member.model_fields.get(keys[0])
            if field is not None and is_setting(keys[1:], field.annotation):
                return True
        elif get_origin(member) in (dict, list) and is_setting(keys[1:], get_args(member)[-1]):
            return True
    return False


def dotted_settings(page: str) -> Iterator[str]:
    """Inline code that looks like a dotted setting: it begins with a section of the settings."""
    sections = "|".join(RunConfig.model_fields)
    for span in spans(page):
        if found := re.fullmatch(rf"(?:--)?((?:{sections})(?:\.[\w<>]+)+)(?:[ =:].*)?", span):
            yield found[1]


def metrics() -> str:
    """The keys of the report, which look like settings and are none."""
    return PAGES["docs/metrics.md"]


@pytest.mark.parametrize("name", [name for name in PAGES if name != "docs/metrics.md"])
def test_every_dotted_setting_exists(name: str) -> None:
    unknown = [s for s in dotted_settings(PAGES[name]) if not is_setting(s.split(".")) and f"`{s}`" not in metrics()]
    assert [s for s in unknown if not s.endswith((".py", ".yaml", ".md"))] == []


# --- files and tests that are named -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_every_file_of_ours_exists(name: str) -> None:
    named = [span for span in spans(PAGES[name]) if re.fullmatch(rf"(?:{'|'.join(ROOMS)})/[\w./-]*\.\w+", span)]
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", PAGES)
def test_every_test_that_is_named_exists(name: str) -> None:
    known = {
        test
        for path in ROOT.glob("tests/**/test_*.py")
        for test in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert {span for span in spans(PAGES[name]) if re.fullmatch(r"test_\w+", span)} <= known


# --- rows that are shown as data --------------------------------------------------------------------------------------

DATA_BLOCKS = [
    (*block.language.split()[1:], block.text)
    for page in PAGES.values()
    for block in blocks(page)
    if block.language.startswith("jsonl ")
]


@pytest.mark.parametrize(("kind", "form", "text"), DATA_BLOCKS, ids=[form for _, form, _ in DATA_BLOCKS])
def test_rows_are_read_in_the_form_that_is_named(kind: Any, form: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    loaded = reward_data.load(kind, file)
    assert converter_for("auto", next(iter(read_rows(file)))).__name__.endswith(f".{form}")
    assert loaded.rows and not loaded.refused


# --- prompts that quickstart's models are asked -----------------------------------------------------------------------


def asked(page: str) -> list[str]:
    """Prompts of Python blocks, and of lines that a pipe hands to `rlhf chat`."""
    code = "".join(block.text for block in blocks(page) if block.language in ("python", "sh"))
    return re.findall(r'"role": "user", "content": "([^"]+)"', code) + re.findall(
        r"printf '([^']+)\\n' \| rlhf chat", code
    )


def test_quickstarts_models_know_the_prompts_that_the_docs_ask_them() -> None:
    prompts = [prompt for page in PAGES.values() for prompt in asked(page)]
    assert len(prompts) >= 3
    for prompt in prompts:
        gold_score(prompt, "the answer is 4.")  # a prompt of another world is an error


# --- the checks themselves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["[a](nowhere.md)", "[a](docs/design.md#nowhere)", "[a](#nowhere)"])
def test_a_dead_link_is_found(page: str) -> None:
    assert len(dead_links("README.md", page)) == 1


@pytest.mark.parametrize(
    "command",
    ["rlhf rum quickstart", "rlhf run nowhere", "rlhf run quickstart --ppo.beat 1", "rlhf score MODEL FILE",
     "rlhf chat MODEL --heat 1", "torchrun --no-python rlhf stage sfd quickstart", "sbatch slurm.sh run nowhere"],
)  # fmt: skip
def test_a_wrong_command_is_found(command: str) -> None:
    (words,) = command_lines(f"```sh\n{command}\n```")
    assert wrong_command(rlhf_words(words) or [])


@pytest.mark.parametrize(
    ("setting", "exists"),
    [("ppo.optim.lr", True), ("reward.models.NAME.own_tag", True), ("data.prompts.train", True), ("model.lora.rank", True),
     ("ppo.optim.rate", False), ("data.promts", False), ("reward.margin.small", False)],
)  # fmt: skip
def test_settings_are_told_from_others(setting: str, exists: bool) -> None:
    assert is_setting(setting.split(".")) is exists


def test_the_packaged_runs_that_the_readme_names_are_all_of_them() -> None:
    packaged = {path.stem for path in find_runfile("quickstart").parent.glob("*.yaml")}
    assert packaged <= set(spans(PAGES["README.md"]))


def test_every_command_is_in_the_readme() -> None:
    shown = {span.split()[1] for span in spans(PAGES["README.md"]) if span.startswith("rlhf ")}
    assert set(COMMANDS) <= shown
