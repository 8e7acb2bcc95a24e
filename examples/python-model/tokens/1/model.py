"""A decoupled model: one request, many answers. It gives the words of a text one after the other."""

import itertools
import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Each request has a thread, so that many streams run side by side, and ends when it is cancelled."""

    def initialize(self, args):
        """Nothing runs yet."""
        self._running = set()

    def execute(self, requests):
        """Begin; a decoupled model returns at once and answers through each request's response sender."""
        for request in requests:
            thread = threading.Thread(target=self._stream, args=(request,), daemon=True)
            self._running.add(thread)
            thread.start()

    def finalize(self):
        """Wait for what runs."""
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
    """``count`` words of the text (default: each once), from its start again when it has fewer."""
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
