"""``python -m benchmarks.observed``: the cost of samples for drift, and of traces of 1 % of the requests.

Two stacks of this checkout run all the time, and wrk loads them alternately. One has the defaults and exports
traces to a receiver in this process. The other takes no samples and exports nothing.
"""

from __future__ import annotations

from benchmarks import against, options, otlp, report, session, stack, workloads
from benchmarks.model import ensure_digits


def main() -> int:
    """Measure, print the table, write against.json. Return 1 if observation costs more than 3 %."""
    parser = options.parser(__doc__, seconds=5, repeats=9)
    parser.add_argument("--concurrency", type=options.numbers, default=[64], help="connections (default: 64)")
    chosen = parser.parse_args()
    chosen.revision = "unobserved"
    machine = report.machine()
    with session.session():
        ensure_digits()
        with otlp.receiver() as receiver:
            traced = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url}
            with stack.tidegate("observed", traced) as ours, stack.tidegate("unobserved") as theirs:
                ours.deploy(workloads.onnx_model(), against.WORKLOAD)
                theirs.deploy(workloads.onnx_model(), against.WORKLOAD, "--sampling", "0")
                pairs = list(against.rounds(ours, theirs, chosen))
        print(f"{len(receiver.spans()):,} spans were received")
    return against.conclude(pairs, machine, chosen)


if __name__ == "__main__":
    session.run(main)
