"""Runtime: a routed model behaves like the Hugging Face model it was made from."""

from .model import RoutedModel, make_routed_model
from .prompt import Routing

__all__ = ["RoutedModel", "Routing", "make_routed_model"]
