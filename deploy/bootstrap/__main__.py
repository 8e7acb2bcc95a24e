"""``python3 -m deploy.bootstrap [--dev]``: install the parts of the stack.

This file must parse in every Python 3, so that an unsupported Python can say which version is needed.
"""

import sys

from deploy.bootstrap.python_check import wrong_version

if __name__ == "__main__":
    problem = wrong_version()
    if problem:
        sys.stderr.write(problem + "\n")
        sys.exit(2)
    from deploy.bootstrap.install import main

    sys.exit(main(sys.argv[1:]))
