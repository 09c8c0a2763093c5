"""`python -m repcon` is `repcon`."""

import sys

from repcon.cli import main

sys.exit(main())
