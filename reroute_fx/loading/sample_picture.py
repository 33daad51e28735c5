"""Generated pictures, where none is given."""

import numpy as np
from PIL import Image, ImageDraw


def picture(seed: int = 0, size: tuple[int, int] = (448, 448)) -> Image.Image:
    """Coloured circles and squares on a noisy ground."""
    random = np.random.default_rng(seed)
    ground = random.integers(180, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(ground)
    draw = ImageDraw.Draw(image)
    for i, colour in enumerate(("red", "blue", "green", "orange", "purple", "black")):
        x, y = random.integers(0, size[0] - 90), random.integers(0, size[1] - 90)
        box = [int(x), int(y), int(x + random.integers(30, 90)), int(y + random.integers(30, 90))]
        (draw.ellipse if i % 2 == 0 else draw.rectangle)(box, fill=colour)
    return image
