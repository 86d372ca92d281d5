"""`python -m palm_haiku` is `palm-haiku`."""

import sys

from palm_haiku.cli import main

sys.exit(main())
