"""Weights of transformers: what it computes with them we compute too, and they go back bit for bit.

transformers itself is asked where it is installed. Where it is not, records of its answers are: see `tests/golden/make.py`.
"""

import dataclasses
import json
import math
import pathlib
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import rinsx as rx

from .golden import make


GOLDEN = pathlib.Path(__file__).parent / "golden"
RECORDS = {
    name: record
    for file in ("siglip", "vit")
    for name, record in json.loads((GOLDEN / f"{file}.json").read_text()).items()
    if name != "versions"
}
SIZE, VOCAB, CONTEXT = make.IMAGE["image_size"], make.TEXT["vocab_size"], make.TEXT["max_position_embeddings"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of each record."""
    found = {}
    for name, record in RECORDS.items():
        found[name] = tmp_path_factory.mktemp(name)
        (found[name] / "config.json").write_text(json.dumps(record["config"]))
        make.write(found[name], record["shapes"])
    return found


@pytest.fixture
def copy(folders, tmp_path):
    """Copies a folder, its arrays and its configuration changed on the way."""

    def copied(name, arrays=lambda arrays: arrays, **config):
        given = json.loads((folders[name] / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**given, **config}))
        save_file(arrays(load_file(folders[name] / "model.safetensors")), tmp_path / "model.safetensors")
        return tmp_path

    return copied


def build(config, signature="A", split=None, **loops):
    key = jr.key(0)
    if isinstance(config, rx.models.ViTConfig):
        return rx.models.ViT(config, signature, split=split, key=key, **loops)
    image = rx.models.ViT(config.image, signature, split=split, key=key, **loops)
    return rx.models.SigLIP(image, rx.models.TextEncoder(config.text, "C D", key=key))


def shapes(config, *args, **kwargs):
    return eqx.filter_eval_shape(lambda: build(config, *args, **kwargs))


def opened(folder, *args, **kwargs):
    return rx.pretrained.load(shapes(rx.pretrained.config(folder), *args, **kwargs), folder)


def answers(model, images=None, texts=None):
    images = jnp.asarray(make.images(SIZE) if images is None else images)
    if isinstance(model, rx.models.SigLIP):
        texts = jnp.asarray(texts)
        found = {"images": model.embed_images(images), "texts": model.embed_texts(texts)}
        found |= {"image_features": model.image(images), "text_features": model.text(texts)}
        return {**found, "logits": model(images, texts)}
    if model.head is not None:
        return {"logits": model(images)}
    return {"pooled": model(images), "hidden": model.hidden(images)}


def close(found, wanted, atol=1e-4):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert np.abs(wanted[name]).max() > 0.1
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=atol, err_msg=name)


def same_arrays(one, other, rename=lambda name: name):
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    other = {rename(name): array for name, array in other.items()}
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name].shape, one[name].dtype) == (other[name].shape, other[name].dtype)
        assert one[name].tobytes() == other[name].tobytes(), name


# Without transformers


@pytest.mark.parametrize("name", RECORDS)
def test_recorded_outputs(name, folders, tmp_path):
    model = opened(folders[name])
    found = answers(model, texts=make.tokens(VOCAB, CONTEXT))
    recorded = RECORDS[name]["outputs"]
    close(found, {key: np.array(text.split(), np.float32).reshape(found[key].shape) for key, text in recorded.items()})

    rx.pretrained.save(model, tmp_path / "new")
    # Version 4 of transformers reads this name only, version 5 both.
    strip = lambda text: text.removeprefix("vision_model.") if name == "siglip_vision" else text
    same_arrays(folders[name], tmp_path / "new", strip)
    assert rx.pretrained.config(tmp_path / "new") == rx.pretrained.config(folders[name])
    assert eqx.tree_equal(opened(tmp_path / "new"), model)
    # transformers reads the same from what we wrote, and it wrote all of that itself.
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    theirs = RECORDS[name]["config"]
    assert written.items() <= theirs.items() or all(
        written[key].items() <= theirs[key].items() for key in ("vision_config", "text_config")
    )


@pytest.mark.parametrize("start", ["", "vit.", "vision_model."])
def test_the_prefix_of_names_is_found(start, copy):
    name = "vit" if start == "vit." else "siglip_vision"
    model = opened(copy(name))
    prefixed = lambda arrays: {start + key: array for key, array in arrays.items()}
    assert eqx.tree_equal(opened(copy(name, prefixed)), model)


def vit(arrays, images, order, heads=4):
    """The hidden states of a ViT by its arrays in transformers' layout, its layers run in an order."""

    def linear(name, x):
        return x @ arrays[f"{name}.weight"].T + arrays[f"{name}.bias"]

    def norm(name, x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-12) * arrays[f"{name}.weight"] + arrays[f"{name}.bias"]

    kernel = arrays["embeddings.patch_embeddings.projection.weight"].astype(np.float64)
    size = kernel.shape[-1]
    rows = [
        np.einsum("brsc,dcrs->bd", images[:, i : i + size, j : j + size], kernel)
        for i in range(0, images.shape[1], size)
        for j in range(0, images.shape[2], size)
    ]
    x = np.stack(rows, 1) + arrays["embeddings.patch_embeddings.projection.bias"]
    first = np.broadcast_to(arrays["embeddings.cls_token"], (len(x), 1, x.shape[-1]))
    x = np.concatenate([first, x], 1) + arrays["embeddings.position_embeddings"]
    erf = np.vectorize(math.erf)
    for i in order:
        name = f"encoder.layer.{i}"
        y = norm(f"{name}.layernorm_before", x)
        q, k, v = (
            linear(f"{name}.attention.attention.{part}", y).reshape(*y.shape[:2], heads, -1)
            for part in ("query", "key", "value")
        )
        logits = np.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        scores = np.exp(logits - logits.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        out = np.einsum("bhqk,bkhd->bqhd", scores, v).reshape(y.shape)
        x = x + linear(f"{name}.attention.output.dense", out)
        y = linear(f"{name}.intermediate.dense", norm(f"{name}.layernorm_after", x))
        x = x + linear(f"{name}.output.dense", y * (1 + erf(y / np.sqrt(2))) / 2)
    return norm("layernorm", x)


def test_layers_are_numbered_over_the_blocks(folders):
    arrays, images = load_file(folders["vit"] / "model.safetensors"), make.images(SIZE)
    plain = opened(folders["vit"], "A B C")
    model = opened(folders["vit"], "A^r B", split=(2, 1), r=1)
    found = {r: rx.with_rounds(model, r=r).hidden(jnp.asarray(images)) for r in (1, 2)}
    np.testing.assert_allclose(found[1], plain.hidden(jnp.asarray(images)), atol=1e-5)
    np.testing.assert_allclose(found[1], vit(arrays, images, [0, 1, 2]), atol=1e-4)
    np.testing.assert_allclose(found[2], vit(arrays, images, [0, 1, 0, 1, 2]), atol=1e-4)
    assert np.abs(found[2] - found[1]).max() > 0.1
    # The first block that is visited has the first layers, whatever its name is.
    other = opened(folders["vit"], "B^r A", split=(2, 1), r=2)
    np.testing.assert_allclose(found[2], other.hidden(jnp.asarray(images)), atol=1e-5)


def test_both_towers_recur(folders):
    config = rx.pretrained.config(folders["siglip"])
    image = rx.models.ViT(config.image, "A^r B", split=(1, 2), r=rx.Loop(1, max=3), key=jr.key(0))
    text = rx.models.TextEncoder(config.text, "A B^s", s=1, key=jr.key(0))
    deep = rx.pretrained.load(rx.models.SigLIP(image, text), folders["siglip"])
    plain = opened(folders["siglip"])
    texts = make.tokens(VOCAB, CONTEXT)
    close(answers(deep, texts=texts), answers(plain, texts=texts), 1e-5)
    more = answers(rx.with_rounds(deep, r=2, s=2), texts=texts)
    assert np.abs(more["images"] - answers(plain, texts=texts)["images"]).max() > 1e-2
    assert np.abs(more["texts"] - answers(plain, texts=texts)["texts"]).max() > 1e-2


def test_adapters_stay(folders):
    config = rx.pretrained.config(folders["vit"])
    adapter = rx.adapters.NormLinear(config.width, rounds=2, key=jr.key(1))
    adapter = jax.tree.map(lambda x: x + 0.25 if eqx.is_inexact_array(x) else x, adapter)
    loop = rx.Loop(2, adapter=adapter)
    model = rx.pretrained.load(build(config, "A^r B", split=(1, 2), r=loop), folders["vit"])
    assert eqx.tree_equal(model.encoder.body.loops["r"].adapter, adapter)
    with pytest.raises(ValueError, match=r"shapes only: encoder\.body\.loops\.r\.adapter"):
        rx.pretrained.load(shapes(config, "A^r B", split=(1, 2), r=loop), folders["vit"])


@pytest.mark.parametrize("name", RECORDS)
def test_shapes_are_enough(name, folders):
    config = rx.pretrained.config(folders[name])
    made, shaped = build(config, "A B C"), shapes(config, "A B C")
    model = rx.pretrained.load(shaped, folders[name])
    assert eqx.tree_equal(model, rx.pretrained.load(made, folders[name]))
    assert jax.tree.structure(model) == jax.tree.structure(made)
    kinds = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree) if hasattr(x, "shape")]
    assert kinds(model) == kinds(made)
    # Nothing of what was there before is left.
    assert not any(
        eqx.tree_equal(x, y) for x, y in zip(jax.tree.leaves(made), jax.tree.leaves(model)) if eqx.is_array(x)
    )


def test_arrays_stay_on_their_devices(folders):
    model = build(rx.pretrained.config(folders["vit"]), "A B C")
    sharding = jax.NamedSharding(jax.make_mesh((8,), ("x",)), jax.P("x"))
    where = lambda model: model.patches.weight
    model = eqx.tree_at(where, model, jax.device_put(where(model), sharding))
    assert where(rx.pretrained.load(model, folders["vit"])).sharding == sharding


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_floats(dtype, copy):
    rounded = lambda arrays: {name: np.asarray(jnp.asarray(array, dtype)) for name, array in arrays.items()}
    model = opened(copy("vit_classes", rounded))
    exact = opened(copy("vit_classes"))
    expected = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32) if eqx.is_array(x) else x, exact)
    assert eqx.tree_equal(model, expected) and not eqx.tree_equal(model, exact)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(model) if eqx.is_array(x))


def test_several_files(copy, folders):
    folder = copy("siglip")
    arrays = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(sorted(arrays))}
    for file in set(names.values()):
        save_file({name: arrays[name] for name in arrays if names[name] == file}, folder / file)
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor model.safetensors.index.json"):
        opened(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert eqx.tree_equal(opened(folder), opened(folders["siglip"]))


# What does not fit


def test_names_and_shapes_that_do_not_fit(copy, folders):
    def changed(arrays):
        del arrays["encoder.layer.1.output.dense.bias"]
        arrays["layernorm.weight"] = np.ones(17, np.float32)
        arrays["extra"] = np.ones((2, 3), np.float32)
        arrays["layernorm.bias"] = np.zeros(16, np.int32)
        return arrays

    with pytest.raises(ValueError) as error:
        opened(copy("vit", changed))
    text = str(error.value)
    assert "missing in the folder (1):\n    encoder.layer.1.output.dense.bias [16]" in text
    assert "left over in the folder (1):\n    extra [2, 3]" in text
    assert "of another shape (1):\n    layernorm.weight: [17] in the folder, [16] in the model" in text
    assert "nor float16 (1):\n    layernorm.bias: I32" in text


@pytest.mark.parametrize(
    ("change", "message"), [(1, "missing in the folder (16)"), (-1, "left over in the folder (16)")]
)
def test_another_number_of_layers(change, message, folders):
    config = rx.pretrained.config(folders["vit"])
    model = shapes(dataclasses.replace(config, layers=config.layers + change))
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        rx.pretrained.load(model, folders["vit"])


def test_long_lists_are_cut(folders):
    model = shapes(rx.pretrained.config(folders["vit"]))
    with pytest.raises(ValueError, match=r"missing in the folder \(\d+\):(\n    .*){20}\n    and \d+ more"):
        rx.pretrained.load(model, folders["siglip_vision"])


@pytest.mark.parametrize(
    ("name", "other"),
    [("heads", 8), ("epsilon", 1e-6), ("mlp", "gelu")],
)
def test_settings_that_no_shape_shows(name, other, folders):
    config = rx.pretrained.config(folders["vit"])
    with pytest.raises(ValueError, match=f"has {name}={getattr(config, name)!r}, and the model {name}={other!r}"):
        rx.pretrained.load(shapes(dataclasses.replace(config, **{name: other})), folders["vit"])


def test_what_is_left_out_is_named(copy, folders):
    pooler = {"pooler.dense.weight": np.ones((16, 16), np.float32), "pooler.dense.bias": np.ones(16, np.float32)}
    folder = copy("vit", lambda arrays: arrays | pooler)
    with pytest.raises(ValueError, match="left over"):
        opened(folder)
    model = shapes(rx.pretrained.config(folder))
    assert eqx.tree_equal(rx.pretrained.load(model, folder, ignore=["pooler."]), opened(folders["vit"]))
    with pytest.raises(ValueError, match="begins with 'poller.'"):
        rx.pretrained.load(model, folder, ignore=["pooler.", "poller."])
    with pytest.raises(TypeError, match="sequence"):
        rx.pretrained.load(model, folder, ignore="pooler.")


def test_the_image_tower_of_a_whole_model(folders):
    model = shapes(rx.pretrained.config(folders["siglip"]).image)
    image = rx.pretrained.load(model, folders["siglip"], ignore=("text_model.", "logit_"))
    assert eqx.tree_equal(image, opened(folders["siglip"]).image)


def test_a_model_of_another_kind(folders):
    with pytest.raises(ValueError, match="holds no SigLIP"):
        rx.pretrained.load(shapes(rx.pretrained.config(folders["siglip"])), folders["vit"])
    with pytest.raises(ValueError, match="missing in the folder"):
        rx.pretrained.load(shapes(rx.pretrained.config(folders["vit"])), folders["siglip_vision"])
    with pytest.raises(TypeError, match="DecoderLM"):
        rx.pretrained.save(rx.models.DecoderLM(rx.models.presets["nano"], key=jr.key(0)), "nowhere")
    siglip = shapes(rx.pretrained.config(folders["siglip"]))
    with pytest.raises(TypeError, match=r"`text` must be a rx.models.TextEncoder; got"):
        rx.pretrained.load(eqx.tree_at(lambda model: model.text, siglip, lambda tokens: tokens), folders["siglip"])


# Configurations


def test_what_a_configuration_leaves_out(tmp_path):
    path = tmp_path / "config.json"
    # The shape of google/siglip-base-patch16-224 is that of the defaults.
    path.write_text(json.dumps({"model_type": "siglip", "text_config": {}, "vision_config": None}))
    assert rx.pretrained.config(tmp_path, dtype="bfloat16") == rx.models.siglip_presets["B/16"]
    path.write_text(json.dumps({"model_type": "siglip_vision_model", "image_size": 384, "patch_size": [14, 14]}))
    config = dataclasses.replace(rx.models.vit_presets["B/16"], dtype="float32", patch=14, size=378)
    assert rx.pretrained.config(tmp_path) == config
    path.write_text(json.dumps({"model_type": "vit", "image_size": [224, 256]}))
    config = dataclasses.replace(rx.models.vit_presets["B/16"], dtype="float32", pool="first", epsilon=1e-12)
    config = dataclasses.replace(config, mlp="gelu_exact", size=(224, 256))
    assert rx.pretrained.config(tmp_path) == config
    classes = {"architectures": ["ViTForImageClassification"], "model_type": "vit", "image_size": [224, 256]}
    for labels, number in (({}, 2), ({"num_labels": 7}, 7), ({"id2label": {"0": "cat", "1": "dog", "2": "cow"}}, 3)):
        path.write_text(json.dumps({**classes, **labels}))
        assert rx.pretrained.config(tmp_path) == dataclasses.replace(config, classes=number)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model_type": "clip"}, "`model_type` must be one of siglip, siglip_vision_model, vit .* got 'clip'"),
        ({}, "`model_type` .* got None"),
        ({"model_type": "siglip", "architectures": ["SiglipForImageClassification"]}, "`architectures` .* SiglipModel"),
        ({"model_type": "vit", "architectures": ["ViTForMaskedImageModeling"]}, "`architectures`"),
        ({"model_type": "siglip", "text_config": {"hidden_act": "relu"}}, "text_config: `hidden_act` .* got 'relu'"),
        ({"model_type": "siglip", "vision_config": {"hidden_act": "quick_gelu"}}, "vision_config: `hidden_act`"),
        ({"model_type": "siglip_vision_model", "vision_use_head": False}, "`vision_use_head` must be one of True"),
        ({"model_type": "siglip_vision_model", "image_size": [224, 256]}, r"`image_size` .* square.* \[224, 256\]"),
        ({"model_type": "vit", "patch_size": [16, 8]}, r"`patch_size` .* square; got \[16, 8\]"),
        ({"model_type": "vit", "image_size": [16, 8, 3]}, "`image_size` must be a number, or height and width"),
        ({"model_type": "vit", "qkv_bias": False}, "`qkv_bias`"),
        ({"model_type": "vit", "head_dim": 32}, "`head_dim` must be one of 64"),
        (
            {"model_type": "siglip", "text_config": {"hidden_size": 384, "num_attention_heads": 6}},
            "vectors of one size",
        ),
    ],
)
def test_configurations_that_are_refused(given, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(given))
    with pytest.raises(ValueError, match=message):
        rx.pretrained.config(tmp_path)


def test_no_configuration(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        rx.pretrained.config(tmp_path)


NANO = rx.models.vit_presets["nano"]
TEXT = rx.models.siglip_presets["nano"].text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"positions": "sincos"}, "positions='sincos'"),
        ({"pool": "mean"}, "pool='mean'"),
        ({"classes": 3}, "classes=3"),
        ({"mlp": "swiglu"}, "mlp='swiglu'"),
        ({"size": (32, 16)}, r"size=\(32, 16\)"),
    ],
)
def test_shapes_that_transformers_has_not(config, message, tmp_path):
    model = shapes(dataclasses.replace(NANO, **config))
    for call in (rx.pretrained.load, rx.pretrained.save):
        with pytest.raises(ValueError, match=message):
            call(model, tmp_path)
    text = rx.models.TextEncoder(dataclasses.replace(TEXT, outputs=3 if "classes" in config else None), key=jr.key(0))
    with pytest.raises(ValueError, match=message):
        rx.pretrained.save(rx.models.SigLIP(model, text), tmp_path)


def test_texts_that_transformers_has_not(tmp_path):
    text = rx.models.TextEncoder(dataclasses.replace(TEXT, pool="mean"), key=jr.key(0))
    with pytest.raises(ValueError, match="pool='mean'"):
        rx.pretrained.save(rx.models.SigLIP(rx.models.ViT(NANO, key=jr.key(0)), text), tmp_path)


def test_sizes_that_are_no_square(tmp_path):
    model = build(dataclasses.replace(NANO, size=(16, 32), pool="first", classes=4), "A B")
    rx.pretrained.save(model, tmp_path)
    assert eqx.tree_equal(opened(tmp_path, "A B"), model)


def test_without_safetensors(folders, monkeypatch):
    model = opened(folders["vit"])
    for module in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, module, None)
    for call in (rx.pretrained.load, rx.pretrained.save):
        with pytest.raises(ImportError, match=r"rx.pretrained.\w+ needs safetensors: pip install 'rinsx\[vision\]'"):
            call(model, folders["vit"])


# What has no place in transformers


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        (lambda: rx.Loop(1, adapter=rx.adapters.NormLinear(16, rounds=2, key=jr.key(1))), "adapter=NormLinear"),
        (lambda: rx.Loop(1, inject=rx.injection.Concat(16, key=jr.key(1))), "inject=Concat"),
        (lambda: rx.Loop(1, start=rx.start.Normal()), "start=Normal"),
        (lambda: 2, r"has r=2: save rx.with_rounds\(model, r=1\)"),
        (lambda: rx.Loop(jnp.asarray(1), max=3), r"save rx.with_rounds\(model, r=1\)"),
    ],
)
def test_recursion_is_not_saved(loop, message, folders, tmp_path):
    model = build(rx.pretrained.config(folders["vit"]), "A^r B", split=(1, 2), r=loop())
    with pytest.raises(ValueError, match=message):
        rx.pretrained.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("signature", ["A^2 B C", "A B C A"])
def test_fixed_repetitions_are_not_saved(signature, folders, tmp_path):
    model = opened(folders["vit"], signature)
    with pytest.raises(ValueError, match="visits A more than once"):
        rx.pretrained.save(model, tmp_path)


def test_one_round_is_saved(folders, tmp_path):
    model = opened(folders["siglip"], "A^r B", split=(2, 1), r=3)
    with pytest.raises(ValueError, match="r=3 of `image`"):
        rx.pretrained.save(model, tmp_path)
    rx.pretrained.save(rx.with_rounds(model, r=1), tmp_path)
    same_arrays(folders["siglip"], tmp_path)


def test_weights_that_are_no_float32_are_not_saved(folders, tmp_path):
    model = shapes(rx.pretrained.config(folders["vit"]))
    with pytest.raises(ValueError, match="must be float32 to be saved; patches.weight is ShapeDtypeStruct"):
        rx.pretrained.save(model, tmp_path)
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_array(x) else x, opened(folders["vit"]))
    with pytest.raises(ValueError, match="must be float32"):
        rx.pretrained.save(model, tmp_path)


# With transformers


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


WIDE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 88}
PIXELS = {**WIDE, "image_size": 24, "patch_size": 8}
LIVE = {
    "SiglipModel": lambda t: t.SiglipConfig(
        vision_config=PIXELS, text_config={**WIDE, "vocab_size": 50, "max_position_embeddings": 8}
    ),
    # The last 3 rows and columns of its images are in no patch.
    "SiglipVisionModel": lambda t: t.SiglipVisionConfig(**{**PIXELS, "image_size": 27}),
    "ViTForImageClassification": lambda t: t.ViTConfig(**PIXELS, num_labels=7),
    "ViTModel": lambda t: t.ViTConfig(**{**PIXELS, "hidden_act": "gelu_pytorch_tanh"}),
}


# What transformers and torch warn of is theirs.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", LIVE)
def test_transformers(name, transformers, tmp_path):
    options = {"add_pooling_layer": False} if name == "ViTModel" else {}
    kind = getattr(transformers, name)
    theirs = make.fill(kind(LIVE[name](transformers), **options))
    theirs.save_pretrained(tmp_path / "theirs")
    size = 27 if name == "SiglipVisionModel" else 24
    texts = make.tokens(50, 8) if name == "SiglipModel" else None
    wanted = make.outputs(theirs, make.images(size), texts)

    model = opened(tmp_path / "theirs", "A^r B", split=(2, 2), r=1)
    images = make.images(size)[:, :24, :24]
    found = answers(model, images, texts)
    close(found, wanted)
    print(name, {key: float(np.abs(found[key] - wanted[key]).max()) for key in wanted})

    rx.pretrained.save(model, tmp_path / "ours")
    again, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    one, other = theirs.state_dict(), again.state_dict()
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].numpy().tobytes() == other[key].numpy().tobytes(), key
    assert rx.pretrained.config(tmp_path / "ours") == rx.pretrained.config(tmp_path / "theirs")
    # So transformers has read what we wrote of the configuration as it was.
    close(make.outputs(again.eval(), images, texts), wanted, 1e-5)
