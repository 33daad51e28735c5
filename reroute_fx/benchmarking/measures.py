"""What is measured of each contender."""

MEASURES = {
    "first_token": "first token",
    "first_token_without_tower": "first token without vision tower",
    "decode_step": "decode, per token",
    "generate": "generate",
}
"""What is measured, and how it is called on screen."""
