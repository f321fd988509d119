"""From the arguments of `rlhf serve` to what one process serves."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from launch.commands.arguments import tracking_uri
from launch.serve.background import BackgroundScoring
from launch.serve.feedback import default_store, store_url
from launch.serve.gate import Limits
from launch.serve.guard import Guard
from launch.serve.reload import Reloader
from launch.serve.rewards import reward_folders
from launch.serve.scoring import RewardModel
from launch.serve.service import Service
from launch.serve.source import Source, digest_of, resolved
from rlhf.config import PPOConfig
from rlhf.errors import UserError
from rlhf.serving.model import ServedModel
from rlhf.serving.store import Store, Writer
from rlhf.serving.watch import baseline


@dataclass(frozen=True)
class Plan:
    """What is served, before anything of it is loaded."""

    args: argparse.Namespace
    token: str
    sources: dict[str, Source]
    rewards: dict[str, Path]
    store: str | None
    """Its address; None: nothing is kept."""

    @classmethod
    def of(cls, args: argparse.Namespace, token: str) -> Plan:
        """UserError (2, 4) for what is not there or contradicts itself."""
        if args.guard is None:
            for option in ("threshold", "action"):
                if getattr(args, f"guard_{option}") is not None:
                    raise UserError(f"--guard-{option} is about a guard: name its safety model with --guard")
        uri = tracking_uri(args)
        sources = {name.rstrip("/"): resolved(name, uri) for name in args.models}
        policy = next(iter(sources.values())).folder
        store = None if args.store == "none" else store_url(args.store or str(default_store(policy)))
        return cls(args, token, sources, reward_folders(args.reward, policy), store)

    @property
    def policy(self) -> Path:
        return next(iter(self.sources.values())).folder

    def writer(self) -> Writer | None:
        if self.store is None:
            return None
        return Writer(Store(self.store, self.args.redact), self.args.keep_days)

    def scoring(self, writer: Writer | None) -> BackgroundScoring | None:
        if writer is None or not self.rewards:
            return None
        return BackgroundScoring(writer, {name: RewardModel(folder) for name, folder in self.rewards.items()})

    def load(self, name: str, source: Source) -> ServedModel:
        args = self.args
        return ServedModel(name, source.folder, args.queue, digest_of(source.folder), source.version, args.engine)

    def service(self, writer: Writer | None) -> Service:
        """Loads the models."""
        args, guard = self.args, self._guard()
        models = {name: self.load(name, source) for name, source in self.sources.items()}
        limits = Limits(per_minute=args.rate)
        service = Service(models, self.token, args.system_prompt, args.max_tokens, limits, writer, guard)
        service.baseline = self._baseline()
        return service

    def follow(self, service: Service) -> None:
        """The aliases of the registry."""
        aliases = {name: source.alias for name, source in self.sources.items() if source.alias}
        if aliases and (uri := tracking_uri(self.args)):
            Reloader(service, aliases, uri, self.load).start()

    def _baseline(self) -> baseline.Baseline | None:
        """The evaluation of a run's policy: what the dashboard compares with."""
        policy = self.policy
        folder = baseline.usual(policy.absolute().parents[1]) if policy.name == "artifact" else None
        return baseline.read(folder) if folder else None

    def _guard(self) -> Guard | None:
        args = self.args
        if args.guard is None:
            return None
        model = RewardModel(resolved(args.guard, tracking_uri(args)).folder)
        if not model.has_logits:
            raise UserError(f"--guard {args.guard}: a DPO policy says nothing of safety; name a reward model", 4)
        threshold = PPOConfig.model_fields["safety_threshold"].default
        threshold = threshold if args.guard_threshold is None else args.guard_threshold
        return Guard(model, threshold, args.guard_action or "refuse")
