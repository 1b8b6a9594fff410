"""The digit model from nothing: a minute of training on two cores, and what the judge says of 1,500 digits that it draws.

Run: python benchmarks/digits.py [--seeds 3]   (writes benchmarks/results/digits.json)
"""

import argparse
import time
from dataclasses import replace

import torch
from common import report

from diffusion_nb.data import digits
from diffusion_nb.experiments.digits import judge_digits
from diffusion_nb.experiments.judge import accuracy_of, digit_judge
from diffusion_nb.metrics.features import frechet_distance
from diffusion_nb.recipes.diffusion import recipe, recipe_trainer


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--seeds", type=int, default=3)
    torch.set_num_threads(2)
    judge, data, rows = digit_judge(), digits(), {}
    rows["judge on held-out digits, share right"] = accuracy_of(judge, data.x_test, data.y_test)
    features, g = judge.features(data.x), torch.Generator().manual_seed(0)
    subsets = [
        frechet_distance(features[torch.randperm(len(features), generator=g)[:300]], features) for _ in range(20)
    ]
    rows["Fréchet, 300 of the training digits against all (20 draws): mean"] = sum(subsets) / 20
    rows["Fréchet, the same: lowest"], rows["Fréchet, the same: highest"] = min(subsets), max(subsets)
    for seed in range(args.parse_args().seeds):
        start = time.perf_counter()
        denoiser = recipe_trainer(replace(recipe("digits"), seed=seed), data.x, data.y, device="cpu").fit()
        rows[f"seed {seed}: seconds of training"] = time.perf_counter() - start
        for name, value in judge_digits(denoiser, n=1500).items():
            rows[f"seed {seed}: {name}"] = value
    report("digits", "", {name: round(value, 4) for name, value in rows.items()})


if __name__ == "__main__":
    main()
