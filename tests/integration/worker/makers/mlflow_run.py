"""Log a model to a tracking server, as a training does: `mlflow_run.py ADDRESS`. Prints the ids as JSON."""

import json
import sys

import mlflow
import numpy as np
from mlflow import sklearn as as_sklearn
from mlflow.models import infer_signature
from sklearn.linear_model import LogisticRegression


def main():
    """Log and register one model, with an alias."""
    mlflow.set_tracking_uri(sys.argv[1])
    mlflow.set_experiment("flowers")
    x, y = np.random.default_rng(0).normal(size=(40, 4)), np.arange(40) % 2
    model = LogisticRegression().fit(x, y)
    with mlflow.start_run() as run:
        mlflow.log_params({"C": 1.0, "solver": "lbfgs"})
        mlflow.log_metric("accuracy", 0.93)
        mlflow.set_tags({"team": "risk"})
        info = as_sklearn.log_model(
            model, name="model", signature=infer_signature(x, model.predict(x)),
            registered_model_name="churn", serialization_format="cloudpickle",
        )  # fmt: skip
    client = mlflow.MlflowClient()
    client.set_registered_model_alias("churn", "champion", "1")
    client.set_model_version_tag("churn", "1", "stage", "gold")
    print(json.dumps({"run": run.info.run_id, "model": info.model_id}))


if __name__ == "__main__":
    main()
