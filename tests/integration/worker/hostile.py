"""A hostile model that tries forbidden actions and answers with the results."""

MODEL = '''
import json, os, signal
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils


def attempt(what):
    try:
        found = what()
    except OSError as error:
        return "refused: " + type(error).__name__
    return "done" if found is None else str(found)


def tries(order):
    """Return the result of each attack by name: "done", what it read, or that it was refused."""
    read = lambda path: lambda: Path(path).read_text()
    write = lambda path: lambda: (Path(path).write_text("hostile"), None)[1]
    found = {name: attempt(read(path)) for name, path in order["read"].items()}
    found |= {name: attempt(write(path)) for name, path in order["write"].items()}
    found |= {name: attempt(lambda: sorted(os.listdir(path))) for name, path in order["list"].items()}
    opened = lambda path: lambda: (os.chmod(path, 0o777), None)[1]
    found |= {name: attempt(opened(path)) for name, path in order["chmod"].items()}
    found["signal"] = attempt(lambda: os.kill(order["worker"], 0))
    found["environ"] = attempt(lambda: len(Path(f"/proc/{order['worker']}/environ").read_bytes()))
    found["memory"] = attempt(lambda: open(f"/proc/{order['worker']}/mem", "rb").close())
    found["files"] = attempt(lambda: os.readlink(f"/proc/{order['worker']}/fd/0"))
    found["root"] = attempt(lambda: os.setuid(0))
    found["way up"] = attempt(lambda: sorted(os.listdir(os.path.join("/proc/self/cwd", order["up"]))))
    status = Path("/proc/self/status").read_text()
    found["status"] = {
        line.split(":")[0]: line.split()[1] for line in status.splitlines()
        if line.startswith(("CapEff", "CapPrm", "NoNewPrivs", "Uid"))
    }
    found["variables"] = sorted(os.environ)
    return found


class TritonPythonModel:
    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        order = json.loads(pb_utils.get_input_tensor_by_name(request, "order").as_numpy().ravel()[0])
        said = np.array([[json.dumps(tries(order))]], object)
        return pb_utils.InferenceResponse([pb_utils.Tensor("said", said)])
'''
