"""Decoding: an image of any mode as 8-bit RGB, by one rule for each mode."""

import io
from typing import Any

import numpy as np


# What undoes each orientation of EXIF, by the names of Pillow's transpositions.
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
# How much a float may lie outside of [0, 1], for rounding.
_SLACK = 1e-3


class BrokenImage(ValueError):
    """An image that has no pixels: data, not a mistake of the program."""


def pillow() -> Any:
    """The `PIL.Image` module."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("images need the `pillow` library: pip install 'rinsx[vision]'") from error
    return Image


def decode(image: bytes | np.ndarray) -> tuple[Any, list[str]]:
    """An image as a Pillow image in RGB, and what was met on the way, as kinds to count.

    Raises `BrokenImage` if it has no pixels, and `ValueError` or `TypeError` if an array is no image.
    """
    library = pillow()
    if isinstance(image, np.ndarray):
        picture, mode = _from_array(image)
        return _to_rgb(picture), [] if mode == "RGB" else [f"mode {mode}"]
    if not isinstance(image, bytes):
        raise TypeError(f"an image must be the bytes of a file, or an array; got {type(image).__name__}")
    if not image:
        raise BrokenImage("there are no bytes")
    found = []
    try:
        picture = library.open(io.BytesIO(image))
        width, height = picture.size
        most = library.MAX_IMAGE_PIXELS
        if most is not None and width * height > most:
            raise BrokenImage(f"{width} x {height} pixels are more than `PIL.Image.MAX_IMAGE_PIXELS`, {most}")
        if getattr(picture, "is_animated", False):
            found.append("animation")
        picture.load()
        if picture.mode != "RGB":
            found.append(f"mode {picture.mode}")
        if "transparency" in picture.info:
            found.append("transparency")
        turn = _TURNS.get(_orientation(picture))
        picture = _to_rgb(picture)
        if turn is not None:
            found.append("EXIF orientation")
            picture = picture.transpose(library.Transpose[turn])
        return picture, found
    except (MemoryError, BrokenImage):
        raise
    except Exception as error:  # decoders raise what they like: OSError, SyntaxError, struct.error, ...
        raise BrokenImage(f"it cannot be decoded: {type(error).__name__}: {error}") from error


def _orientation(picture: Any) -> Any:
    try:
        return picture.getexif().get(0x0112)
    except Exception:  # a broken description of an image that is not broken
        return None


def _from_array(array: np.ndarray) -> tuple[Any, str]:
    """An array as a Pillow image, and its mode."""
    channels = 1 if array.ndim == 2 else array.shape[-1] if array.ndim == 3 else 0
    if channels not in (1, 3, 4):
        raise ValueError(f"an array must be [H, W], or [H, W, channels] with 1, 3 or 4 channels; got {array.shape}")
    if array.dtype.kind != "f" and array.dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)):
        raise TypeError(f"an array must be uint8, uint16, or float from 0 to 1; got {array.dtype}")
    if array.size == 0:
        raise BrokenImage(f"there are no pixels in an array of shape {array.shape}")
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    name = mode
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise BrokenImage("there are values that are not finite")
        if array.min() < -_SLACK or array.max() > 1 + _SLACK:
            raise ValueError(f"an array of floats must be from 0 to 1; got {array.min()} to {array.max()}")
        array, name = _scale(array, 255), f"{mode} float"
    elif array.dtype == np.uint16:
        array, name = _scale(array, 1 / 257), f"{mode} 16-bit"
    array = np.ascontiguousarray(array.reshape(*array.shape[:2], *([channels] if channels > 1 else [])))
    return pillow().fromarray(array), name


def _scale(array: np.ndarray, factor: float | int) -> np.ndarray:
    """Scaled to 8 bit, rounded."""
    return np.clip(np.rint(array.astype(np.float64) * factor), 0, 255).astype(np.uint8)


def _to_rgb(picture: Any) -> Any:
    """8-bit RGB; what is transparent is laid on white."""
    library, mode = pillow(), picture.mode
    if mode == "I" or mode == "F" or mode.startswith("I;16"):
        return _wide_to_rgb(picture)
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        # Palettes and premultiplied colours go through these modes only.
        picture = picture.convert({"La": "LA"}.get(mode, "RGBA")).convert("RGBA")
        white = library.new("RGBA", picture.size, (255, 255, 255, 255))
        return library.alpha_composite(white, picture).convert("RGB")
    return picture if mode == "RGB" else picture.convert("RGB")


def _wide_to_rgb(picture: Any) -> Any:
    """Grey of 16 bit, or of 32 bit where its scale is plain."""
    values = np.asarray(picture)
    transparent = picture.info.get("transparency")
    if picture.mode == "F":
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise BrokenImage("its floats are not all from 0 to 1, so its scale is not known")
        grey = _scale(values, 255)
    else:
        if values.min() < 0 or values.max() > 65535:
            raise BrokenImage("its integers do not fit into 16 bit, so its scale is not known")
        grey = _scale(values, 1 / 257)
    if isinstance(transparent, int):
        grey = np.where(values == transparent, np.uint8(255), grey)
    return pillow().fromarray(grey).convert("RGB")
