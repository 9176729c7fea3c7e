"""What the pictures of ``unique_attn.viz`` say of themselves, whichever matplotlib drew them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def numbers(path: str | Path) -> Any:
    """The numbers that a picture was drawn from; opening it also checks that it is one. NaN comes as None."""
    from PIL import Image

    with Image.open(path) as picture:
        picture.load()
        return json.loads(picture.text["Comment"], parse_constant=lambda name: None)
