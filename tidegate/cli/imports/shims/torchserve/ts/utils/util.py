"""Functions that handlers import from TorchServe."""

import json
from pathlib import Path


def load_label_mapping(path):
    """Return the labels in index_to_name.json; None without this file."""
    file = Path(path)
    if not file.is_file():
        return None
    found = json.loads(file.read_text())
    return found.get("object_type_names", found) if isinstance(found, dict) else found


def map_class_to_label(probs, mapping=None, lbl_classes=None):
    """Return a list with one dict for each row. The dict contains the row's probabilities by label."""
    classes = lbl_classes or [[str(at) for at in range(len(row))] for row in probs]
    return [
        {_label(mapping, name): value for name, value in zip(names, row)}  # noqa: B905
        for names, row in zip(classes, probs)  # noqa: B905
    ]


def _label(mapping, number):
    if mapping is None:
        return str(number)
    found = mapping[int(number)] if isinstance(mapping, list) else mapping[str(number)]
    return found[-1] if isinstance(found, list) else found
