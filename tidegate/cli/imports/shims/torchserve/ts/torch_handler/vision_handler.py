"""The base class of handlers for images. It does not need torchvision."""

import base64
import io

import numpy as np
import torch
from PIL import Image
from ts.torch_handler.base_handler import BaseHandler

MAX_PIXELS = 50_000_000


class VisionHandler(BaseHandler):
    """A handler that decodes images, and applies ``image_processing`` to each."""

    image_processing = None

    def preprocess(self, data):
        """Return the images as one tensor."""
        images = []
        for row in data:
            image = row.get("data") if row.get("data") is not None else row.get("body")
            if isinstance(image, str):
                image = base64.b64decode(image)
            if isinstance(image, (bytes, bytearray)):
                images.append(self.image_processing(opened(image)))
            else:
                images.append(torch.as_tensor(image, dtype=torch.float32))
        return torch.stack(images).to(self.device)


def opened(data):
    """Decode an image into an RGB picture. Raise ValueError for an image with too many pixels."""
    picture = Image.open(io.BytesIO(data))
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(
            f"the image has {picture.width} x {picture.height} pixels; the limit is {MAX_PIXELS} pixels"
        )
    return picture.convert("RGB")


def to_tensor(picture):
    """Return a picture as a tensor of channels, height and width, with values from 0 to 1."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32).transpose(2, 0, 1).copy() / np.float32(255))


def resized(picture, shortest):
    """Resize a picture so that its shorter side has ``shortest`` pixels, as torchvision's Resize does."""
    width, height = picture.size
    if width <= height:
        return picture.resize((shortest, int(shortest * height / width)), Image.BILINEAR)
    return picture.resize((int(shortest * width / height), shortest), Image.BILINEAR)


def cropped(picture, side):
    """Return a square of ``side`` pixels from a picture's middle, as torchvision's CenterCrop does."""
    left, top = round((picture.width - side) / 2), round((picture.height - side) / 2)
    return picture.crop((left, top, left + side, top + side))
