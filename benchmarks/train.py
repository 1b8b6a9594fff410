"""Training with the 35.7 M U-Net of CIFAR-10: pictures per second, operations per second, share of the device's measured peak, and peak memory, of this
library's Trainer, diffusers, and lucidrains' library (with the width of its README, and with ours).

Run: python benchmarks/train.py       (a GPU: bfloat16, compiled, channels last, batch 256; writes results/train-cuda.json)
     python benchmarks/train.py       (a CPU: float32, not compiled, batch 4, one thread and its processor time; results/train-cpu.json)
     python benchmarks/train.py --only diffusion_nb diffusers --minutes 2    (some contenders, and no round begun after two minutes)
     python benchmarks/train.py --profile     (also writes where the time goes, results/train-…-profile.txt)

Before the timing, each contender's loss is held against another library's, and must fall in ten steps. All take turns of ten steps; the
best turn counts. Operations are those of the matrix products and convolutions, forward and backward. Memory is what a contender adds to what was there.
"""

from common import prepare, sync
from contenders import (
    Setting,
    check_networks,
    check_operations,
    checked_training,
    compare,
    networks,
    operations,
    options,
    pictures,
)


def main():
    args = options(__doc__, batch=(4, 256))
    args.add_argument("--turn", type=int, default=10, help="steps a turn")
    args = args.parse_args()
    prepare(args.device)
    s = Setting(args.device, args.width, args.size, args.batch, args.bf16, args.compile)
    nets, x0 = networks(s.width, s.size, s.device), pictures(10 * s.batch, s.size, s.device)
    check_networks(nets, s.size)
    check_operations(nets, s.width, s.size)

    def turn_of(name, s):
        training = checked_training(name, s, nets[name], x0)

        def turn():
            for _ in range(args.turn):
                training.step()
            sync(s.device)

        return turn

    work = lambda net: operations(net, s.size, backward=True)
    compare("train", "training", args, s, nets, turn_of, args.turn * s.batch, work)


if __name__ == "__main__":
    main()
