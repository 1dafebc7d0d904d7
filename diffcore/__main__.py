"""`python -m diffcore`."""

import sys

from diffcore.cli.main import main

sys.exit(main())
