"""Runs the command line: python -m diffusion_nb."""

import sys

from diffusion_nb.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
