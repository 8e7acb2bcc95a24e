"""Makes the files beside it, in an environment with numpy 2 and the models' scikit-learn:

pip install 'numpy>=2' scikit-learn==1.9.1 && python make.py
"""

from __future__ import annotations

import pickle
from pathlib import Path

import joblib
import numpy as np
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.neural_network import MLPClassifier

FOLDER = Path(__file__).parent
x = np.random.default_rng(1).normal(size=(60, 4))
boosted = GradientBoostingRegressor(n_estimators=2, max_depth=2, random_state=np.random.RandomState(3))
boosted.fit(x, x[:, 0])
joblib.dump(boosted, FOLDER / "boosted.joblib", compress=3)
network = MLPClassifier((3,), max_iter=5, random_state=1).fit(x, x[:, 1] > 0)
(FOLDER / "network.pkl").write_bytes(pickle.dumps(network, protocol=5))
np.savez(FOLDER / "expected.npz", x=x, boosted=boosted.predict(x), network=network.predict(x))
