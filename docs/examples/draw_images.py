"""Draw forty captioned images of circles and squares into the folder `images`."""

import random
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"red": (200, 40, 40), "green": (30, 140, 60), "blue": (40, 70, 200)}
random.seed(0)
folder = Path("images")
folder.mkdir(exist_ok=True)
for index in range(40):
    shape, (name, colour) = random.choice(["circle", "square"]), random.choice([*COLOURS.items()])
    image = Image.new("RGB", (32, 32), (240, 240, 240))
    radius, x, y = random.randint(5, 9), random.randint(10, 21), random.randint(10, 21)
    draw = ImageDraw.Draw(image)
    (draw.ellipse if shape == "circle" else draw.rectangle)(
        [x - radius, y - radius, x + radius, y + radius], fill=colour
    )
    image.save(folder / f"{index}.png")
    (folder / f"{index}.txt").write_text(f"a {name} {shape}", encoding="utf-8")
