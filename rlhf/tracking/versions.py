"""Versions of MLflow's model registry as `models:/NAME@ALIAS` or `models:/NAME/3`, and which of them is the champion."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.tracking.mlflow_client import open_store, public_uri
from rlhf.tracking.registry import DIGEST, PATH

CHAMPION, EARLIER = "champion", "champion.earlier"  # an alias; a tag of the registered model: its earlier champions
REFERENCE = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<number>\d+)|@(?P<alias>[\w-]+))")


@dataclass(frozen=True)
class Version:
    name: str
    number: int
    tags: Mapping[str, str]

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.number}"

    @property
    def path(self) -> Path:
        return Path(self.tags[PATH])

    @property
    def digest(self) -> str:
        return self.tags[DIGEST]


def is_reference(model: str) -> bool:
    return model.startswith("models:/")


class Registry:
    """The registry of a tracking URI. UserError (4) for a store or a version that is not there."""

    def __init__(self, uri: str) -> None:
        self._uri = public_uri(uri)
        self._mlflow = open_store(uri, "--tracking-uri")

    def version(self, reference: str) -> Version:
        """`models:/NAME/3` or `models:/NAME@ALIAS`."""
        from mlflow.exceptions import MlflowException

        if not (parts := REFERENCE.fullmatch(reference)):
            raise UserError(f"{reference}: write models:/NAME/3 or models:/NAME@ALIAS")
        try:
            if parts["alias"]:
                found = self._mlflow.get_model_version_by_alias(parts["name"], parts["alias"])
            else:
                found = self._mlflow.get_model_version(parts["name"], parts["number"])
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise UserError(f"{reference} is not in the registry of {self._uri}: {error.message}", 4) from None
        return _version(found)

    def version_of(self, digest: str, folder: Path) -> Version:
        """The newest version of an artifact; two runs can make equal ones, so rather that of this folder."""
        same = f"tags.`{DIGEST}` = '{digest}'"
        found = sorted(
            self._mlflow.search_model_versions(same, order_by=["last_updated_timestamp DESC"]),
            key=lambda version: Path(version.tags[PATH]) != folder.absolute(),
        )
        if not found:
            raise UserError(
                f"no version in the registry of {self._uri} has the artifact {digest[:12]}; name the store of its run "
                "(--tracking-uri), or let `rlhf run` with its run file send what MLflow missed",
                4,
            )
        return _version(found[0])

    def champion(self, name: str) -> Version | None:
        number = self._model(name).aliases.get(CHAMPION)
        return None if number is None else self.version(f"models:/{name}/{number}")

    def names_with_champion(self) -> list[str]:
        return [model.name for model in self._mlflow.search_registered_models() if CHAMPION in model.aliases]

    def set_tags(self, version: Version, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self._mlflow.set_model_version_tag(version.name, str(version.number), key, value)

    def promote(self, version: Version) -> None:
        """Makes it the champion. The one before it is remembered first, so a kill between the two forgets nothing."""
        current, earlier = self.champion(version.name), self._earlier(version.name)
        if current and current.number not in (version.number, *earlier[-1:]):
            self._remember(version.name, [*earlier, current.number])
        self._mlflow.set_registered_model_alias(version.name, CHAMPION, str(version.number))

    def undo(self, name: str) -> Version | None:
        """The champion before the present one, which it becomes again; None, and no champion, if there was none."""
        current = self.champion(name)
        if current is None:
            raise UserError(f"{name} has no champion in the registry of {self._uri}", 4)
        earlier = self._earlier(name)
        if earlier[-1:] == [current.number]:  # a promotion was killed between its two steps
            earlier.pop()
        if earlier:
            self._mlflow.set_registered_model_alias(name, CHAMPION, str(earlier[-1]))
        else:
            self._mlflow.delete_registered_model_alias(name, CHAMPION)
        self._remember(name, earlier[:-1])
        return self.champion(name)

    def _earlier(self, name: str) -> list[int]:
        return json.loads(self._model(name).tags.get(EARLIER, "[]"))

    def _model(self, name: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return self._mlflow.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise UserError(f"{name} is not in the registry of {self._uri}", 4) from None

    def _remember(self, name: str, numbers: list[int]) -> None:
        self._mlflow.set_registered_model_tag(name, EARLIER, json.dumps(numbers))


def _version(found: Any) -> Version:
    return Version(found.name, int(found.version), dict(found.tags))
