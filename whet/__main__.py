"""`python -m whet` is `whet`."""

import sys

from whet.cli import main

sys.exit(main())
