"""``python -m retro_jax <command>``."""

import sys

from retro_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
