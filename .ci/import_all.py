"""Import every module of the installed package; what needs an extra may miss that extra's library and nothing else."""

import sys
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import reroute_fx

EXTRAS = {
    "reroute_fx.evals.lmms": ("eval", "lmms_eval"),
    "reroute_fx.evals.task_functions": ("eval", "lmms_eval"),
    "reroute_fx.kernels.compact_tokens.triton": ("gpu", "triton"),
    "reroute_fx.kernels.restore_tokens.triton": ("gpu", "triton"),
    "reroute_fx.kernels.select_tokens.triton": ("gpu", "triton"),
    "reroute_fx.kernels.visual_scores.triton": ("gpu", "triton"),
    "reroute_fx.serving.engine": ("serve", "prometheus_client"),
    "reroute_fx.serving.http_app": ("serve", "fastapi"),
    "reroute_fx.serving.metrics": ("serve", "prometheus_client"),
    "reroute_fx.serving.picture_urls": ("serve", "httpcore"),
    "reroute_fx.serving.preparing": ("serve", "httpcore"),
    "reroute_fx.serving.ray_app": ("ray", "prometheus_client"),
    "reroute_fx.serving.start": ("serve", "prometheus_client"),
    "reroute_fx.visualizing.drawing": ("bench", "matplotlib"),
    "reroute_fx.visualizing.page": ("bench", "matplotlib"),
}
"""Modules that only features of an extra import, the extra, and the library that it brings."""


def import_module_of(name: str) -> bool:
    """Whether a module was imported; False if it lacks the library of its extra."""
    try:
        import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if name not in EXTRAS or missing != EXTRAS[name][1]:
            raise
        return False
    return True


def fail(name: str) -> None:
    raise ImportError(f"{name} can't be imported") from sys.exception()


if __name__ == "__main__":
    place = Path(reroute_fx.__file__).parent
    assert place.is_relative_to(sys.prefix), f"{place} is not what was installed into {sys.prefix}"
    names = [found.name for found in walk_packages(reroute_fx.__path__, "reroute_fx.", fail)]
    assert EXTRAS.keys() <= set(names), f"no such modules: {EXTRAS.keys() - set(names)}"
    imported = [import_module_of(name) for name in names]
    left_out = [f"{name} ({EXTRAS[name][0]})" for name, done in zip(names, imported, strict=True) if not done]
    print(f"{sum(imported)} modules imported; for an extra: {', '.join(left_out) or 'none'}")
