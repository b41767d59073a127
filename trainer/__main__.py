"""``python -m trainer`` is ``msft-train``."""

import sys

from trainer.entry import main

if __name__ == "__main__":
    sys.exit(main())
