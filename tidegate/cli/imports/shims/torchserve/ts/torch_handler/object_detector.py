"""The handler ``object_detector``: the objects of each image."""

from ts.torch_handler.vision_handler import VisionHandler, to_tensor


class ObjectDetector(VisionHandler):
    """A detector of objects. As in TorchServe, an object's score must be at least ``threshold``."""

    threshold = 0.5

    def image_processing(self, picture):
        """Return a picture as the model's input."""
        return to_tensor(picture)

    def inference(self, data, *args, **kwargs):
        """Return the objects that the model finds in each image. The images may have different sizes."""
        return super().inference(data, *args, **kwargs)

    def postprocess(self, data):
        """Return the label, the box and the score of each object."""
        found = data[1] if isinstance(data, tuple) else data  # TorchScript returns (losses, detections)
        answers = []
        for each in found:
            kept = [at for at, score in enumerate(each["scores"].tolist()) if score >= self.threshold]
            boxes, labels, scores = each["boxes"].tolist(), each["labels"].tolist(), each["scores"].tolist()
            answers.append([{self._name(labels[at]): boxes[at], "score": scores[at]} for at in kept])
        return answers

    def _name(self, number):
        if self.mapping is None:
            return str(number)
        return self.mapping[number] if isinstance(self.mapping, list) else self.mapping[str(number)]
