"""A decoupled model: it sends the words of a text one by one, as many responses to one request."""

import itertools
import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """A model with a thread for each request, so that streams run in parallel and can be cancelled."""

    def initialize(self, args):
        """Prepare the set of running threads."""
        self._running = set()

    def execute(self, requests):
        """Start a thread for each request. It responds through the request's response sender."""
        for request in requests:
            thread = threading.Thread(target=self._stream, args=(request,), daemon=True)
            self._running.add(thread)
            thread.start()

    def finalize(self):
        """Wait for the running threads."""
        for thread in list(self._running):
            thread.join(timeout=5)

    def _stream(self, request):
        sender = request.get_response_sender()
        try:
            for word in _words(request):
                if sender.is_cancelled():
                    break
                text = pb_utils.Tensor("text_output", np.array([word], dtype=object))
                made_at = pb_utils.Tensor("made_at", np.array([time.time()]))
                sender.send(pb_utils.InferenceResponse([text, made_at]))
        except Exception as error:
            sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error))))
        finally:
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            self._running.discard(threading.current_thread())


def _words(request):
    """Yield ``count`` words of the text (default: each once), repeating the text if it has fewer."""
    words = _value(request, "text_input", b"").decode().split()
    count = int(_value(request, "count", len(words)))
    delay_s = float(_value(request, "delay_ms", 0)) / 1000
    if count < 0 or delay_s < 0:
        raise ValueError("count and delay_ms must be at least 0")
    for word in itertools.islice(itertools.cycle(words), count):
        time.sleep(delay_s)
        yield word.encode()


def _value(request, name, default):
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return default if tensor is None else tensor.as_numpy().flat[0]
