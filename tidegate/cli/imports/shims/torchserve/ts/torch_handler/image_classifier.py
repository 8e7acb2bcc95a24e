"""The handler ``image_classifier``: the five best labels of each image."""

import torch
from ts.torch_handler.vision_handler import VisionHandler, cropped, resized, to_tensor
from ts.utils.util import map_class_to_label

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageClassifier(VisionHandler):
    """A classifier of images. As in TorchServe, images are resized to 256 pixels and cropped to 224."""

    topk = 5

    def image_processing(self, picture):
        """Return a picture as the model's input."""
        tensor = to_tensor(cropped(resized(picture, 256), 224))
        return (tensor - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]

    def set_max_result_classes(self, topk):
        """Set the number of labels of an answer."""
        self.topk = topk

    def postprocess(self, data):
        """Return the best labels with their probabilities."""
        scores = torch.softmax(data, dim=1)
        values, classes = torch.topk(scores, min(self.topk, scores.shape[1]), dim=1)
        return map_class_to_label(values.tolist(), self.mapping, classes.tolist())
