"""Runtime: a routed model behaves like the Hugging Face model it was made from."""

from .._compat import check_transformers
from .assembling import make_routed_model
from .cache import RoutedCache
from .loaded_model import LoadedModel
from .routed_model import RoutedModel
from .slots import Slot, SlotPool

__all__ = ["LoadedModel", "RoutedCache", "RoutedModel", "Slot", "SlotPool", "make_routed_model"]

check_transformers()
