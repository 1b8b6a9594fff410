"""The entry point."""

import sys

from diffusion_nb.util.allocator import keep_freed_memory

ABOUT = "Diffusion models: run the book, train, draw. Start with `diffusion-nb run`, or draw digits at once with `diffusion-nb sample`."


def commands():
    "The commands, of which `.cli(args=…)` parses and calls the one that was asked for."
    from tyro.extras import SubcommandApp

    from diffusion_nb.cli.book import artifacts, data, ledger, run
    from diffusion_nb.cli.sample import bits, sample
    from diffusion_nb.cli.train import distill, train

    app = SubcommandApp()
    for command in (run, train, distill, sample, bits, data, artifacts, ledger):
        app.command(command)
    return app


def versions() -> str:
    "The versions of this library, of Python and of PyTorch, as a report of a bug should name them."
    from importlib.metadata import version
    from platform import python_version

    return f"diffusion_nb {version('diffusion_nb')}, Python {python_version()}, torch {version('torch')}"


def main(argv: list[str] | None = None) -> int:
    "Returns 0 if all went well, 1 if not, 130 after Ctrl-C; SystemExit(2) where the arguments made no sense."
    from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes

    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--version"]:
        print(versions())
        return 0
    keep_freed_memory()
    try:
        return commands().cli(
            args=argv, prog="diffusion-nb", description=ABOUT, config=(OmitArgPrefixes, FlagCreatePairsOff)
        )
    except KeyboardInterrupt as e:
        print(f"\n{e}" if str(e) else "\nstopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError, ImportError) as e:
        print(f"diffusion-nb {argv[0]}: {e}", file=sys.stderr)
        return 1
