"""Whether the tracking store can be reached, with which credentials it takes."""

from __future__ import annotations

import os
from pathlib import Path

from rlhf.config import TrackingConfig, without_secrets
from rlhf.tracking.mlflow_client import database_of, import_quietly


def why_unreachable(settings: TrackingConfig) -> tuple[str, str] | None:
    """(what is wrong, what to do) as seen from this machine; None where the store answers, or where there is none."""
    if settings.uri is None:
        return None
    if database := database_of(settings.uri):
        return _why_unwritable(database)
    import_quietly()
    from mlflow import MlflowClient

    try:
        MlflowClient(tracking_uri=settings.uri).search_experiments(max_results=1)
    except Exception as error:  # noqa: BLE001  whatever a store raises
        text = without_secrets(" ".join(str(error).split()))[:200]
        if any(code in text for code in ("401", "403", "UNAUTHENTICATED", "PERMISSION_DENIED")):
            return (
                f"it refuses the credentials: {text}",
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, for `rlhf`",
            )
        text = text.partition("failed with exception ")[2] or text
        return f"it cannot be reached: {text}", "start the server, or set tracking.uri; null writes files alone"
    return None


def _why_unwritable(database: Path) -> tuple[str, str] | None:
    place = next(path for path in (database, *database.absolute().parents) if path.exists())
    if os.access(place, os.W_OK):
        return None
    return f"nothing can be written to {place}", "set tracking.uri to a place that this user may write"
