"""Runs the command line: python -m diffusion_nb."""

from diffusion_nb.cli.main import main

if __name__ == "__main__":
    main()
