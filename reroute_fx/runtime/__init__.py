"""Runtime: a routed model behaves like the Hugging Face model it was made from."""

from .._compat import check_transformers
from .cache import RoutedCache
from .loaded import LoadedModel
from .model import RoutedModel, make_routed_model
from .routing import Routing

__all__ = ["LoadedModel", "RoutedCache", "RoutedModel", "Routing", "make_routed_model"]

check_transformers()
