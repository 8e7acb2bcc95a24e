"""``python3 -m deploy.bootstrap [--dev]``. Every Python 3 must be able to read this file."""

import sys

from deploy.bootstrap.python_check import wrong_version

if __name__ == "__main__":
    problem = wrong_version()
    if problem:
        sys.stderr.write(problem + "\n")
        sys.exit(2)
    from deploy.bootstrap.install import main

    sys.exit(main(sys.argv[1:]))
