"""`python -m fedmoe` is `fedmoe`."""

import sys

from fedmoe.cli import main

sys.exit(main())
