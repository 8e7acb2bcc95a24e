"""Save models with MLflow itself, each with inputs and the answers of MLflow's own python_function.

Run by the tests in an environment with mlflow: `mlflow_models.py FOLDER`.
"""

import json
import sys
import warnings
from pathlib import Path

import lightgbm
import mlflow
import numpy as np
import pandas as pd
import torch
import xgboost
from mlflow.models import infer_signature
from skl2onnx import to_onnx
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

warnings.filterwarnings("ignore")
OUT = Path(sys.argv[1])
X, Y = load_iris(return_X_y=True)
NAMES = ["a", "b", "c", "d"]
TABLE = pd.DataFrame(X, columns=NAMES)
MIXED = TABLE[["a"]].assign(city=np.where(X[:, 1] > 3, "rome", "oslo"), count=np.arange(len(X)))


class Doubled(mlflow.pyfunc.PythonModel):
    """A model of the author's own, with a file beside it."""

    def load_context(self, context):
        self.factor = json.loads(Path(context.artifacts["factor"]).read_text())

    def predict(self, context, model_input, params=None):
        return pd.DataFrame(
            {"sum": model_input.sum(axis=1) * self.factor, "kind": ["big"] * len(model_input)}
        )


def texts(array):
    """Return objects as texts, because a pickle of them would be needed otherwise."""
    return array.astype("U") if array.dtype.kind in "OUT" else array


def finish(name, data):
    """Write the inputs and MLflow's answer beside a saved model."""
    answer = mlflow.pyfunc.load_model(str(OUT / name)).predict(data)
    inputs = (
        {"input": data} if isinstance(data, np.ndarray) else {n: data[n].to_numpy() for n in data.columns}
    )
    if isinstance(answer, pd.DataFrame):
        outputs = {str(n): answer[n].to_numpy() for n in answer.columns}
    else:
        outputs = answer if isinstance(answer, dict) else {"output": np.asarray(answer)}
    plain = {f"in_{n}": texts(a) for n, a in inputs.items()}
    plain |= {
        f"out_{n}": np.asarray(a).astype("U") if np.asarray(a).dtype.kind in "OUT" else np.asarray(a)
        for n, a in outputs.items()
    }
    np.savez(OUT / f"{name}.npz", **plain)


def save(name, how, model, data, answer, **more):
    """Save a model with the signature of its data, and finish it."""
    how.save_model(model, str(OUT / name), signature=infer_signature(data, answer), **more)
    finish(name, data)


def main():
    """Save one model of each flavour."""
    from mlflow import lightgbm as as_lightgbm
    from mlflow import onnx as as_onnx
    from mlflow import pyfunc as as_pyfunc
    from mlflow import pytorch as as_pytorch
    from mlflow import sklearn as as_sklearn
    from mlflow import xgboost as as_xgboost

    held = slice(0, None, 10)
    encoder = ColumnTransformer(
        [("city", OneHotEncoder(), ["city"]), ("rest", StandardScaler(), ["a", "count"])]
    )
    pipeline = make_pipeline(encoder, LogisticRegression()).fit(MIXED, Y)
    save(
        "sklearn_table",
        as_sklearn,
        pipeline,
        MIXED[held],
        pipeline.predict(MIXED[held]),
        serialization_format="cloudpickle",
    )
    plain = LogisticRegression(max_iter=1000).fit(X, Y)
    save("sklearn_skops", as_sklearn, plain, X[held], plain.predict(X[held]), serialization_format="skops")
    booster = xgboost.train(
        {"max_depth": 3, "objective": "multi:softprob", "num_class": 3}, xgboost.DMatrix(TABLE, Y), 5
    )
    scores = booster.predict(xgboost.DMatrix(TABLE[held]))
    save(
        "xgboost",
        as_xgboost,
        booster,
        TABLE[held],
        scores,
        pip_requirements=[f"xgboost-cpu=={xgboost.__version__}"],
    )
    gbm = lightgbm.train(
        {"objective": "regression", "verbose": -1, "num_threads": 1}, lightgbm.Dataset(TABLE, Y), 10
    )
    save("lightgbm", as_lightgbm, gbm, TABLE[held], gbm.predict(TABLE[held]))
    graph = to_onnx(plain, X[:1].astype(np.float32), options={"zipmap": False})
    x = X[held].astype(np.float32)
    as_onnx.save_model(
        graph,
        str(OUT / "onnx"),
        signature=infer_signature(
            x, {"label": Y[held], "probabilities": plain.predict_proba(X[held]).astype("f4")}
        ),
    )
    finish("onnx", x)
    (OUT / "factor.json").write_text("2")
    first = TABLE[held]
    as_pyfunc.save_model(
        str(OUT / "pyfunc"), python_model=Doubled(), artifacts={"factor": str(OUT / "factor.json")},
        signature=infer_signature(first, pd.DataFrame({"sum": [1.0], "kind": ["big"]})),
    )  # fmt: skip
    finish("pyfunc", first)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).eval()
    with torch.inference_mode():
        found = net(torch.from_numpy(x)).numpy()
    save("pytorch", as_pytorch, net, x, found, serialization_format="pickle")
    save("pytorch_pt2", as_pytorch, net, x, found, serialization_format="pt2", input_example=x)


if __name__ == "__main__":
    main()
