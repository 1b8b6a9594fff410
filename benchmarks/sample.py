"""Sampling with DDIM in 50 steps and the 35.7 M U-Net of CIFAR-10: pictures per second, operations per second, share of the device's measured peak, and
peak memory, of this library's ddim, diffusers' DDIMPipeline, and lucidrains' ddim_sample (with the width of its README, and with ours).

Run: python benchmarks/sample.py       (a GPU: bfloat16, compiled, channels last, batch 512; writes results/sample-cuda.json)
     python benchmarks/sample.py       (a CPU: float32, not compiled, batch 2, one thread and its processor time; results/sample-cpu.json)
     python benchmarks/sample.py --profile     (also writes where the time goes, results/sample-…-profile.txt)

Before the timing, the walks of the other libraries and ours, through the same network from the same noise, must end at the same pictures.
"""

from common import prepare, sync
from contenders import Setting, check_networks, check_walks, checked_draw, compare, networks, operations, options


def main():
    args = options(__doc__, batch=(2, 512))
    args.add_argument("--steps", type=int, default=50)
    args = args.parse_args()
    prepare(args.device)
    s = Setting(args.device, args.width, args.size, args.batch, args.bf16, args.compile)
    nets = networks(s.width, s.size, s.device)
    check_networks(nets, s.size)
    check_walks(s, nets)

    def turn_of(name, s):
        draw = checked_draw(name, s, nets[name])

        def turn():
            draw(args.steps)
            sync(s.device)

        return turn

    work = lambda net: args.steps * operations(net, s.size)
    compare("sample", f"DDIM, {args.steps} steps", args, s, nets, turn_of, s.batch, work)


if __name__ == "__main__":
    main()
