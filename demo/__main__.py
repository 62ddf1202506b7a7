"""`python -m demo` is `make demo`."""

import sys

from demo.run import main

sys.exit(main(sys.argv[1:]))
