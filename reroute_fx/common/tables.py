"""Tables as plain text, for `str` and for logs."""

import io

from rich.console import Console, RenderableType


def as_text(renderable: RenderableType, width: int = 100) -> str:
    """What a terminal of `width` columns would show, without colours."""
    screen = io.StringIO()
    Console(file=screen, width=width, color_system=None).print(renderable)
    return screen.getvalue()
