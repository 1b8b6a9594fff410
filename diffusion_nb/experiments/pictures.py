"""Models of real pictures that come with the book, and the judge of their drawings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusion_nb.data import Pictures, data_set
from diffusion_nb.denoisers import Clip, Denoiser, NetDenoiser
from diffusion_nb.experiments.artifacts import artifact
from diffusion_nb.experiments.judge import JudgeRecipe, accuracy_of, fashion_judge, mnist_judge
from diffusion_nb.grids import edm_grid
from diffusion_nb.guidance import CFG, interval
from diffusion_nb.metrics.features import frechet_distance
from diffusion_nb.noise import Noise
from diffusion_nb.recipes.diffusion import Recipe, recipe, recipe_denoiser, recipe_trainer
from diffusion_nb.recipes.settings import settings
from diffusion_nb.samplers.linear import dpmpp_2m
from diffusion_nb.training.batches import flip_half
from diffusion_nb.util.checks import default_device, expand_as

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


class Residual(nn.Module):
    "Two normalised 3×3 convolutions, added to what came in."

    def __init__(self, c_in: int, c_out: int, stride: int = 1):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(),
            nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out))  # fmt: skip
        same = (c_in, stride) == (c_out, 1)
        change = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
        self.skip = nn.Identity() if same else change

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        return F.relu(self.body(x) + self.skip(x))


class PictureClassifier(nn.Module):
    "A residual network for 32×32 pictures in colour: `judge(x)` gives logits (n, 10), `judge.features(x)` what they are read from, (n, 4·width)."

    def __init__(self, width: int = 48):
        super().__init__()
        w = width
        self.body = nn.Sequential(
            nn.Conv2d(3, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU(), Residual(w, w), Residual(w, w), Residual(w, 2 * w, 2),
            Residual(2 * w, 2 * w), Residual(2 * w, 4 * w, 2), Residual(4 * w, 4 * w), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # fmt: skip
        self.head = nn.Linear(4 * w, 10)

    def features(self, x: Float[Tensor, "n 3 32 32"]) -> Float[Tensor, "n f"]:
        return self.body(x)

    def forward(self, x: Float[Tensor, "n 3 32 32"]) -> Float[Tensor, "n 10"]:
        return self.head(self.features(x))


def shifted(x: Float[Tensor, "n c h w"], by: Int[Tensor, "2 n"], border: int = 4) -> Float[Tensor, "n c h w"]:
    "Each picture moved down and right by its numbers, 0 to 2·border, less `border`; what comes in is the mirrored border."
    h, w = x.shape[2:]
    rows, columns = (b[:, None] + torch.arange(s, device=x.device) for b, s in zip(by, (h, w), strict=True))
    n, c = (torch.arange(k, device=x.device) for k in x.shape[:2])
    padded = F.pad(x, (border,) * 4, mode="reflect")
    return padded[n[:, None, None, None], c[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


@dataclass(frozen=True)
class PictureJudgeRecipe(JudgeRecipe):
    "A classifier of photographs, and its training; lr: the peak of one cycle of SGD."

    data: str = "cifar10"
    width: int = 48
    steps: int = 2929
    batch: int = 512
    lr: float = 0.4


def trained_on() -> dict[str, str]:
    "The device that a model of this module was trained on, for its card."
    return {"trained on": torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"}


def train_picture_judge(r: PictureJudgeRecipe) -> tuple[dict, dict]:
    "The weights of a judge of photographs, in float16, and its accuracy on what was held out."
    data, device = data_set(r.data).load(), default_device()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(r.seed)
        judge = PictureClassifier(r.width).to(device)
    g, x, y = torch.Generator(device).manual_seed(r.seed), data.x.to(device), data.y.to(device)
    optimizer = torch.optim.SGD(judge.parameters(), r.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, r.lr, total_steps=r.steps, pct_start=0.2)
    draw = lambda *shape: torch.rand(*shape, generator=g, device=device)
    for k in tqdm(range(r.steps), desc="training the judge", leave=False):
        place = k % (len(x) // r.batch) * r.batch
        order = torch.randperm(len(x), generator=g, device=device) if place == 0 else order
        pick = order[place : place + r.batch]
        seen = flip_half(shifted(x[pick], (9 * draw(2, len(pick))).long()), draw(len(pick)))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.cross_entropy(judge(seen).float(), y[pick], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
    weights = halved(judge.cpu())
    accuracy = round(judged_rightly(data, weights, r), 4)
    return weights, {f"accuracy on {len(data.x_test)} held-out pictures": accuracy} | trained_on()


def judged_rightly(data, weights: dict[str, Tensor], r: PictureJudgeRecipe) -> float:
    "The share of held-out pictures that these weights know."
    judge = judge_of(weights, r)
    parts = zip(data.x_test.split(500), data.y_test.split(500), strict=True)
    return sum(accuracy_of(judge, x, y) * len(x) for x, y in parts) / len(data.x_test)


def halved(module: nn.Module) -> dict[str, Tensor]:
    "The weights in float16, on the CPU."
    return {
        k: v.detach().cpu().half() if v.is_floating_point() else v.cpu() for k, v in module.state_dict().items()
    }


def in_bytes(module: nn.Module) -> dict[str, Tensor]:
    "The weights as 8-bit numbers, with a scale for each row of a matrix and each filter; vectors in float16. `from_bytes` undoes it, to half a step."
    kept = {}
    for name, v in module.state_dict().items():
        v = v.detach().cpu()
        if not v.is_floating_point() or v.ndim < 2:
            kept[name] = v.half() if v.is_floating_point() else v
            continue
        scale = v.flatten(1).abs().amax(1).clamp_min(1e-12) / 127
        kept[name] = (v / expand_as(scale, v)).round().to(torch.int8)
        kept[f"{name}.scale"] = scale.float()
    return kept


def from_bytes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    "The weights that `in_bytes` kept, in float32."
    scaled = lambda v, scale: v * expand_as(scale, v)
    return {
        name: scaled(v.float(), tensors[f"{name}.scale"]) if f"{name}.scale" in tensors else v
        for name, v in tensors.items()
        if not name.endswith(".scale")
    }


def judge_of(weights: dict[str, Tensor], r: PictureJudgeRecipe) -> PictureClassifier:
    "The judge with these weights, in eval mode."
    judge = PictureClassifier(r.width)
    judge.load_state_dict(weights)
    return judge.eval().requires_grad_(False)


def cifar10_judge() -> PictureClassifier:
    "The judge of CIFAR-10 (artifact `cifar10_judge`, [judge.cifar10]); only training it anew needs the pictures."
    r = settings("judge.cifar10", PictureJudgeRecipe)
    return judge_of(artifact("cifar10_judge", train_picture_judge, r)[0], r)


@torch.no_grad()
def by_2m(
    denoiser: Denoiser, n: int, shape: Sequence[int], steps: int, first: int = 0, batch: int | None = None, **cond: Tensor
) -> Float[Tensor, "n *shape"]:  # fmt: skip
    """Samples by DPM-Solver++ 2M on EDM's grid; the i-th has seed `first` + i.

    shape: of one. batch: how many at a time, all if not given. cond: what the denoiser is told, a row for each.
    """
    ts, drawn, device = edm_grid(denoiser.schedule, steps, 0.02, 80.0), [], next(denoiser.parameters()).device
    start = denoiser.schedule(ts[0])[1].float()
    for part in torch.arange(n).split(batch or n):
        noise, told = Noise(first + part, shape, device)(0), {k: v[part].to(device) for k, v in cond.items()}
        drawn.append(dpmpp_2m(denoiser, start * noise, ts, **told))
    return torch.cat(drawn)


def draw_pictures(denoiser: NetDenoiser, y: Int[Tensor, " n"], w: float | Callable = 1.0, steps: int = 20, first: int = 0, shape: Sequence[int] = (3, 32, 32)) -> Float[Tensor, "n c h w"]:  # fmt: skip
    "Pictures of these classes, by DPM-Solver++ 2M with guidance weight w, or t ↦ w; shape: of one picture."
    guided = Clip(CFG(denoiser, w, denoiser.net.label.num_embeddings - 1))
    return by_2m(guided, len(y), shape, steps, first, y=y)


@dataclass(frozen=True)
class Guided:
    "The guidance with which a model is judged: weight w up to the time `until`, and none before."

    w: float
    until: float = 1.0

    @property
    def weight(self) -> float | Callable[[Tensor], Tensor]:
        return interval(self.w, 0.0, self.until) if self.until < 1 else self.w

    def __str__(self) -> str:
        return f"w = {self.w:g}" + f" for t ≤ {self.until:g}" * (self.until < 1)


OF_CIFAR10, OF_MNIST, OF_FASHION = Guided(1.0), Guided(0.5), Guided(1.5, 0.85)


@torch.no_grad()
def judge_pictures(
    denoiser: NetDenoiser, data: Pictures, judge: nn.Module, guided: Guided, n: int = 1000, batch: int = 100
) -> dict[str, float]:
    "What the judge says of n drawings, and of n held-out pictures: the share that is given its class, and the Fréchet distance to the training pictures."
    y, shape = torch.arange(n) % 10, tuple(data.x.shape[1:])
    x = torch.cat([draw_pictures(denoiser, part, guided.weight, first=2**20 + i * batch, shape=shape) for i, part in enumerate(tqdm(y.split(batch), desc="drawing", leave=False))])  # fmt: skip
    seen = lambda pictures: torch.cat([judge.features(part) for part in pictures.split(500)])
    real, drawn, held = seen(data.x[:10_000]), seen(x.cpu()), seen(data.x_test[:n])
    return {
        f"given their class, {guided}": round((judge.head(drawn).argmax(1) == y).double().mean().item(), 4),
        "held-out pictures given theirs": round((judge.head(held).argmax(1) == data.y_test[:n]).double().mean().item(), 4),
        f"Fréchet distance, {guided}": round(frechet_distance(drawn, real), 3),
        "Fréchet distance of held-out pictures": round(frechet_distance(held, real), 3),
    }  # fmt: skip


def train_judged(r: Recipe, judge: nn.Module, guided: Guided) -> tuple[dict, dict]:
    "The weights of a model of pictures, in float16, and the judge's verdict; on a GPU compiled, in bfloat16."
    data, on_gpu = data_set(r.data).load(), torch.cuda.is_available()
    denoiser = recipe_trainer(r, data.x, data.y, bf16=on_gpu, compile=on_gpu).fit()
    return halved(denoiser.net), judge_pictures(denoiser, data, judge, guided) | trained_on()


def train_pictures(r: Recipe) -> tuple[dict, dict]:
    "The model of CIFAR-10, with what its judge says."
    return train_judged(r, cifar10_judge(), OF_CIFAR10)


def train_mnist(r: Recipe) -> tuple[dict, dict]:
    "The model of MNIST, with what its judge says."
    return train_judged(r, mnist_judge(), OF_MNIST)


def train_fashion(r: Recipe) -> tuple[dict, dict]:
    "The model of Fashion-MNIST, with what its judge says."
    return train_judged(r, fashion_judge(), OF_FASHION)


def kept_denoiser(name: str, make: Callable, r: Recipe, shape: Sequence[int]) -> NetDenoiser:
    "The model that the artifact `name` keeps, in eval mode, without gradients."
    denoiser = recipe_denoiser(r, shape)
    denoiser.net.load_state_dict(artifact(name, make, r)[0])
    return denoiser.eval().requires_grad_(False)


def cifar10_denoiser() -> NetDenoiser:
    "The trained model of CIFAR-10, y = 0…9 or 10 for any (artifact `cifar10_small`, [recipe.cifar10-small])."
    return kept_denoiser("cifar10_small", train_pictures, recipe("cifar10-small"), (3, 32, 32))


def mnist_denoiser() -> NetDenoiser:
    "The trained model of MNIST, y = 0…9 or 10 for any (artifact `mnist_small`, [recipe.mnist-small])."
    return kept_denoiser("mnist_small", train_mnist, recipe("mnist-small"), (1, 28, 28))


def fashion_denoiser() -> NetDenoiser:
    "The trained model of Fashion-MNIST, y = 0…9 or 10 for any (artifact `fashion_small`, [recipe.fashion-small])."
    return kept_denoiser("fashion_small", train_fashion, recipe("fashion-small"), (1, 28, 28))
