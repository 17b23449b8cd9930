"""`python -m gdfq`."""

import sys

from gdfq.cli import main

sys.exit(main())
