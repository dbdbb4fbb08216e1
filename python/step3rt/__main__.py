"""`python -m step3rt` is the `step3rt` command."""

import sys

from step3rt.cli import main

sys.exit(main())
