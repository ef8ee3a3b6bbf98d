"""Images: every mode by its rule, crops and sizes against plain formulas, and every source against what was written."""

import io
import json
import pathlib
import re
import struct
import sys
import tarfile
import threading
import zlib

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from rinsx import data
from rinsx.data import _digits
from rinsx.data._decode import BrokenImage


SHAPES = st.sampled_from([(8, 8), (5, 9), (16, 3), (1, 40), (40, 1), (31, 17)])


def noise(shape, seed=0, dtype=np.uint8, most=255):
    return np.random.default_rng(seed).integers(0, most + 1, shape, dtype=dtype)


def encoded(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def seen(image, size=None):
    """The 8-bit pixels of an image at its own size, and what was counted."""
    if size is None:
        size = image.shape[:2] if isinstance(image, np.ndarray) else Image.open(io.BytesIO(image)).size[::-1]
    return data.Pixels(size).read(image)


def on_white(colour, alpha):
    colour, alpha = np.asarray(colour, float), np.asarray(alpha, float)[..., None] / 255
    return colour * alpha + 255 * (1 - alpha)


# Modes.


def test_rgb_and_grey_are_as_they_are():
    colour, grey = noise((7, 5, 3)), noise((7, 5))
    for image in (colour, encoded(Image.fromarray(colour))):
        got, kinds = seen(image)
        assert got.dtype == np.uint8 and np.array_equal(got, colour) and kinds == []
    for image in (grey, grey[..., None], encoded(Image.fromarray(grey))):
        got, kinds = seen(image)
        assert np.array_equal(got, np.repeat(grey[..., None], 3, 2)) and kinds == ["mode L"]


def test_palettes():
    colours, index = noise((16, 3), 1), noise((6, 9), 2, most=15)
    picture = Image.fromarray(index, "L")
    picture.putpalette(colours.tobytes())
    assert picture.mode == "P"
    got, kinds = seen(encoded(picture))
    assert np.array_equal(got, colours[index]) and kinds == ["mode P"]
    # One colour is transparent, or each has an alpha of its own.
    for transparency, alpha in (
        (3, np.where(np.arange(16) == 3, 0, 255)),
        (bytes(range(0, 256, 16)), np.arange(0, 256, 16)),
    ):
        got, kinds = seen(encoded(picture, transparency=transparency))
        assert np.abs(got - on_white(colours[index], alpha[index])).max() <= 1
        assert sorted(kinds) == ["mode P", "transparency"]


def test_alpha_is_laid_on_white():
    grey, colour, alpha = noise((6, 4), 1), noise((6, 4, 3), 2), noise((6, 4), 3)
    alpha[0], alpha[1] = 0, 255
    rgba = np.dstack([colour, alpha])
    for image, mode, want in (
        (encoded(Image.fromarray(np.dstack([grey, alpha]), "LA")), "LA", np.repeat(grey[..., None], 3, 2)),
        (encoded(Image.fromarray(rgba)), "RGBA", colour),
        (rgba, "RGBA", colour),
    ):
        got, kinds = seen(image)
        assert np.abs(got - on_white(want, alpha)).max() <= 1 and kinds == [f"mode {mode}"]
        assert (got[0] == 255).all() and np.array_equal(got[1], want[1])


def test_one_colour_that_is_transparent():
    colour = noise((5, 5, 3))
    colour[1, 2] = colour[3, 3] = (10, 20, 30)
    got, kinds = seen(encoded(Image.fromarray(colour), transparency=(10, 20, 30)))
    want = np.where((colour == (10, 20, 30)).all(-1, keepdims=True), 255, colour)
    assert np.array_equal(got, want) and kinds == ["transparency"]
    grey = noise((5, 5), 4, np.uint16, 65535)
    got, kinds = seen(encoded(Image.fromarray(grey), transparency=int(grey[2, 2])))
    assert got[2, 2].tolist() == [255] * 3 and got[0, 0, 0] == round(int(grey[0, 0]) / 257)
    assert kinds == ["mode I;16", "transparency"]


def test_sixteen_bits_are_scaled_not_clipped():
    grey = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    want = np.array([[round(int(x) / 257) for x in row] for row in grey])
    assert want.min() == 0 and want.max() == 255 and len(np.unique(want)) > 40
    for image, kind in (
        (encoded(Image.fromarray(grey)), "mode I;16"),
        (encoded(Image.fromarray(grey), "TIFF"), "mode I;16"),
        (encoded(Image.fromarray(grey.astype(np.int32)), "TIFF"), "mode I"),
        (grey, "mode L 16-bit"),
    ):
        got, kinds = seen(image)
        assert np.array_equal(got[..., 0], want) and np.array_equal(got[..., 2], want) and kinds == [kind]
    got, kinds = seen(np.dstack([grey] * 3))
    assert np.array_equal(got[..., 1], want) and kinds == ["mode RGB 16-bit"]


def test_a_sixteen_bit_colour_png_gives_its_upper_bytes():
    values = noise((4, 3, 3), 5, np.uint16, 65535)
    chunk = lambda name, raw: struct.pack(">I", len(raw)) + name + raw + struct.pack(">I", zlib.crc32(name + raw))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    raw = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 4, 16, 2, 0, 0, 0))
    raw += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.array_equal(seen(raw)[0], values >> 8)


def test_floats():
    values = np.random.default_rng(0).random((4, 6, 3)).astype(np.float32)
    for dtype in (np.float16, np.float32, np.float64):
        got, kinds = seen(values.astype(dtype))
        assert np.abs(got - values.astype(np.float64) * 255).max() <= 0.6 and kinds == ["mode RGB float"]
    got, kinds = seen(encoded(Image.fromarray(values[..., 0]), "TIFF"))
    assert np.abs(got[..., 1] - values[..., 0] * 255.0).max() <= 0.51 and kinds == ["mode F"]


@pytest.mark.parametrize("wrong", [70_000, -1])
def test_wide_modes_without_a_known_scale_are_broken(wrong):
    with pytest.raises(BrokenImage, match="16 bit"):
        seen(encoded(Image.fromarray(np.array([[0, wrong]], np.int32)), "TIFF"))
    with pytest.raises(BrokenImage, match="from 0 to 1"):
        seen(encoded(Image.fromarray(np.array([[0, wrong]], np.float32)), "TIFF"))


def test_cmyk_ycbcr_and_one_bit():
    cmyk = noise((5, 6, 4), 7)
    got, kinds = seen(encoded(Image.frombytes("CMYK", (6, 5), cmyk.tobytes()), "TIFF"))
    want = (255.0 - cmyk[..., :3]) * (255 - cmyk[..., 3:]) / 255
    assert np.abs(got - want).max() <= 1 and kinds == ["mode CMYK"]
    ycbcr = noise((5, 6, 3), 8)
    got, kinds = seen(encoded(Image.frombytes("YCbCr", (6, 5), ycbcr.tobytes()), "TIFF", compression="raw"))
    y, cb, cr = np.moveaxis(ycbcr.astype(float), -1, 0)
    want = np.stack(
        [y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)], -1
    )
    assert np.abs(got - want.clip(0, 255)).max() <= 2 and kinds in ([], ["mode YCbCr"])
    bits = noise((5, 6), 9, most=1)
    got, kinds = seen(encoded(Image.fromarray(bits * 255).convert("1")))
    assert np.array_equal(got, np.repeat(bits[..., None] * 255, 3, 2)) and kinds == ["mode 1"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation):
    upright = noise((4, 7, 3))
    # How a camera stores a scene under each orientation, from the definition: where its first row and column lie.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    got, kinds = seen(encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif), (4, 7))
    assert np.array_equal(got, upright) and kinds == (["EXIF orientation"] if orientation > 1 else [])


def test_a_broken_exif_is_no_broken_image():
    raw = encoded(Image.fromarray(noise((8, 8, 3))), "JPEG", exif=b"Exif\0\0nonsense" * 3)
    assert np.array_equal(seen(raw)[0], np.asarray(Image.open(io.BytesIO(raw))))


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("P", (6, 4)) for _ in range(3)]
    for number, frame in enumerate(frames):
        frame.putpalette([200, 30, 40, 0, 90, 0, 7, 7, 250])
        frame.paste(number, (0, 0, 6, 4))
    got, kinds = seen(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert (got == (200, 30, 40)).all() and "animation" in kinds


def test_broken_images():
    raw = encoded(Image.fromarray(noise((64, 64, 3))), "JPEG")
    png = encoded(Image.fromarray(noise((64, 64, 3))))
    gif = encoded(Image.fromarray(noise((32, 32))), "GIF")
    for image in (
        b"",
        b"no image",
        raw[: len(raw) // 2],
        raw[:20],
        png[: len(png) // 2],
        png[:40],
        gif[: len(gif) // 2],
    ):
        with pytest.raises(BrokenImage):
            data.Pixels(8)(image)
    for image in (np.zeros((0, 4, 3), np.uint8), np.full((2, 2), np.nan)):
        with pytest.raises(BrokenImage):
            data.Pixels(8)(image)


@given(seed=st.integers(0, 10**6), kind=st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"]))
def test_damaged_bytes_never_raise_anything_else(seed, kind):
    random = np.random.default_rng(seed)
    raw = bytearray(encoded(Image.fromarray(noise((12, 12, 3), seed)), kind))
    for place in random.integers(0, len(raw), 1 + seed % 8):
        raw[place] = random.integers(256)
    raw = bytes(raw[: random.integers(1, len(raw) + 1)])
    try:
        got = data.Pixels(8)(raw)
        assert got.shape == (8, 8, 3) and np.isfinite(got).all()
    except BrokenImage as error:
        assert str(error)


def test_a_decompression_bomb_is_broken(monkeypatch):
    raw = encoded(Image.new("RGB", (40, 30)))
    seen(raw)
    # Pillow itself only warns up to twice the limit, and refuses beyond.
    for most in (1199, 100):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with pytest.raises(BrokenImage, match="Decompression|MAX_IMAGE_PIXELS"):
            data.Pixels(8)(raw)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    seen(raw)


def test_arrays_that_are_no_images():
    for error, message, array in (
        (ValueError, r"\(2, 2, 2\)", np.zeros((2, 2, 2), np.uint8)),
        (ValueError, r"\(4,\)", np.zeros(4, np.uint8)),
        (TypeError, "int64", np.zeros((2, 2), np.int64)),
        (TypeError, "bool", np.zeros((2, 2), bool)),
        (ValueError, r"0.0 to 255.0", np.array([[0.0, 255.0]])),
    ):
        with pytest.raises(error, match=message) as caught:
            data.Pixels(8)(array)
        assert not isinstance(caught.value, BrokenImage)
    with pytest.raises(Exception, match="image"):
        data.Pixels(8)("a.jpg")


# Sizes, crops, flips.


@given(
    shape=SHAPES,
    size=st.sampled_from([(4, 4), (7, 3), (2, 9), (16, 16)]),
    method=st.sampled_from(["bicubic", "bilinear"]),
)
def test_evaluation_is_a_resize_and_a_centre_crop(shape, size, method):
    # Far from 0 and 255: what bicubic overshoots would be cut off between its two passes, whose order Pillow chooses.
    image = 64 + noise((*shape, 3), most=127)
    (high, wide), (height, width) = shape, size
    scale = max(height / high, width / wide)
    covering = [max(size[i], int(np.floor(shape[i] * scale + 1e-9))) for i in range(2)]
    resample = Image.Resampling.BICUBIC if method == "bicubic" else Image.Resampling.BILINEAR
    whole = np.asarray(Image.fromarray(image).resize(covering[::-1], resample)).astype(int)
    top, left = round((covering[0] - height) / 2), round((covering[1] - width) / 2)
    want = whole[top : top + height, left : left + width]
    got = data.Pixels(size, crop=(0.1, 1), flip=True, resample=method).read(image)[0]
    assert got.shape == (height, width, 3)
    assert np.abs(got - want).max() <= 2


def test_a_long_image_is_not_made_huge():
    image = noise((1, 20_000, 3))
    assert data.Pixels(224)(image).shape == (224, 224, 3)


@given(
    shape=SHAPES,
    seed=st.integers(0, 10**6),
    crop=st.sampled_from([(0.08, 1.0), (0.5, 0.5), (1.0, 1.0)]),
    flip=st.booleans(),
)
def test_training_is_a_rectangle_of_the_image(shape, seed, crop, flip):
    high, wide = shape
    image = noise((*shape, 3))
    random = np.random.default_rng(seed)
    pixels = data.Pixels((high, wide), crop=crop, flip=flip)
    again = pixels.read(image, np.random.default_rng(seed))[0]
    mirrored = flip and random.random() < 0.5
    # The rule, written out with the same draws.
    for _ in range(10):
        area = high * wide * random.uniform(*crop)
        aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = int(round((area * aspect) ** 0.5)), int(round((area / aspect) ** 0.5))
        if 0 < w <= wide and 0 < h <= high:
            left, top = random.integers(wide - w + 1), random.integers(high - h + 1)
            break
    else:
        if wide < high * 3 / 4:
            w, h = wide, int(round(wide / (3 / 4)))
        elif wide > high * 4 / 3:
            w, h = int(round(high * 4 / 3)), high
        else:
            w, h = wide, high
        left, top = (wide - w) // 2, (high - h) // 2
    cut = Image.fromarray(image[top : top + h, left : left + w])
    want = np.asarray(cut.resize((wide, high), Image.Resampling.BICUBIC))
    assert np.array_equal(again, want[:, ::-1] if mirrored else want)


def test_areas_aspects_and_flips_are_distributed_as_they_should():
    # A ramp over a large image gives the rectangle back: the ends of its rows and columns.
    n = 400
    image = np.zeros((n, n, 3), np.uint8)
    image[..., 0], image[..., 1] = (np.arange(n) * 255 / n)[:, None], np.arange(n) * 255 / n
    pixels = data.Pixels(2, crop=(0.2, 0.6), flip=True, resample="bilinear")
    areas, aspects, mirrored = [], [], 0
    for seed in range(400):
        got = pixels.read(image, np.random.default_rng(seed))[0].astype(float)
        # Proportional to the sides of the rectangle.
        height, width = got[1, 0, 0] - got[0, 0, 0], got[0, 1, 1] - got[0, 0, 1]
        mirrored += width < 0
        areas.append(height * abs(width))
        aspects.append(np.log(abs(width) / height))
    areas = np.array(areas) / np.mean(areas) * 0.4
    assert 0.17 < areas.min() < 0.23 and 0.56 < areas.max() < 0.64
    assert abs(np.std(areas) - 0.4 / 12**0.5) < 0.012
    assert abs(np.mean(aspects)) < 0.03 and abs(np.std(aspects) - 2 * np.log(4 / 3) / 12**0.5) < 0.02
    assert abs(mirrored - 200) < 45


def test_without_random_nothing_is_random():
    image = noise((20, 30, 3))
    plain = data.Pixels(8)
    both = data.Pixels(8, crop=(0.1, 0.5), flip=True)
    assert np.array_equal(plain(image), both(image))
    # Without a crop, training resizes as an evaluation does.
    mirrored = data.Pixels(8, flip=True)
    got = {mirrored(image, np.random.default_rng(seed)).tobytes() for seed in range(20)}
    assert got == {plain(image).tobytes(), plain(image)[:, ::-1].tobytes()}


@pytest.mark.parametrize("mean, std", [(0.5, 0.5), (0, 1), ((0.48, 0.45, 0.4), (0.26, 0.25, 0.27))])
def test_normalisation(mean, std):
    image = noise((8, 8, 3))
    got = data.Pixels(8, mean=mean, std=std)(image)
    want = (image / 255 - np.asarray(mean)) / np.asarray(std)
    assert got.dtype == np.float32 and np.abs(got - want).max() < 2e-6


def test_pixels_that_cannot_be():
    for message, options in {
        "`size`.*0": {"size": 0},
        r"`size`.*\(3, -1\)": {"size": (3, -1)},
        r"`crop`.*\(0.5, 0.2\)": {"size": 4, "crop": (0.5, 0.2)},
        r"`crop`.*\(0, 1\)": {"size": 4, "crop": (0, 1)},
        r"`crop`.*\(0.5,\)": {"size": 4, "crop": (0.5,)},
        r"`size`.*\(4, 4, 3\)": {"size": (4, 4, 3)},
        r"`size`.*-1": {"size": np.int64(-1)},
        r"`mean`.*\(0, 0\)": {"size": 4, "mean": (0, 0)},
        "`std`.*0.0": {"size": 4, "std": 0.0},
        "`mean`.*nan": {"size": 4, "mean": float("nan")},
    }.items():
        with pytest.raises(ValueError, match=message):
            data.Pixels(**options)


def test_sizes_are_any_integers():
    for size in (8, np.int64(8), np.uint8(8), (8, np.int32(8)), [8, 8]):
        pixels = data.Pixels(size)
        assert pixels.size == (8, 8) and all(type(side) is int for side in pixels.size)
        assert pixels(noise((9, 12, 3))).shape == (8, 8, 3)
    for wrong in (8.0, (8, 8.5), "8"):
        with pytest.raises(TypeError, match="size"):
            data.Pixels(wrong)


# Sources.


def rows(source):
    return [(example.image, example.text, example.label) for example in map(source.example, range(len(source)))]


PICTURES = [encoded(Image.fromarray(noise((4, 5, 3), seed))) for seed in range(7)]
CAPTIONS = ["a", "größer", "", None, "  ", "f", "g"]
LABELS = [0, 1, 2, 1, 0, 2, 2]
NAMES = ("cat", "dog", "eel")


def test_digits():
    source = data.digits()
    whole = load_digits()
    assert len(source) == 1797 and source.names[7] == "seven" and source.place(3) == "digits(), row 3"
    for i in (0, 5, 1796):
        example = source.example(i)
        want = [[int(x * 255 / 16 + 0.5) for x in row] for row in whole.images[i]]
        assert example.image.dtype == np.uint8 and example.image.tolist() == want
        assert example.label == whole.target[i] and example.text is None
    assert source.fingerprint() == data.digits().fingerprint()


def table(**columns):
    return pa.table({name: value for name, value in columns.items() if value is not None})


@pytest.mark.parametrize("form", ["binary", "large", "struct"])
def test_parquet(tmp_path, form):
    kind = {"binary": pa.binary(), "large": pa.large_binary()}.get(form)
    if form == "struct":
        images = pa.array([{"bytes": raw, "path": f"{i}.png"} for i, raw in enumerate(PICTURES)])
    else:
        images = pa.array(PICTURES, kind)
    whole = pa.table({"image": images, "caption": CAPTIONS, "label": LABELS})
    pq.write_table(whole.slice(0, 5), tmp_path / "a.parquet", row_group_size=2)
    pq.write_table(whole.slice(5), tmp_path / "b.parquet", row_group_size=2)
    source = data.image_parquet(tmp_path, text="caption", label="label", names=NAMES, row_groups=1)
    want = [(raw, text or "", label) for raw, text, label in zip(PICTURES, CAPTIONS, LABELS)]
    assert rows(source) == want
    for i in (6, 0, 3, 5, 1, 4, 2):
        assert rows(source.subset([i])) == [want[i]]
    assert (
        source.place(4) == f"{tmp_path / 'a.parquet'}, row 4" and source.place(6) == f"{tmp_path / 'b.parquet'}, row 1"
    )
    assert rows(data.image_parquet(tmp_path)) == [(raw, None, None) for raw in PICTURES]
    assert source.fingerprint() != data.image_parquet(tmp_path).fingerprint()
    assert source.names == NAMES and source.subset([3]).place(0).endswith("row 3")


def test_parquet_as_hugging_face_publishes_it(tmp_path):
    """The layout of published CIFAR-10: names in the metadata of the file."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    images = [{"bytes": raw, "path": None} for raw in PICTURES]
    dataset = datasets.Dataset.from_dict({"img": images, "label": LABELS}, features=features)
    dataset.to_parquet(tmp_path / "train.parquet")
    source = data.image_parquet(tmp_path / "train.parquet", image="img", label="label")
    assert source.names == NAMES and rows(source) == [(raw, None, label) for raw, label in zip(PICTURES, LABELS)]


def test_names_of_classes_differ_between_files(tmp_path):
    def write(name, names):
        kind = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
        features = datasets.Features({"image": datasets.Value("binary"), "label": kind})
        columns = {"image": PICTURES[:2], "label": [0, 1]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / name)

    write("a.parquet", ["cat", "dog"])
    write("b.parquet", ["cat", "dog"])
    assert data.image_parquet(tmp_path, label="label").names == ("cat", "dog")
    for other, shown in (
        (["dog", "cat"], r"\['dog', 'cat'\]"),
        (["cat", "dog", "eel"], "'eel'"),
        (None, "no names"),
    ):
        write("b.parquet", other)
        with pytest.raises(ValueError, match=rf"a.parquet has \['cat', 'dog'\], and .*b.parquet has .*{shown}"):
            data.image_parquet(tmp_path, label="label")
        with pytest.raises(ValueError, match="b.parquet has .*, and .*a.parquet has"):
            data.image_parquet(tmp_path / "b.parquet", tmp_path / "a.parquet", label="label")
        source = data.image_parquet(tmp_path, label="label", names=["x", "y"])
        assert source.names == ("x", "y") and [label for _, _, label in rows(source)] == [0, 1, 0, 1]
        assert data.image_parquet(tmp_path).names is None


def test_labels_that_are_names(tmp_path):
    for labels in (pa.array([NAMES[i] for i in LABELS]), pa.array([NAMES[i] for i in LABELS]).dictionary_encode()):
        pq.write_table(pa.table({"image": PICTURES, "label": labels}), tmp_path / "a.parquet")
        source = data.image_parquet(tmp_path, label="label")
        assert source.names == NAMES and [label for _, _, label in rows(source)] == LABELS
        source = data.image_parquet(tmp_path, label="label", names=NAMES[::-1])
        assert [label for _, _, label in rows(source)] == [2 - label for label in LABELS]
        with pytest.raises(
            ValueError, match=r"a.parquet, row 2: the label 'eel' is none of the names \['cat', 'dog'\]"
        ):
            data.image_parquet(tmp_path, label="label", names=["cat", "dog"])


SEVERAL = [["a", "b"], ["größer"], [], None, ["", "c", None], ["d", " "], ["e"]]
TUPLES = [("a", "b"), ("größer",), (), "", ("", "c", ""), ("d", " "), ("e",)]


def sources_of_texts(tmp_path, texts):
    """The same texts in every source that can hold them."""
    strings = pa.list_(pa.string()) if isinstance(texts[0], list) else pa.string()
    for kind in (strings, pa.large_list(pa.string())) if isinstance(texts[0], list) else (strings,):
        table = pa.table({"image": PICTURES, "text": pa.array(texts, kind)})
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
        yield data.image_parquet(tmp_path / "a.parquet", text="text", row_groups=1)
    yield data.image_huggingface(datasets.Dataset.from_dict({"image": PICTURES, "text": texts}), text="text")
    members = [
        (f"{i}.{kind}", raw)
        for i, text in enumerate(texts)
        for kind, raw in (("png", PICTURES[i]), ("json", json.dumps({"t": text})))
    ]
    yield data.image_tar(shard(tmp_path / "a.tar", members), text="json:t")


def test_several_captions_an_image(tmp_path):
    for source in sources_of_texts(tmp_path, SEVERAL):
        assert [text for _, text, _ in rows(source)] == TUPLES
        assert [image for image, _, _ in rows(source)] == PICTURES
        assert list(source.texts()) == TUPLES
        assert len(source.fingerprint()) == 64
    pq.write_table(pa.table({"image": PICTURES[:1], "text": [[1]]}), tmp_path / "a.parquet")
    with pytest.raises(TypeError, match="'text' must be text, or lists of texts; it is list<"):
        data.image_parquet(tmp_path / "a.parquet", text="text")
    for wrong in ([1], {"a": "b"}, [["a"]]):
        path = shard(tmp_path / "b.tar", [("0.png", b""), ("0.json", json.dumps({"t": wrong}))])
        with pytest.raises(TypeError, match="'0'.*'json:t' must be text, or a list of texts"):
            data.image_tar(path, text="json:t")
    # A file of several lines is one caption.
    touch(tmp_path / "x" / "0.png")
    touch(tmp_path / "x" / "0.txt", b"one\ntwo\n")
    assert data.image_folder(tmp_path / "x").example(0).text == "one\ntwo\n"
    path = shard(tmp_path / "c.tar", [("0.png", b""), ("0.txt", "one\ntwo")])
    assert data.image_tar(path, text="txt").example(0).text == "one\ntwo"


@pytest.mark.parametrize("several", [False, True])
def test_texts_come_without_images(tmp_path, several):
    sources = [*sources_of_texts(tmp_path, SEVERAL if several else CAPTIONS)]
    want = TUPLES if several else [text or "" for text in CAPTIONS]
    if not several:
        for i, text in enumerate(CAPTIONS):
            touch(tmp_path / "folder" / f"{i}.png", PICTURES[i])
            if text is not None:
                touch(tmp_path / "folder" / f"{i}.txt", text.encode())
        sources.append(data.image_folder(tmp_path / "folder"))
    for source in sources:
        here = want if sources.index(source) < len(sources) - (not several) else CAPTIONS
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(source), "example", lambda self, index: pytest.fail("an image was read"))
            chosen = [5, 1, 1, 6, 0]
            assert list(source.texts()) == here and list(source.texts(np.array(chosen))) == [here[i] for i in chosen]
            part = source.subset(chosen)
            assert list(part.texts()) == [here[i] for i in chosen]
            assert list(part.subset([4, 0]).texts([1, 0])) == [here[5], here[0]]
    assert list(data.image_parquet(tmp_path / "a.parquet").texts([0, 2])) == [None, None]
    assert list(data.digits().texts([0, 2])) == [None, None]


def test_parquet_with_paths_of_files(tmp_path):
    (tmp_path / "0.png").write_bytes(PICTURES[0])
    images = [{"bytes": None, "path": "0.png"}, {"bytes": None, "path": "1.png"}, {"bytes": None, "path": None}, None]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array(images, kind)}), tmp_path / "a.parquet")
    source = data.image_parquet(tmp_path / "a.parquet")
    assert source.example(0).image == PICTURES[0] and source.example(2).image == source.example(3).image == b""
    with pytest.raises(FileNotFoundError, match=r"a.parquet, row 1: there is no file .*1.png"):
        source.example(1)


def test_row_groups_stay_in_memory_up_to_a_bound(tmp_path, monkeypatch):
    pq.write_table(pa.table({"image": PICTURES}), tmp_path / "a.parquet", row_group_size=1)
    source = data.image_parquet(tmp_path / "a.parquet", row_groups=2)
    read = []
    plain = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, **options: (read.append(i), plain(self, i, **options))[1]
    )
    for i in (0, 1, 0, 1, 2, 1, 0):
        assert source.example(i).image == PICTURES[i]
    assert read == [0, 1, 2, 0]


@pytest.mark.parametrize("make", ["parquet", "hub", "tar"])
def test_threads_can_share_a_source(tmp_path, make):
    if make == "parquet":
        pq.write_table(pa.table({"image": PICTURES * 20}), tmp_path / "a.parquet", row_group_size=3)
        source = data.image_parquet(tmp_path, row_groups=2)
    elif make == "hub":
        datasets.Dataset.from_dict({"image": PICTURES * 20}).save_to_disk(tmp_path / "saved")
        source = data.image_huggingface(tmp_path / "saved")
    else:
        members = [(f"{i}.png", raw) for i, raw in enumerate(PICTURES * 20)]
        source = data.image_tar(shard(tmp_path / "a.tar", members))
    wrong = []

    def work(seed):
        for i in np.random.default_rng(seed).permutation(len(source)).tolist():
            if source.example(i).image != PICTURES[i % 7]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_parquet_that_cannot_be(tmp_path):
    path = tmp_path / "a.parquet"
    plain = {"image": PICTURES, "caption": CAPTIONS, "label": LABELS}
    for error, message, columns, options in (
        (ValueError, r"a.parquet: there is no column 'img'; the columns are \['image'", plain, {"image": "img"}),
        (ValueError, "a.parquet: there is no column 'text'", plain, {"text": "text"}),
        (ValueError, "a.parquet: there is no column 'y'", plain, {"label": "y"}),
        (TypeError, "a.parquet: the column 'caption' must be binary", plain, {"image": "caption"}),
        (
            TypeError,
            "a.parquet: the column 'label' must be text, or lists of texts; it is int64",
            plain,
            {"text": "label"},
        ),
        (TypeError, "the column 'image' must be integers", plain, {"label": "image"}),
        (
            ValueError,
            r"row 2: the label 2 is out of range. There are 2 names: \['a', 'b'\]",
            plain,
            {"label": "label", "names": "ab"},
        ),
        (ValueError, "row 1: the label -1", {**plain, "label": [0, -1, *LABELS[2:]]}, {"label": "label"}),
        (ValueError, "row 3: there is no label", {**plain, "label": [0, 1, 1, None, 0, 0, 0]}, {"label": "label"}),
        (ValueError, "`label` must say", plain, {"names": NAMES}),
        (ValueError, "`row_groups`.*0", plain, {"row_groups": 0}),
        (ValueError, "no images", {"image": pa.array([], pa.binary())}, {}),
    ):
        pq.write_table(pa.table(columns), path)
        with pytest.raises(error, match=message):
            data.image_parquet(path, **{**options, **({"names": list(options["names"])} if "names" in options else {})})
    path.write_bytes(b"no parquet at all")
    with pytest.raises(ValueError, match="a.parquet: cannot be read as parquet"):
        data.image_parquet(path)
    with pytest.raises(FileNotFoundError, match="b.parquet"):
        data.image_parquet(tmp_path / "b.parquet")


def test_huggingface(tmp_path):
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(NAMES))}
    )
    images = [{"bytes": raw, "path": None} for raw in PICTURES]
    dataset = datasets.Dataset.from_dict({"image": images, "text": CAPTIONS, "label": LABELS}, features=features)
    dataset.save_to_disk(tmp_path / "saved")
    want = [(raw, text or "", label) for raw, text, label in zip(PICTURES, CAPTIONS, LABELS)]
    for name in (dataset, tmp_path / "saved", datasets.DatasetDict({"train": dataset})):
        source = data.image_huggingface(name, text="text", label="label")
        assert rows(source) == want and source.names == NAMES
    # Rows chosen and turned round by the library.
    source = data.image_huggingface(dataset.select([5, 2, 4]), text="text", label="label", names=["a", "b", "c"])
    assert rows(source) == [want[5], want[2], want[4]] and source.names == ("a", "b", "c")
    assert source.place(1) == "the dataset, row 1"
    plain = datasets.Dataset.from_dict({"image": PICTURES, "name": ["cat", "dog", "cat", "eel", "eel", "dog", "cat"]})
    source = data.image_huggingface(plain, label="name")
    assert source.names == NAMES and rows(source)[3] == (PICTURES[3], None, 2)
    assert rows(data.image_huggingface(dataset)) == [(raw, None, None) for raw in PICTURES]


def test_huggingface_with_paths_of_files(tmp_path):
    (tmp_path / "0.png").write_bytes(PICTURES[0])
    paths = [str(tmp_path / "0.png"), str(tmp_path / "1.png")]
    source = data.image_huggingface(datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image()))
    assert source.example(0).image == PICTURES[0]
    with pytest.raises(FileNotFoundError, match="row 1: there is no file.*1.png"):
        source.example(1)


def test_huggingface_that_cannot_be():
    dataset = datasets.Dataset.from_dict({"image": PICTURES, "text": CAPTIONS, "label": LABELS})
    for error, message, options in (
        (ValueError, "there is no column 'img'", {"image": "img"}),
        (TypeError, "'text' must be binary", {"image": "text"}),
        (TypeError, "'label' must be text", {"text": "label"}),
        (ValueError, "row 2: the label 2 is out of range", {"label": "label", "names": ["a", "b"]}),
        (ValueError, "has no splits", {"split": "train"}),
        (ValueError, "no images", {"name": dataset.select([])}),
    ):
        with pytest.raises(error, match=message):
            data.image_huggingface(**{"name": dataset, **options})


def touch(path, raw=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)


def test_folders_of_classes(tmp_path):
    names = ["dog/2.JPG", "cat/b/1.png", "cat/a.png", "eel/9.webp", "dog/10.jpeg"]
    for name, raw in zip(names, PICTURES):
        touch(tmp_path / name, raw)
    for name in ("cat/Thumbs.db", ".git/x.png", "cat/.x.png", "README.md"):
        touch(tmp_path / name)
    source = data.image_folder(tmp_path)
    order = ["cat/a.png", "cat/b/1.png", "dog/10.jpeg", "dog/2.JPG", "eel/9.webp"]
    assert source.names == NAMES
    assert rows(source) == [(PICTURES[names.index(name)], None, label) for name, label in zip(order, (0, 0, 1, 1, 2))]
    assert source.place(3) == str(tmp_path / "dog/2.JPG")
    # A part of the data can lack a class; the labels stay.
    source = data.image_folder(tmp_path, names=["ant", "eel", "dog", "cat"])
    assert [label for _, _, label in rows(source)] == [3, 3, 2, 2, 1]
    with pytest.raises(ValueError, match=r"eel is none of the classes \['cat', 'dog'\]"):
        data.image_folder(tmp_path, names=["cat", "dog"])
    (tmp_path / "fox").mkdir()
    with pytest.raises(FileNotFoundError, match="fox has no images"):
        data.image_folder(tmp_path)
    touch(tmp_path / "alone.png")
    with pytest.raises(ValueError, match="alone.png: an image must lie in the folder of its class"):
        data.image_folder(tmp_path)


def test_folders_with_captions(tmp_path):
    for i, (raw, text) in enumerate(zip(PICTURES, ["a", "größer", "", "caf"])):
        touch(tmp_path / "x" / f"{i}.png", raw)
        touch(tmp_path / "x" / f"{i}.txt", text.encode() + (b"\xe9" if i == 3 else b""))
    touch(tmp_path / "x" / "0.json")
    source = data.image_folder(tmp_path)
    assert rows(source)[:3] == [(PICTURES[0], "a", None), (PICTURES[1], "größer", None), (PICTURES[2], "", None)]
    assert source.names is None
    # What is no UTF-8 is replaced.
    tokens = data.Captions(data.Bytes(), 12)(source.example(3).text)
    assert data.Bytes().decode(tokens) == "caf\ufffd"
    with pytest.raises(ValueError, match="classes.*names"):
        data.image_folder(tmp_path, names=["x"])
    # An image without a caption is data; a caption without an image is none.
    touch(tmp_path / "x" / "5.jpg")
    source = data.image_folder(tmp_path)
    assert rows(source)[:2] == [(PICTURES[0], "a", None), (PICTURES[1], "größer", None)]
    assert rows(source)[4] == (b"", None, None) and list(source.texts([4, 0])) == [None, "a"]
    whole = source.fingerprint()
    touch(tmp_path / "x" / "5.txt")
    assert data.image_folder(tmp_path).fingerprint() != whole
    touch(tmp_path / "x" / "alone.txt")
    with pytest.raises(ValueError, match="alone.txt: there is no image"):
        data.image_folder(tmp_path)
    touch(tmp_path / "x" / "0.jpg")
    with pytest.raises(ValueError, match="another image has the same caption"):
        data.image_folder(tmp_path)
    # Read as classes, captions are files like any other.
    assert data.image_folder(tmp_path, captions=False).names == ("x",)


def test_folders_that_cannot_be(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        data.image_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no images"):
        data.image_folder(tmp_path)
    touch(tmp_path / "x" / "0.jpg")
    with pytest.raises(ValueError, match="0.jpg: there is no caption 0.txt beside it, nor beside any"):
        data.image_folder(tmp_path, captions=True)


def test_links_to_folders(tmp_path):
    touch(tmp_path / "own" / "cat" / "0.png", PICTURES[0])
    touch(tmp_path / "far" / "1.png", PICTURES[1])
    # Elsewhere, and twice: that ends.
    for name in ("cat/more", "dog"):
        (tmp_path / "own" / name).symlink_to(tmp_path / "far", target_is_directory=True)
    source = data.image_folder(tmp_path / "own")
    assert rows(source) == [(PICTURES[0], None, 0), (PICTURES[1], None, 0), (PICTURES[1], None, 1)]
    # To a folder above, by whatever way, it does not.
    for name, target in (("cat/round", "own"), ("cat/round", "own/cat"), ("cat/more/round", "own"), ("cat/up", ".")):
        link = tmp_path / "own" / name
        link.symlink_to(tmp_path / target, target_is_directory=True)
        with pytest.raises(ValueError, match="by a link, .*again, which it lies in") as error:
            data.image_folder(tmp_path / "own")
        inner, outer = re.fullmatch(r"by a link, (.*) is (.*) again, which.*", str(error.value)).groups()
        assert pathlib.Path(inner).samefile(outer) and outer in inner and len(inner) > len(outer)
        link.unlink()


def shard(path, members, mode="w", **options):
    with tarfile.open(path, mode, **options) as tar:
        for name, raw in members:
            member = tarfile.TarInfo(name)
            if raw is None:
                member.type = tarfile.DIRTYPE
                tar.addfile(member)
                continue
            raw = raw.encode() if isinstance(raw, str) else raw
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    return path


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar(tmp_path, kind):
    deep = "a" * 60 + "/" + "b.c" * 25  # long names have headers of their own
    first = [
        ("part", None),
        ("part/0.1.png", PICTURES[0]),
        ("part/0.txt", "one"),
        ("part/0.cls", "2\n"),
        ("part/0.json", json.dumps({"caption": "uno", "y": "dog"})),
        ("__meta__/info", b"x"),
        (".hidden", b"x"),
        ("part/1.txt", "größer"),
        ("part/1.1.png", PICTURES[1]),
        ("part/1.cls", "0"),
        ("part/1.json", json.dumps({"caption": None, "y": "cat"})),
    ]
    second = [
        (f"{deep.partition('/')[0]}/z.{name}", raw)
        for name, raw in zip(("1.png", "txt", "cls"), (PICTURES[2], "", "1"))
    ]
    second.append((second[0][0].replace("1.png", "json"), json.dumps({"caption": "tres", "y": "eel"})))
    shard(tmp_path / "0.tar", first, format=kind)
    shard(tmp_path / "1.tar", second, format=kind)
    source = data.image_tar(tmp_path, image="1.png", text="txt", label="cls", names=NAMES)
    assert rows(source) == [(PICTURES[0], "one", 2), (PICTURES[1], "größer", 0), (PICTURES[2], "", 1)]
    assert rows(source.subset([2, 0]))[1] == (PICTURES[0], "one", 2)
    assert source.place(1) == f"{tmp_path / '0.tar'}, sample 'part/1'"
    source = data.image_tar(tmp_path, image="1.png", text="json:caption", label="json:y")
    assert source.names == NAMES
    assert rows(source) == [(PICTURES[0], "uno", 1), (PICTURES[1], "", 0), (PICTURES[2], "tres", 2)]
    assert rows(data.image_tar(tmp_path, image="1.png"))[0] == (PICTURES[0], None, None)


def test_long_names_and_many_samples(tmp_path):
    members = [
        (f"{'d' * 120}/{i:03}.{kind}", raw)
        for i in range(100)
        for kind, raw in (("png", PICTURES[i % 7]), ("cls", str(i)))
    ]
    source = data.image_tar(shard(tmp_path / "a.tar", members), label="cls")
    assert rows(source) == [(PICTURES[i % 7], None, i) for i in range(100)]


def test_tar_that_cannot_be(tmp_path):
    path = tmp_path / "a.tar"
    good = [("0.png", PICTURES[0]), ("0.txt", "a"), ("0.json", '{"y": 1}')]
    for error, message, members, options in (
        (ValueError, "sample '1': there is no image; its members are", [*good, ("1.txt", "b")], {}),
        (ValueError, "sample '1': there must be one member 'txt', and are 0", [*good, ("1.png", b"")], {"text": "txt"}),
        (
            ValueError,
            "sample '0': there must be one member 'png', and are 2",
            [*good, ("0.png", b"")],
            {"image": "png"},
        ),
        (ValueError, "sample '0': there are several images", [*good, ("0.jpg", b"")], {}),
        (ValueError, "sample '0': its members are not side by side", [*good, ("1.png", b""), ("0.cls", b"")], {}),
        (ValueError, "sample '0': the member 'json' has no field 'z'; it is the fields", good, {"text": "json:z"}),
        (TypeError, "sample '0': 'json:y' must be text", good, {"text": "json:y"}),
        (ValueError, "sample '0': the member 'json' is broken", [*good[:2], ("0.json", "{")], {"label": "json:y"}),
        (ValueError, "sample '0': the label 1 is out of range. There are 1", good, {"label": "json:y", "names": ["a"]}),
        (ValueError, "`label` must say", good, {"names": ["a"]}),
        (ValueError, "there are no images", [], {}),
    ):
        shard(path, members)
        with pytest.raises(error, match=message):
            data.image_tar(path, **options)
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "x.png"
        tar.addfile(link)
    with pytest.raises(ValueError, match="'0.png'.*no link"):
        data.image_tar(path)
    path.write_bytes(b"no tar" * 1000)
    with pytest.raises(ValueError, match="a.tar: cannot be read as tar"):
        data.image_tar(path)


@pytest.mark.parametrize("mode, name", [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_compressed_shards_are_refused(tmp_path, mode, name):
    with pytest.raises(ValueError, match=rf"a.tar is compressed \({name}\).*unpack"):
        data.image_tar(shard(tmp_path / "a.tar", [("0.png", b"x")], mode))
    (tmp_path / "b.tar").write_bytes(b"\x28\xb5\x2f\xfd....")
    with pytest.raises(ValueError, match="zstd"):
        data.image_tar(tmp_path / "b.tar")


def test_a_shard_that_is_cut_off(tmp_path):
    path = shard(tmp_path / "a.tar", [("0.png", b"x" * 3000), ("1.png", b"y" * 3000)])
    raw = path.read_bytes()
    for length in (3000, 3584, 3584 + 300, 3584 + 512, 3584 + 512 + 1000, 7168):
        path.write_bytes(raw[:length])
        with pytest.raises(ValueError, match="a.tar.*(cannot be read|cut off)"):
            data.image_tar(path)
    path.write_bytes(raw)
    source = data.image_tar(path)
    path.write_bytes(raw[:4000])
    with pytest.raises(ValueError, match="sample '1': the shard is cut off, or has changed"):
        source.example(1)


def test_a_damaged_row_group_names_its_file(tmp_path):
    pq.write_table(pa.table({"image": [noise(5000).tobytes()], "label": [1]}), tmp_path / "a.parquet")
    raw = bytearray((tmp_path / "a.parquet").read_bytes())
    raw[4:60] = b"\xff" * 56
    (tmp_path / "a.parquet").write_bytes(raw)
    with pytest.raises(ValueError, match="a.parquet, row group 0: cannot be read"):
        data.image_parquet(tmp_path / "a.parquet").example(0)


@pytest.mark.parametrize(
    "module, message", [("PIL", "pillow"), ("pyarrow", "pyarrow"), ("sklearn.datasets", "scikit-learn")]
)
def test_missing_libraries_name_the_extra(tmp_path, monkeypatch, module, message):
    (tmp_path / "a.parquet").write_bytes(b"x")
    source = data.digits()
    _digits._load.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    call = {
        "PIL": lambda: data.Pairs(source, data.Pixels(8)),
        "pyarrow": lambda: data.image_parquet(tmp_path / "a.parquet"),
        "sklearn.datasets": data.digits,
    }[module]
    with pytest.raises(ImportError, match=rf"{message}.*pip install 'rinsx\[vision\]'"):
        call()


def test_subsets():
    source = data.digits().subset([5, 3, 3])
    assert len(source) == 3 and [label for _, _, label in rows(source)] == [5, 3, 3] and source.names[5] == "five"
    assert source.place(0) == "digits(), row 5"
    assert source.fingerprint() != data.digits().subset([5, 3]).fingerprint()
    for error, wrong in (
        (IndexError, [1797]),
        (IndexError, [-1]),
        (ValueError, []),
        (ValueError, [0.5]),
        (ValueError, [[1]]),
    ):
        with pytest.raises(error):
            data.digits().subset(wrong)
