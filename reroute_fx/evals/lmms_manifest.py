"""What lmms-eval reads from the entry point `lmms_eval.models`."""

from typing import Any

MODEL_ID = "reroute_fx"


def manifest() -> Any:
    """The model `reroute_fx`, for chat messages."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_ID, chat_class_path="reroute_fx.evals.lmms.RerouteFx")
