"""The thread that follows the aliases of the registry: where one moves, its new version is loaded beside the old one."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from launch.model_folder import model_folder
from launch.serve.service import Service
from launch.serve.source import Source
from rlhf.config import without_secrets
from rlhf.errors import UserError
from rlhf.serving.model import ServedModel
from rlhf.tracking.versions import Registry, Version

log = logging.getLogger(__name__)

LOOK_S = 5.0
RETRY_S = 60.0  # a version that could not be loaded, again


class Reloader:
    def __init__(
        self, service: Service, aliases: Mapping[str, str], uri: str, load: Callable[[str, Source], ServedModel]
    ) -> None:
        """`aliases`: name of the model → models:/NAME@ALIAS."""
        self._service, self._aliases, self._uri, self._load = service, aliases, uri, load
        self._registry: Registry | None = None
        self._failed: dict[str, tuple[str, float]] = {}  # by name: the version that could not be loaded, and when
        self._away: set[str] = set()  # aliases of which this has been said

    def start(self) -> None:
        threading.Thread(target=self._run, name="aliases", daemon=True).start()

    def _run(self) -> None:
        while not self._service.stopping:
            time.sleep(LOOK_S)
            if self._service.started:
                self.look()

    def look(self) -> None:
        for name, alias in self._aliases.items():
            version = self._version(alias)
            if version is None or version.uri == self._service.models[name].version:
                continue
            uri, when = self._failed.get(name, ("", 0.0))
            if uri != version.uri or time.monotonic() - when > RETRY_S:
                self._move(name, version)

    def _version(self, alias: str) -> Version | None:
        """None where the registry does not say."""
        try:
            self._registry = self._registry or Registry(self._uri)
            version = self._registry.version(alias)
        except Exception as error:  # noqa: BLE001  whatever the registry has, the model that is there goes on
            if alias not in self._away:
                log.warning("%s is not known at present, its model goes on: %s", alias, _said(error))
            self._away.add(alias)
            return None
        self._away.discard(alias)
        return version

    def _move(self, name: str, version: Version) -> None:
        reloads, old = self._service.metrics.reloads, self._service.models[name].version
        try:
            model = self._load(name, Source(model_folder(str(version.path)), version.uri, self._aliases[name]))
            self._service.replace(model)
        except Exception as error:  # noqa: BLE001  whatever is wrong with it, the model that is there goes on
            self._failed[name] = version.uri, time.monotonic()
            reloads.labels(name, "failed").inc()
            log.error("%s cannot be loaded, %s goes on: %s", version.uri, old, _said(error))
            return
        self._failed.pop(name, None)
        reloads.labels(name, "loaded").inc()
        print(f"{name}: {version.uri} in place of {old}", flush=True)


def _said(error: Exception) -> str:
    return error.message if isinstance(error, UserError) else without_secrets(f"{type(error).__name__}: {error}")
