"""Writes the records of what the transformers library computes, for tests on machines without it:

    python tests/golden/make.py

It needs torch and transformers, whose versions the records name. The weights are not stored: each array is a formula of its name and
its shape.
"""

import datetime
import hashlib
import json
import math
import pathlib
import tempfile

import numpy as np


HERE = pathlib.Path(__file__).parent
LAYERS = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 16, "intermediate_size": 40}
IMAGE = {**LAYERS, "image_size": 24, "patch_size": 8}
TEXT = {**LAYERS, "num_hidden_layers": 2, "num_attention_heads": 3, "hidden_size": 24, "intermediate_size": 20}
TEXT |= {
    "projection_size": 16,
    "vocab_size": 50,
    "max_position_embeddings": 8,
    "bos_token_id": None,
    "eos_token_id": None,
}
ROWS = 3


def uniform(name, shape):
    """Numbers in [-1, 1), exact in float32, of a generator whose bits no version of NumPy changes."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    bits = np.random.PCG64(seed).random_raw(math.prod(shape))
    return ((bits >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)).reshape(shape)


def weight(name, shape):
    """An array of a checkpoint: none is zero or one, as many are when a model is made."""
    if len(shape) == 1:
        norm = "norm" in name and name.endswith("weight")
        return uniform(name, shape) / np.float32(2) + np.float32(norm)
    return uniform(name, shape) * np.float32(1.7 * math.prod(shape[1:]) ** -0.5)


def images(size):
    return uniform("images", (ROWS, size, size, 3))


def tokens(vocab, context):
    return ((uniform("tokens", (ROWS, context)) + 1) / 2 * vocab).astype(np.int32)


def fill(model):
    """Sets the weights of a model of torch."""
    import torch

    with torch.no_grad():
        for name, array in model.state_dict().items():
            array.copy_(torch.from_numpy(weight(name, tuple(array.shape))))
    return model.eval()


def outputs(model, images, texts=None):
    """What a model of torch makes of images and texts, as NumPy arrays."""
    import torch

    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        if texts is not None:
            out = model(pixel_values=pixels, input_ids=torch.from_numpy(texts).long())
            found = {"images": out.image_embeds, "texts": out.text_embeds, "logits": out.logits_per_image}
            # As they are before they are divided by their lengths.
            found["image_features"] = out.vision_model_output.pooler_output
            found["text_features"] = out.text_model_output.pooler_output
        else:
            out = model(pixel_values=pixels)
            if "logits" in out:
                found = {"logits": out.logits}
            else:
                pooled = out.last_hidden_state[:, 0] if out.pooler_output is None else out.pooler_output
                found = {"pooled": pooled, "hidden": out.last_hidden_state}
    return {name: array.numpy() for name, array in found.items()}


def record(model, images, texts=None):
    from safetensors import safe_open

    # The weights are set by the names that are saved, which are not those in memory.
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        model.save_pretrained(path)
        with safe_open(path / "model.safetensors", "numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
        write(path, shapes)
        options = {"add_pooling_layer": False} if type(model).__name__ == "ViTModel" else {}
        model = type(model).from_pretrained(path, **options).eval()
        config = json.loads((path / "config.json").read_text())
    numbers = {name: [f"{x:.7g}" for x in out.ravel()] for name, out in outputs(model, images, texts).items()}
    return {"config": config, "shapes": shapes, "outputs": {name: " ".join(out) for name, out in numbers.items()}}


def write(folder, shapes):
    """The file of the weights."""
    from safetensors.numpy import save_file

    arrays = {name: weight(name, tuple(shape)) for name, shape in shapes.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})


def main():
    import torch
    import transformers

    made = {
        "siglip": transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=IMAGE)),
        "siglip_vision": transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**IMAGE)),
        "vit": transformers.ViTModel(transformers.ViTConfig(**IMAGE), add_pooling_layer=False),
        "vit_classes": transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE, num_labels=5)),
    }
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions["date"] = datetime.date.today().isoformat()
    for file in ("siglip", "vit"):
        records = {
            name: record(model, images(IMAGE["image_size"]), tokens(50, 8) if name == "siglip" else None)
            for name, model in made.items()
            if name.startswith(file)
        }
        # A line for each entry of a record.
        lines = [
            f"  {json.dumps(name)}: {{\n"
            + ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
            + "\n  }"
            for name, record in records.items()
        ]
        text = ",\n".join([f'  "versions": {json.dumps(versions)}', *lines])
        (HERE / f"{file}.json").write_text(f"{{\n{text}\n}}\n")


if __name__ == "__main__":
    main()
