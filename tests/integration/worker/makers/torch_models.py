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
    manifest = {
        "createdOn": "29/11/2026 21:00:00", "runtime": "python", "archiverVersion": "0.12.0",
        "model": {
            "modelName": "pictures", "serializedFile": "net.pt", "handler": "image_classifier",
            "modelVersion": "1.0",
        },
    }  # fmt: skip
    with zipfile.ZipFile(OUT / "pictures.mar", "w") as mar:
        mar.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        mar.writestr("net.pt", weights.getvalue())
        mar.writestr(
            "index_to_name.json", json.dumps({"0": ["n1", "cat"], "1": ["n2", "dog"], "2": ["n3", "fish"]})
        )
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8))
    picture.save(OUT / "picture.png")
    # As torchvision's Resize(256), CenterCrop(224), ToTensor and Normalize do.
    small = picture.resize((341, 256), Image.BILINEAR).crop((58, 16, 282, 240))
    pixels = torch.from_numpy(np.asarray(small, dtype=np.float32).transpose(2, 0, 1).copy()) / 255
    with torch.inference_mode():
        scores = torch.softmax(net(((pixels - MEAN[:, None, None]) / STD[:, None, None])[None]), dim=1)[0]
    expected = dict(zip(("cat", "dog", "fish"), scores.tolist(), strict=True))
    (OUT / "picture.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    torch.manual_seed(0)
    programs()
    archive()
