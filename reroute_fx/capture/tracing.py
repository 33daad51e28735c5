"""Trace a module of transformers and leave it as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel
from transformers.utils import logging


@contextmanager
def as_traced(module: PreTrainedModel, attention: str) -> Iterator[None]:
    """Let `module` attend with the implementation called `attention`, whatever it uses."""
    before = module.config._attn_implementation
    own_forward = "forward" in module.__dict__
    module.config._attn_implementation = attention
    try:
        yield
    finally:
        module.config._attn_implementation = before
        if not own_forward:
            # The exporter restores forward as an attribute of the instance, which would hide the class's.
            module.__dict__.pop("forward", None)


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter warns that it is experimental on every export; errors still show."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
