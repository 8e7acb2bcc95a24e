"""``python -m tidegate.stack``: the supervisor."""

import sys

from tidegate.stack.supervisor import main

sys.exit(main())
