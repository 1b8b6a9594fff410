"""Scaling curves: pictures per second in training, and in sampling with DDIM, against the batch, the height of the pictures, and the number of steps.

Run: python benchmarks/curves.py           (a CPU: float32; a GPU: bfloat16, channels last; writes results/curves-….json and draws curves-….png)
     python benchmarks/curves.py --draw    (draws the picture again, from the JSON)
     python benchmarks/curves.py --compile --batches 128 256 --sizes --steps     (compiled, each point anew, so name a few)

Along the batch and the size, sampling takes five steps; along the size and the steps, the batch is the second of --batches. Before a point is timed,
each loss is held against another library's, and the walks before all. A point for which the memory is too small is null.
"""

import copy
import json

import matplotlib.pyplot as plt
import torch
from common import arguments, clock, digits, prepare, report, seconds, sync
from contenders import (
    DRAW,
    Setting,
    check_networks,
    check_shape,
    check_walks,
    checked_training,
    networks,
    pictures,
)
from matplotlib.ticker import LogLocator

COLOURS = ("#c44e52", "#4c72b0", "#8a8a8a")


def rates(makes, pictures, args):
    "Contender → pictures per second, or None where the memory is too small."
    turns = {}
    for name, make in makes.items():
        try:
            turns[name] = make()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    best = seconds(turns, args.rounds, args.minutes, clock(args.device), warm=0)
    return {name: digits(pictures / best[name]) if name in best else None for name in makes}


def training(s, nets, args):
    x0 = pictures(10 * s.batch, s.size, s.device)

    def make(name):
        step = checked_training(name, s, nets[name], x0, steps=0).step

        def turn():
            for _ in range(args.turn):
                step()
            sync(s.device)

        step()
        return turn

    return rates({name: lambda name=name: make(name) for name in nets}, args.turn * s.batch, args)


def sampling(s, nets, args, steps=5):
    def make(name):
        draw = DRAW[name.split()[0]](s, copy.deepcopy(nets[name]))
        check_shape(s, name, draw(1))
        return lambda: (draw(steps), sync(s.device))

    return rates({name: lambda name=name: make(name) for name in nets}, s.batch, args)


def curve(what, xs, points):
    "{contender: its pictures per second at each x}"
    rows = {}
    for x in xs:
        for name, rate in points(x).items():
            rows.setdefault(name, []).append(rate)
        print(what, x, {name: row[-1] for name, row in rows.items()}, flush=True)
    return rows


def measure(args):
    s = Setting(args.device, args.width, 32, (args.batches * 2)[1], args.bf16, args.compile)
    nets = networks(s.width, s.size, s.device)
    nets.pop(f"lucidrains {s.width}")
    check_networks(nets, s.size)
    check_walks(s, nets)
    nets = {name: nets[name] for name in args.only or nets}
    axes = {"batch": args.batches, "height and width": args.sizes}
    at = {"batch": lambda x: s._replace(batch=x), "height and width": lambda x: s._replace(size=x)}
    curves = {}
    for axis, xs in axes.items():
        for what, run in (("training", training), ("sampling", sampling)):
            points = lambda x, run=run, axis=axis: run(at[axis](x), nets, args)
            curves[f"{what} against {axis}"] = dict(x=xs, **curve(f"{what}, {axis}", xs, points))
    points = lambda x: sampling(s, nets, args, x)
    curves["sampling against steps"] = dict(x=args.steps, **curve("sampling, steps", args.steps, points))
    unit = f"pictures/s; {s.words()}, where they do not vary; sampling in 5 steps"
    report(f"curves-{args.device}", unit, curves, out=args.out)


def draw(path):
    "The curves of a JSON, as a picture beside it: training above, sampling below."
    told = json.loads(path.read_text(encoding="utf-8"))
    curves = {title: rows for title, rows in told["results"].items() if rows["x"]}
    fig, axes = plt.subplots(2, 3, figsize=(9, 5.2), layout="constrained", squeeze=False)
    places = {"training": 0, "sampling": 1, "batch": 0, "height and width": 1, "steps": 2}
    for ax in axes.flat:
        ax.set_visible(False)
    for title, rows in curves.items():
        what, axis = title.split(" against ")
        ax = axes[places[what], places[axis]]
        ax.set_visible(True)
        x, *lines = rows.items()
        for colour, (name, y) in zip(COLOURS, lines, strict=False):
            ax.plot(x[1], [v if v else float("nan") for v in y], "o-", color=colour, label=name, ms=4)
        ax.set(xscale="log", yscale="log", xlabel=axis, title=f"{what}, pictures/s")
        ax.set_xticks(x[1], x[1], minor=False)
        ax.set_xticks([], minor=True)
        ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        for set_formatter in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
            set_formatter(lambda value, _: f"{value:g}")
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = ax.get_legend_handles_labels()
    axes[0, 2].set_visible(True)
    axes[0, 2].axis("off")
    axes[0, 2].legend(handles, labels, loc="center", frameon=False, title=told["machine"]["device"])
    fig.savefig(path.with_suffix(".png"), dpi=90)


def main():
    on_gpu = torch.cuda.is_available()
    args = arguments(__doc__, compile=False)
    args.set_defaults(rounds=2)
    for name, cpu, gpu in (("batches", (1, 2, 4, 8), (1, 8, 64, 256)), ("sizes", (16, 32, 64), (16, 32, 64, 128)),
                           ("steps", (5, 10, 25, 50), (5, 10, 25, 50))):  # fmt: skip
        args.add_argument(f"--{name}", type=int, nargs="*", default=list(gpu if on_gpu else cpu))
    args.add_argument(
        "--turn",
        type=int,
        default=10 if on_gpu else 1,
        help="steps a turn; lucidrains' average is updated in one of ten",
    )
    args.add_argument("--only", nargs="+", help="some of the contenders")
    args.add_argument("--draw", action="store_true", help="measure nothing")
    args = args.parse_args()
    if not args.draw:
        prepare(args.device)
        measure(args)
    draw(args.out / f"curves-{args.device}.json")


if __name__ == "__main__":
    main()
