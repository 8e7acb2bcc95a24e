"""``python -m tidegate.stack``: the supervisor."""

import sys

from tidegate import quick_start


def main() -> int:
    """Keep the stack until told to stop."""
    quick_start.begin()
    from tidegate.stack import supervisor

    quick_start.loaded()
    return supervisor.main()


if __name__ == "__main__":
    sys.exit(main())
