"""The parser and the entry point."""

import argparse
import sys

from diffusion_nb.cli.book import artifacts, data, ledger, run
from diffusion_nb.cli.sample import bits, sample
from diffusion_nb.cli.train import distill, train
from diffusion_nb.util.allocator import keep_freed_memory


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="diffusion-nb", description="Diffusion models: run the book, train, draw.",
                                epilog="Start with `diffusion-nb run`, or draw digits at once with `diffusion-nb sample`.")  # fmt: skip
    commands = p.add_subparsers(
        dest="command", required=True, metavar="run | train | distill | sample | bits | data | artifacts | ledger"
    )

    def command(function, help, **options):
        "options: a type (no default), bool (a switch) or the default value; a second name after two underscores."
        c = commands.add_parser(function.__name__, help=help, description=help)
        c.set_defaults(command=function)
        for name, (text, default) in options.items():
            flag = ["--" + word.strip("_").replace("_", "-") for word in name.split("__")]
            if default is bool:
                c.add_argument(*flag, action="store_true", help=text)
            elif isinstance(default, type):
                c.add_argument(*flag, type=default, help=text, dest="from_" if name == "from_" else None)
            else:
                c.add_argument(*flag, type=type(default), default=default, help=f"{text} (default: %(default)s)")
        return c

    c = command(run, "execute the notebooks side by side, each in a fresh kernel, and write the book as web pages; goes on where an earlier run stopped",
                book=("folder of the notebooks (default: nbs of the repository)", str), out=("folder to write (default: _book beside it)", str), jobs=("notebooks at a time (default: one a core, fewer where memory is short)", int),
                fresh=("run all of them, also those that an interrupted run has finished", bool))  # fmt: skip
    c.add_argument(
        "notebooks",
        nargs="*",
        help="the first letters of their names, such as 03 or 07_ddpm; all if none is given",
    )
    c.add_argument("--profile", choices=["cpu", "gpu"], help="the size of the experiments, see settings.ini")
    command(train, "train a model of a data set; goes on where an earlier run of the same command stopped",
            data=("data set, see `diffusion-nb data`; or a folder of pictures, its subfolders being the classes; or an .npz file (arr_0, labels)", "digits"), out=("folder to write (default: runs/DATA)", str),
            recipe=("section [recipe.NAME] of settings.ini (default: that of the data set; pictures for one's own)", str), size=("pixels to which the pictures of a folder are cropped and resized", int),
            workers=("processes that read the pictures of a folder", 2), from_=("a model to start from: a folder or a file of weights", str),
            steps=("training steps (default: the recipe's)", int), batch=("pictures a step (default: the recipe's)", int),
            lr=("peak learning rate (default: the recipe's)", float), width=("channels of the U-Net (default: the recipe's)", int),
            seed=("of everything (default: the recipe's)", int), every=("steps between checkpoints", 1000),
            minutes=("stop after so many minutes; the same command goes on from there", float),
            vdm=("for the bound, on a schedule that is learned (notebook 16); digits or cifar10", bool),
            bf16=("bfloat16 autocast, for GPUs", bool), compile=("torch.compile the network, for GPUs", bool),
            accumulate=("do a step's pictures in so many parts, where they do not fit into memory at once", 1), keep=("how many checkpoints to keep", 2),
            skip=("leave out, and count, steps whose gradient is not finite, instead of stopping", bool),
            grids=("steps between grids of pictures drawn with the averaged weights; 0: none", 0), tensorboard=("log for TensorBoard, too; log.jsonl is written always", bool),
            power_ema=("keep power-function averages, too: which to use is chosen afterwards (notebook 28)", bool),
            deterministic=("on a GPU: the same bits in every run, more slowly (on a CPU they always are)", bool),
            shard=("with several processes: divide the weights among them, too (FSDP2)", bool),
            device=("cpu or cuda (default: the GPU if there is one)", str))  # fmt: skip
    command(distill, "teach a student to draw in few calls what a model draws in many; goes on where an earlier run stopped",
            data=("mnist or cifar10", "mnist"), consistency=("a one-step model of the teacher in --out, which `train` wrote; else the teacher is trained too, and its steps halved again and again", bool),
            out=("folder to write (default: runs/distill-DATA, with --consistency runs/DATA)", str), every=("steps between checkpoints", 1000),
            bf16=("bfloat16 autocast, for GPUs", bool), compile=("torch.compile the networks, for GPUs", bool),
            device=("cpu or cuda (default: the GPU if there is one)", str))  # fmt: skip
    c = command(sample, "draw pictures with a trained model, a grid of them, and a record of how; goes on where an earlier run of the same command stopped",
                model=("a folder or checkpoint written by train or distill, or digits: the model that comes with the book", "digits"), n__pictures=("how many (torchrun takes --n for its own: say --pictures)", 64),
                steps=("steps of the sampler (default: 100; those of a student; 1 for a consistency model)", int), seed=("picture i has seed SEED + i", 0),
                label=("draw this class only (default: all in turn)", int), guidance=("classifier-free guidance, the weight w in (w+1) with - w without label", 0.0),
                batch=("pictures at a time, which does not change them; 0: as many as fit", 0), bf16=("the network in bfloat16, for GPUs", bool),
                sampler=("how to walk from noise to pictures, one of cli/samplers.py: ddpm, or with few steps, such as --steps 20, ddim, heun or dpmpp_2m (default: ddpm; ddim for a student)", str),
                out=("folder to write (default: runs/samples, where another run's pictures are replaced)", str), replace=("delete what is in --out of another run", bool), device=("cpu or cuda (default: the GPU if there is one)", str))  # fmt: skip
    c.add_argument(
        "--format",
        choices=["safetensors", "npz", "png"],
        default="safetensors",
        help="one file of floats, one file of bytes (arr_0, as FID tools read it), or a PNG a picture (default: safetensors)",
    )
    c.add_argument(
        "--variance",
        choices=["small", "large"],
        help="of a step of ddpm: β̃ or β (default: small)",
    )
    c = command(bits, "bits a coordinate of held-out pictures by the variational bound, with its terms and error, as a JSON record",
                model=("a folder written by train, or digits: the model that comes with the book", "digits"),
                n=("how many held-out pictures", 256), steps=("of the chain; for a learned schedule, looks at a picture", 1000), end=("time at which the decoder takes over; 0: after the last of equal steps", 0.0),
                batch=("at a time; does not change the result", 256), bf16=("bfloat16 autocast, for GPUs", bool),
                out=("file to write (default: bits.json beside the model)", str), device=("cpu or cuda (default: the GPU if there is one)", str))  # fmt: skip
    c.add_argument(
        "--variance",
        choices=["small", "large", "fitted"],
        default="large",
        help="of the steps: DDPM's β̃ or β, or the best, fitted on as many training pictures (default: large)",
    )
    c = command(data, "list the data sets with size, state and licence; with names, fetch and verify them")
    c.add_argument("names", nargs="*", metavar="NAME", help="digits, mnist, fashion-mnist or cifar10")
    command(artifacts, "train the small networks that come with the book again, and compare with their cards")
    command(ledger, "print which statement of which paper is shown where, by which code and how well, as a table in Markdown",
            out=("file to write instead", str))  # fmt: skip
    return p


def main(argv: list[str] | None = None) -> int:
    "Returns 0 if all went well, 1 if not, 130 after Ctrl-C (2: the arguments made no sense)."
    args = parser().parse_args(argv)
    keep_freed_memory()
    try:
        return args.command(args)
    except KeyboardInterrupt as e:
        print(f"\n{e}" if str(e) else "\nstopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError, ImportError) as e:
        print(f"diffusion-nb {args.command.__name__}: {e}", file=sys.stderr)
        return 1
