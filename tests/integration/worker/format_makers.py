"""Scripts that make model files of other libraries, with the libraries' own answers.

Each runs in an environment with its library, and gets a folder. It writes NAME.<suffix> and NAME.npz: ``x``
(and ``categories``), and each output.
"""

from __future__ import annotations

_DATA = """
import sys, numpy as np
folder = sys.argv[1]
rng = np.random.default_rng(0)
x = rng.normal(size=(300, 5)).astype(np.float32)
two, three = (x[:, 0] + x[:, 1] > 0).astype(int), np.digitize(x[:, 0], [-0.5, 0.5])
x[::7, 2] = np.nan
def keep(name, **arrays):
    np.savez(folder + "/" + name + ".npz", **arrays)
"""

XGBOOST_BINARY = (
    _DATA
    + """
import xgboost as xgb
def train(labels, **options):
    matrix = xgb.DMatrix(x, labels)
    if options["objective"].startswith("rank"):
        matrix.set_group([150, 150])
    return xgb.train({"max_depth": 3, "nthread": 1, **options}, matrix, 8)
def plain(name, suffix, labels, **options):
    booster = train(labels, **options)
    booster.save_model(folder + "/" + name + suffix)
    return booster.predict(xgb.DMatrix(x))
p = plain("binary", ".ubj", two, objective="binary:logistic")
keep("binary", x=x, probabilities=np.column_stack([1 - p, p]), label=p > 0.5)
"""
)

XGBOOST = (
    XGBOOST_BINARY
    + """
p = plain("several", ".json", three, objective="multi:softprob", num_class=3)
keep("several", x=x, probabilities=p, label=p.argmax(axis=1))
for name, suffix, labels, options in [
    ("softmax", ".ubj", three, {"objective": "multi:softmax", "num_class": 3}),
    ("regression", ".json", x[:, 0], {"objective": "reg:squarederror"}),
    ("poisson", ".ubj", np.abs(x[:, 0]), {"objective": "count:poisson"}),
    ("rank", ".ubj", two, {"objective": "rank:pairwise"}),
    ("margin", ".json", two, {"objective": "binary:logitraw"}),
    ("dart", ".ubj", x[:, 0], {"objective": "reg:squarederror", "booster": "dart", "rate_drop": 0.3}),
    ("linear", ".json", np.nan_to_num(x[:, 0]), {"objective": "reg:squarederror", "booster": "gblinear"}),
    ("targets", ".ubj", x[:, :2], {"objective": "reg:squarederror", "multi_strategy": "multi_output_tree"}),
]:
    keep(name, x=x, output=plain(name, suffix, labels, **options))
stopped = xgb.XGBClassifier(n_estimators=60, learning_rate=1.0, early_stopping_rounds=2, n_jobs=1)
stopped.fit(x[:200], two[:200], eval_set=[(x[200:], two[200:])], verbose=False)
assert stopped.best_iteration < 59
stopped.save_model(folder + "/stopped.ubj")
keep("stopped", x=x, probabilities=stopped.predict_proba(x), label=stopped.predict(x))
"""
)

LIGHTGBM_CLASSES = (
    _DATA
    + """
import lightgbm as lgb
wide = x.astype(np.float64)
def train(name, labels, **options):
    booster = lgb.train({"verbose": -1, "num_threads": 1, **options}, lgb.Dataset(wide, labels), 8)
    booster.save_model(folder + "/" + name + ".txt")
    return booster.predict(wide)
p = train("binary", two, objective="binary")
keep("binary", x=wide, probabilities=np.column_stack([1 - p, p]), label=p > 0.5)
for name, objective in (("several", "multiclass"), ("ova", "multiclassova")):
    p = train(name, three, objective=objective, num_class=3)
    keep(name, x=wide, probabilities=p, label=p.argmax(axis=1))
"""
)

LIGHTGBM = (
    LIGHTGBM_CLASSES
    + """
for name, labels, objective in [
    ("regression", x[:, 0], "regression"), ("poisson", np.abs(x[:, 0]), "poisson"),
    ("entropy", two, "cross_entropy"),
]:
    keep(name, x=wide, output=train(name, labels, objective=objective))
"""
)

CATBOOST = (
    _DATA
    + """
import catboost as cb
options = dict(iterations=8, depth=3, verbose=0, allow_writing_files=False, thread_count=1)
def classify(name, labels):
    model = cb.CatBoostClassifier(**options).fit(x, labels)
    model.save_model(folder + "/" + name + ".cbm")
    keep(name, x=x, probabilities=model.predict_proba(x), label=model.predict(x).ravel().astype(labels.dtype))
classify("binary", two)
classify("texts", np.where(two, "up", "down"))
classify("several", three)
def regress(name, labels, **more):
    model = cb.CatBoostRegressor(**options, **more).fit(x, labels)
    model.save_model(folder + "/" + name + ".cbm")
    keep(name, x=x, output=model.predict(x))
regress("regression", x[:, 0])
regress("poisson", np.abs(x[:, 0]), loss_function="Poisson")
regress("targets", x[:, :2], loss_function="MultiRMSE")
colours = np.array([["red"], ["blue"]], dtype=object)[two]
rows = np.concatenate([x[:, :1].astype(object), colours, x[:, 3:4].astype(object)], axis=1)
model = cb.CatBoostClassifier(**options).fit(rows, three, cat_features=[1])
model.save_model(folder + "/categories.cbm")
keep("categories", x=x[:, [0, 3]], categories=colours.astype("S"), probabilities=model.predict_proba(rows),
     label=model.predict(rows).ravel())
"""
)

SKOPS = (
    _DATA
    + """
import skops.io
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
wide = np.nan_to_num(x).astype(np.float64)
for name, model, labels in [
    ("pipeline", make_pipeline(StandardScaler(), LogisticRegression()), np.where(two, "up", "down")),
    ("forest", RandomForestClassifier(8, random_state=0), three),
]:
    model.fit(wide, labels)
    skops.io.dump(model, folder + "/" + name + ".skops")
    keep(name, x=wide, probabilities=model.predict_proba(wide), label=model.predict(wide))
model = LinearRegression().fit(wide, wide[:, 0])
skops.io.dump(model, folder + "/regression.skops")
keep("regression", x=wide, output=model.predict(wide))
"""
)

TENSORFLOW = (
    _DATA
    + """
import shutil
import tensorflow as tf
rows = np.nan_to_num(x)
class Net(tf.Module):
    def __init__(self):
        self.w = tf.Variable(rng.normal(size=(5, 3)).astype(np.float32))
    @tf.function(input_signature=[tf.TensorSpec([None, 5], tf.float32, name="x")])
    def __call__(self, x):
        return {"probabilities": tf.nn.softmax(x @ self.w), "label": tf.argmax(x @ self.w, axis=1)[:, None]}
net = Net()
tf.saved_model.save(net, folder + "/net", signatures=net.__call__.get_concrete_function())
shutil.make_archive(folder + "/net", "zip", folder + "/net")
found = {name: each.numpy() for name, each in net(rows).items()}
keep("net", x=rows, **found)
light = tf.lite.TFLiteConverter.from_saved_model(folder + "/net").convert()
open(folder + "/light.tflite", "wb").write(light)
import subprocess
convert = ["-m", "tf2onnx.convert", "--saved-model", folder + "/net", "--output", folder + "/converted.onnx"]
subprocess.run([sys.executable, *convert], check=True)
keep("converted", x=rows, **found)
reader = tf.lite.Interpreter(model_content=light).get_signature_runner()
keep("light", x=rows, **reader(x=rows))
"""
)
