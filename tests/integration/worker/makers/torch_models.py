"""Save programs of torch.export and an archive for TorchServe, with torch's own answers.

Run by the tests in an environment with torch and pillow: `torch_models.py FOLDER`.
"""

import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

OUT = Path(sys.argv[1])
MEAN, STD = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))


class Net(torch.nn.Module):
    """Two inputs, and a dict of two outputs."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))

    def forward(self, x, scale):
        """Return the outputs by name."""
        return {"y": self.layers(x) * scale, "size": x.abs().sum(dim=1)}


class Pictures(torch.nn.Module):
    """A small classifier of images."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 5, stride=4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(), torch.nn.Linear(8, 3),
        )  # fmt: skip

    def forward(self, x):
        """Return a score for each label."""
        return self.layers(x)


WORDS = """
import torch

class Words(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = torch.nn.EmbeddingBag(6, 4)
        self.layer = torch.nn.Linear(4, 2)

    def forward(self, text, offsets):
        return self.layer(self.bag(text, offsets))
"""
BOXES = """
import torch

class Boxes(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, images):
        found = []
        for image in images:
            height, width = image.shape[1:]
            boxes = torch.tensor([[0.0, 0.0, width * 1.0, height * 1.0], [1.0, 1.0, 2.0, 2.0]]) * self.scale
            found.append({"boxes": boxes, "labels": torch.tensor([1, 2]), "scores": torch.tensor([0.9, 0.1])})
        return found
"""


def mar(name, handler, files, **model):
    """Write an archive as torch-model-archiver does."""
    manifest = {
        "createdOn": "29/11/2026 21:00:00", "runtime": "python", "archiverVersion": "0.12.0",
        "model": {"modelName": name, "handler": handler, "modelVersion": "1.0", **model},
    }  # fmt: skip
    with zipfile.ZipFile(OUT / f"{name}.mar", "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        for path, data in files.items():
            archive.writestr(path, data)


def saved(value):
    """Return what torch.save writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def made(source, name):
    """Return an instance of the class in a model file."""
    found = {}
    exec(source, found)
    return found[name]().eval()


def words():
    """Write an archive with the built-in handler of texts, a model file and its weights."""
    net = made(WORDS, "Words")
    vocabulary = {"<unk>": 0, "good": 1, "bad": 2, "film": 3, "good film": 4, ".": 5}
    files = {
        "words.py": WORDS, "words.pth": saved(net.state_dict()), "source_vocab.pt": saved(vocabulary),
        "index_to_name.json": json.dumps({"0": "negative", "1": "positive"}),
    }  # fmt: skip
    mar("words", "text_classifier", files, modelFile="words.py", serializedFile="words.pth")
    # "Good film." has the words good, film and ., and the pairs "good film" and "film .".
    with torch.inference_mode():
        scores = torch.softmax(net(torch.tensor([1, 3, 5, 4, 0]), torch.tensor([0])), dim=1)[0].tolist()
    (OUT / "words.json").write_text(json.dumps(dict(zip(("negative", "positive"), scores, strict=True))))


def boxes():
    """Write an archive with the built-in handler of objects."""
    net = made(BOXES, "Boxes")
    files = {
        "boxes.py": BOXES,
        "boxes.pth": saved(net.state_dict()),
        "index_to_name.json": '{"1": "cat", "2": "dog"}',
    }
    mar("boxes", "object_detector", files, modelFile="boxes.py", serializedFile="boxes.pth")
    (OUT / "boxes.json").write_text(json.dumps([{"cat": [0.0, 0.0, 200.0, 150.0], "score": 0.9}]))


def programs():
    """Save a program with an open batch axis, and one with fixed sizes."""
    net, x, scale = Net().eval(), torch.randn(5, 8), torch.rand(5, 1)
    batch = torch.export.Dim("batch")
    shapes = {"x": {0: batch}, "scale": {0: batch}}
    torch.export.save(torch.export.export(net, (x, scale), dynamic_shapes=shapes), OUT / "open.pt2")
    torch.export.save(torch.export.export(net, (x, scale)), OUT / "fixed.pt2")
    with torch.inference_mode():
        y = net(x, scale)
    np.savez(
        OUT / "programs.npz",
        x=x.numpy(),
        scale=scale.numpy(),
        **{key: each.numpy() for key, each in y.items()},
    )


def archive():
    """Write an archive as torch-model-archiver does, with the built-in handler of images."""
    net = Pictures().eval()
    weights = io.BytesIO()
    torch.jit.save(torch.jit.script(net), weights)
    labels = {"0": ["n1", "cat"], "1": ["n2", "dog"], "2": ["n3", "fish"]}
    files = {"net.pt": weights.getvalue(), "index_to_name.json": json.dumps(labels)}
    mar("pictures", "image_classifier", files, serializedFile="net.pt")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8))
    picture.save(OUT / "picture.png")
    # As torchvision's Resize(256), CenterCrop(224), ToTensor and Normalize do.
    small = picture.resize((341, 256), Image.BILINEAR).crop((58, 16, 282, 240))
    pixels = torch.from_numpy(np.asarray(small, dtype=np.float32).transpose(2, 0, 1).copy()) / 255
    with torch.inference_mode():
        scores = torch.softmax(net(((pixels - MEAN[:, None, None]) / STD[:, None, None])[None]), dim=1)[0]
    expected = dict(zip(("cat", "dog", "fish"), scores.tolist(), strict=True))
    (OUT / "pictures.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    torch.manual_seed(0)
    programs()
    archive()
    words()
    boxes()
