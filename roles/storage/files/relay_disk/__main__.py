"""Where the command begins: `make release` packs this folder into one file, build/relay-disk, that Python runs."""

import sys

from relay_disk.cli import main

sys.exit(main())
