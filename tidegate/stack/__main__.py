"""``python -m tidegate.stack``: run the stack's supervisor."""

import sys

from tidegate.kernel import quick_start
from tidegate.stack import supervisor


def main() -> int:
    """Run the stack until SIGTERM or SIGINT."""
    quick_start.loaded()
    return supervisor.main()


if __name__ == "__main__":
    sys.exit(main())
