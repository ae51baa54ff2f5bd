"""`python -m convsplit` is the command `convsplit`."""

import sys

from convsplit.cli import main

sys.exit(main())
