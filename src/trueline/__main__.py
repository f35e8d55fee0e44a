"""`python -m trueline`: the command line."""

import sys

from trueline.cli import main

sys.exit(main())
