"""The handler ``text_classifier``, without torchtext."""

import re
from pathlib import Path

import torch
from ts.torch_handler.base_handler import BaseHandler
from ts.utils.util import map_class_to_label

_REPLACED = [
    (r"\'", " '  "), (r"\"", ""), (r"\.", " . "), (r"<br \/>", " "), (r",", " , "), (r"\(", " ( "),
    (r"\)", " ) "), (r"\!", " ! "), (r"\?", " ? "), (r"\;", " "), (r"\:", " "), (r"\s+", " "),
]  # fmt: skip
NGRAMS = 2


class TextClassifier(BaseHandler):
    """A classifier that uses the words of a text and its pairs of neighbouring words.

    The archive's file ``source_vocab.pt`` must contain a dict. Its keys are the words and the pairs of words,
    and its values are the token ids.
    """

    def initialize(self, context):
        """Load the model and the vocabulary."""
        super().initialize(context)
        path = Path(context.system_properties["model_dir"], "source_vocab.pt")
        found = torch.load(path, weights_only=True)
        if not isinstance(found, dict):
            raise ValueError("source_vocab.pt is not a dict: save vocab.get_stoi() with torch.save")
        self.source_vocab = found

    def preprocess(self, data):
        """Return the token ids of one text: of its words, and of its pairs of neighbouring words."""
        text = data[0].get("data") if data[0].get("data") is not None else data[0].get("body")
        text = (text.decode() if isinstance(text, (bytes, bytearray)) else str(text)).lower()
        for pattern, new in _REPLACED:
            text = re.sub(pattern, new, text)
        words = text.split()
        grams = words + [" ".join(words[at : at + NGRAMS]) for at in range(len(words) - NGRAMS + 1)]
        unknown = self.source_vocab.get("<unk>", 0)
        return torch.tensor([self.source_vocab.get(each, unknown) for each in grams], device=self.device)

    def inference(self, data, *args, **kwargs):
        """Return the model's output for one text, whose token ids are ``data``.

        The model accepts the token ids of several texts in one tensor, and the position where each text
        begins. Here, the only text begins at position 0.
        """
        return super().inference(data, torch.tensor([0], device=self.device))

    def postprocess(self, data):
        """Return the probability of each label."""
        return map_class_to_label(torch.softmax(data, dim=1).tolist(), self.mapping)
