"""Capture: Hugging Face models in, exported decoders out. Knows models, knows nothing of routing."""

from .captured_decoder import CapturedDecoder, capture_decoder, text_decoder
from .visual_tokens import find_visual_token_ids, tokens_per_image

__all__ = ["CapturedDecoder", "capture_decoder", "find_visual_token_ids", "text_decoder", "tokens_per_image"]
