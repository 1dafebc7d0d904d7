"""`python -m diffcore`."""

import sys

from diffcore.cli import main

sys.exit(main())
