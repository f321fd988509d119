"""From a run file, its layers and the command line to one checked RunConfig.

A run file names layers (`model: tiny`, `hardware: laptop`, `stages: [small]`), its own sections go on top of them, and
`--ppo.optim.lr 1e-6` goes on top of all. Layers lie in `model/`, `hardware/` and `stage/` beside the run file's folder,
or else among the packaged `configs/`. All mistakes are found before any is shown.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from launch import yaml_tree
from launch.yaml_tree import ConfigError, Keys, Node
from rlhf.config import RunConfig, public
from rlhf.errors import UserError
from stages.base import misfits

PACKAGED = Path(__file__).resolve().parents[1] / "configs"
COMMAND_LINE = "command line"
LAYERED = {"model": "model", "hardware": "hardware", "stages": "stage"}  # key of the run file → folder of its layers
REPLACED_WHOLE: tuple[Keys, ...] = (("reward", "models"),)
"""A file that lists these replaces the list below it: which reward models there are is for one place to say."""
NO_ROWS = {role: {"train": []} for role in ("demonstrations", "preferences", "prompts")}
STAND_INS: dict[Keys, Node] = {("name",): yaml_tree.constant("unnamed"), ("data",): yaml_tree.constant(NO_ROWS)}
"""For required settings that are missing, so that the others can still be checked against each other."""
RENAMED = {  # old name → new name in the same section
    "ahead": "one_step_off_policy",
    "answers_per_prompt": "group_size",
    "beta": "kl_coef",
    "clip": "clip_range",
    "entropy_share_min": "entropy_ratio_min",
    "eos_share_min": "eos_rate_min",
    "held_out_share": "held_out_fraction",
    "importance_cap": "tis_cap",
    "lam": "gae_lambda",
    "min_lr_share": "min_lr_ratio",
    "other_share": "other_fraction",
    "sampler_gap_max": "rollout_logprob_diff_max",
    "value_clip": "value_clip_range",
    "warmup_share": "warmup_ratio",
}


def load(runfile: str | Path, overrides: list[str]) -> RunConfig:
    """The settings of `runfile` (a path or a packaged run's name) under `overrides` (`--a.b value` or `--a.b=value`).

    Raises UserError (exit code 2) that lists every mistake of every layer.
    """
    path = find_runfile(runfile)
    tree, mistakes = yaml_tree.read(path, _shown(path))
    changes, bad = _parse_overrides(overrides)
    mistakes += bad
    for keys, node in changes:
        if len(keys) == 1 and keys[0] in LAYERED:
            tree = yaml_tree.put(tree, keys, node)
    tree, bad, incomplete = _stack_layers(tree, path)
    mistakes += bad
    for keys, node in changes:
        if not (len(keys) == 1 and keys[0] in LAYERED):
            tree = yaml_tree.put(tree, keys, node)
    config, bad = _validate(tree, incomplete)
    mistakes += bad
    if mistakes or config is None:
        raise UserError(_message(mistakes))
    return config.with_fitting_micro_batches()


def dump(config: RunConfig) -> str:
    """The settings as YAML without passwords; a run file of its own that needs no layers."""
    return yaml.safe_dump(public(config), sort_keys=False, allow_unicode=True)


def find_runfile(runfile: str | Path) -> Path:
    path = Path(runfile).expanduser()
    if path.is_file():
        return path
    packaged = {found.stem: found for found in sorted((PACKAGED / "run").glob("*.yaml"))}
    if path.name == str(path) and path.stem in packaged:
        return packaged[path.stem]
    near = _nearest(path.stem, packaged)
    raise UserError(
        f"no run file {str(runfile)!r}{f' (did you mean {near}?)' if near else ''}: give the path of a YAML file "
        f"or one of {', '.join(packaged)}, and give it before the settings that you override"
    )


# --- layers -----------------------------------------------------------------------------------------------------------


def _stack_layers(run: Node, path: Path) -> tuple[Node, list[ConfigError], set[str]]:
    """Defaults, the layers that the run file names, its own sections; and which sections lack a layer."""
    stack, mistakes, incomplete = [_defaults()], [], set()
    own = dict(run.value)
    for key, folder in LAYERED.items():
        if key not in own:
            continue
        names, own[key], bad = _layer_names(key, own[key])
        mistakes += bad
        for name in names:
            layer, bad = _read_layer(key, folder, name, path)
            mistakes += bad
            incomplete |= {key} if bad else set()
            stack.append(layer if key == "stages" else Node({key: layer}, layer.where))
    own.pop("stages", None)
    stack.append(Node(own, run.where))
    tree = stack[0]
    for layer in stack[1:]:
        for keys in REPLACED_WHOLE:
            if yaml_tree.find(layer, keys):
                tree = yaml_tree.drop(tree, keys)
        tree = yaml_tree.merge(tree, layer)
    return tree, mistakes, incomplete


def _layer_names(key: str, node: Node) -> tuple[list[Node], Node, list[ConfigError]]:
    """The layers named at `key` of a run file, and what the run file itself says there."""
    rest = Node({}, node.where)
    if key == "stages":
        names = node.value if isinstance(node.value, list) else [node]
    elif isinstance(node.value, dict):
        entries = dict(node.value)
        base = entries.pop("base", None)
        names, rest = [base] if base else [], Node(entries, node.where)
    else:
        names = [node]
    good = [name for name in names if isinstance(name.value, str)]
    what = "a list of layer names" if key == "stages" else "the name of a layer, or a mapping"
    return good, rest, [ConfigError(name.where, key, f"should be {what}") for name in names if name not in good]


def _read_layer(key: str, folder: str, name: Node, runfile: Path) -> tuple[Node, list[ConfigError]]:
    folders = [runfile.resolve().parent.parent / folder, PACKAGED / folder]
    for place in folders:
        if (path := place / f"{name.value}.yaml").is_file():
            return yaml_tree.read(path, _shown(path))
    known = [found.stem for place in folders for found in sorted(place.glob("*.yaml"))]
    text = f"there is no {folder} layer {name.value!r}{_did_you_mean(name.value, known)}"
    if key == "model":
        text += "; a model of your own is named by `model: {path: FOLDER_OR_HUB_NAME}`"
    return Node({}, name.where), [ConfigError(name.where, key, text)]


def _defaults() -> Node:
    """What the classes say, so that `ppo.optim.eps` alone keeps the learning rate that PPO has by default."""
    fields = RunConfig.model_fields.items()
    given = {name: field.default for name, field in fields if not field.is_required()}
    return yaml_tree.constant({k: v.model_dump() if isinstance(v, BaseModel) else v for k, v in given.items()})


# --- command line -----------------------------------------------------------------------------------------------------


def _parse_overrides(overrides: list[str]) -> tuple[list[tuple[Keys, Node]], list[ConfigError]]:
    changes: list[tuple[Keys, Node]] = []
    mistakes: list[ConfigError] = []
    tokens = list(overrides)
    while tokens:
        token = tokens.pop(0)
        name, has_value, text = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not name:
            mistakes.append(ConfigError(COMMAND_LINE, token, "is neither an option nor a setting; write --name value"))
            continue
        if not has_value:
            if not tokens or tokens[0].startswith("--"):
                near = "" if _is_known(name) else f"; unknown setting{_near_setting(name)}"
                mistakes.append(ConfigError(COMMAND_LINE, name, f"has no value; write --{name} VALUE{near}"))
                continue
            text = tokens.pop(0)
        node, bad = yaml_tree.parse(text, COMMAND_LINE, lines=False)
        mistakes += [ConfigError(COMMAND_LINE, name, mistake.text) for mistake in bad]
        changes += [] if bad else [(tuple(name.split(".")), node)]
    return changes, mistakes


# --- checking ---------------------------------------------------------------------------------------------------------


def _validate(tree: Node, incomplete: set[str]) -> tuple[RunConfig | None, list[ConfigError]]:
    """All mistakes: pydantic skips its cross checks where a field is bad, so bad fields are replaced by their defaults and it validates again.

    Cross checks of a replaced setting, or of a section whose layer is missing, are left out.
    """
    defaults, mistakes, replaced = _defaults(), [], set[Keys]()
    while True:
        try:
            return RunConfig.model_validate(yaml_tree.plain(tree), context={"misfits": misfits}), mistakes
        except ValidationError as error:
            details = error.errors(include_url=False)
        suspect = [_dotted(keys) for keys in replaced] + [f"{section}." for section in incomplete]
        faulty: set[Keys] = set()
        for detail in details:
            keys = _keys(tree, detail)
            if detail["type"] == "value_error":
                lines = str(detail["msg"]).removeprefix("Value error, ").splitlines()
                mistakes += [_misfit(tree, line) for line in lines if not any(name in line for name in suspect)]
            elif detail["type"] == "missing":
                mistake = ConfigError(yaml_tree.where(tree, keys), _dotted(keys), "is missing")
                mistakes += [] if keys in replaced or mistake in mistakes else [mistake]
                faulty |= {keys} & STAND_INS.keys() - replaced
            else:
                faulty.add(keys)
                mistakes.append(ConfigError(yaml_tree.where(tree, keys), _dotted(keys), _explain(keys, detail)))
        if not faulty:
            return None, mistakes
        for keys in sorted(faulty, key=str, reverse=True):
            default = STAND_INS.get(keys) or yaml_tree.find(defaults, keys)
            tree = yaml_tree.put(tree, keys, default) if default else yaml_tree.drop(tree, keys)
        replaced |= faulty


def _keys(tree: Node, detail: ErrorDetails) -> Keys:
    """Where the error stands, without the union members and `[key]` that pydantic appends."""
    keys = tuple(detail["loc"])
    while detail["type"] != "missing" and keys and not yaml_tree.find(tree, keys):
        keys = keys[:-1]
    return keys


def _misfit(tree: Node, line: str) -> ConfigError:
    name, _, text = line.partition(" ")
    return ConfigError(yaml_tree.where(tree, tuple(name.split("."))), name, text)


def _explain(keys: Keys, detail: ErrorDetails) -> str:
    if detail["type"] == "extra_forbidden" and "." in str(keys[-1]):
        return "unknown setting (in a file, sections are written nested, without dots)"
    if detail["type"] == "extra_forbidden":
        return f"unknown setting{_near_setting(_dotted(keys))}"
    should = (
        detail["msg"]
        .partition(", unable to")[0]
        .replace("Input should be", "should be")
        .replace("String should", "should")
    )
    value = detail["input"]
    if isinstance(value, dict | list):
        return should
    near = ""
    if detail["type"] == "literal_error":
        options = detail.get("ctx", {}).get("expected", "").replace(" or ", ", ").split(", ")
        near = _did_you_mean(str(value), [option.strip("'") for option in options])
    return f"is {'null' if value is None else repr(value)}, {should}{near}"


def _message(mistakes: list[ConfigError]) -> str:
    lines: dict[tuple[str, str], str] = {}
    for mistake in sorted(mistakes, key=_reading_order):  # the members of a union each have their say about one value
        key = (mistake.where, mistake.name)
        lines[key] = f"{lines[key]}; {mistake.text}" if key in lines else mistake.text
    count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
    shown = [f"  {where}: {f'{name}: ' if name else ''}{text}" for (where, name), text in lines.items()]
    return "\n".join([f"{count} in the settings:", *shown])


def _reading_order(mistake: ConfigError) -> tuple[bool, str, int]:
    file, _, line = mistake.where.rpartition(":")
    return mistake.where == COMMAND_LINE, file, int(line) if line.isdigit() else 0


# --- names ------------------------------------------------------------------------------------------------------------


def _dotted(keys: Keys) -> str:
    return ".".join(str(key) for key in keys)


def _shown(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _nearest(name: str, known: Any) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)), None)


def _did_you_mean(name: str, known: list[str]) -> str:
    near = _nearest(name, known)
    return f" (did you mean {near}?)" if near else f" (there are {', '.join(dict.fromkeys(known))})"


def _near_setting(name: str) -> str:
    """The likeliest dotted name: what it is called now, a similar sibling, the same last part elsewhere, any similar."""
    *parents, last = name.split(".")
    siblings = [*_fields_at(tuple(parents)), *([] if parents else ["stages"])]
    prefix = "".join(f"{parent}." for parent in parents)
    everything = _all_names(RunConfig)
    if RENAMED.get(last) in siblings:
        return f" (renamed to {prefix}{RENAMED[last]})"
    if near := _nearest(last, siblings):
        return f" (did you mean {prefix}{near}?)"
    near = _nearest(name, [other for other in everything if other.split(".")[-1] == last]) or _nearest(name, everything)
    if near:
        return f" (did you mean {near}?)"
    return f" ({prefix.rstrip('.')} has {', '.join(siblings)})" if parents and siblings else ""


def _is_known(name: str) -> bool:
    *parents, last = name.split(".")
    return last in _fields_at(tuple(parents))


def _fields_at(keys: Keys) -> list[str]:
    """The names of the settings directly under `keys`; none where there is no section."""
    options: list[Any] = [RunConfig]
    for key in keys:
        options = [inner for option in options for inner in _inside(option, str(key))]
    return [name for option in options if isinstance(option, type) for name in getattr(option, "model_fields", {})]


def _inside(kind: Any, key: str) -> list[Any]:
    """The types that a value at `key` of a value of type `kind` may have."""
    if get_origin(kind) in (dict, list):
        return _options(get_args(kind)[-1])
    field = getattr(kind, "model_fields", {}).get(key)
    return _options(field.annotation) if field else []


def _options(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) or get_origin(annotation) in (dict, list):
        return [annotation]
    return [option for option in get_args(annotation) if option is not NoneType]


def _all_names(kind: type[BaseModel], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, field in kind.model_fields.items():
        names.append(f"{prefix}{name}")
        for option in _options(field.annotation):
            if isinstance(option, type) and issubclass(option, BaseModel):
                names += _all_names(option, f"{prefix}{name}.")
    return names
