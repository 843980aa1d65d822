"""Captions say what the scene shows, in many ways, and in no word that contradicts it."""

import itertools

import numpy as np
import pytest

from data import world_captions as words
from data.world import BACKGROUNDS, COLOURS, DIRECTIONS, LEVELS, SHAPES, SIZES, make_scene
from data.world_captions import caption, captions


def scenes(level, count=150, split="train"):
    return [make_scene(level=level, seed=8, index=i, split=split) for i in range(count)]


def said(text, options):
    """Whether one of the wordings stands in the text as whole words."""
    text = f" {text.replace(',', '').replace('.', '').replace(':', '')} "
    return any(f" {option} " in text for option in options)


def without_background(text, scene):
    """The text with the background's colour taken out, which may also name another colour."""
    for name in words.BACKGROUND_WORDS.get(scene.background, (scene.background,)):
        for place in (" background", " backdrop"):
            text = text.replace(name + place, place)
        text = text.replace("background is " + name, "background is ")
    return text


@pytest.mark.parametrize("level", sorted(LEVELS))
def test_complete_captions_say_colour_shape_motion_and_background(level):
    rng = np.random.default_rng(0)
    for scene in scenes(level):
        text = caption(scene, rng, complete=True)
        assert text == text.lower()
        assert "{" not in text
        assert said(text, words.BACKGROUND_WORDS.get(scene.background, (scene.background,)))
        for item in scene.objects:
            assert said(text, words.COLOUR_WORDS.get(item.colour, (item.colour,)))
            assert said(text, words.SHAPE_WORDS[item.shape])
            if item.motion in DIRECTIONS:
                assert said(text, words.DIRECTION_WORDS[item.motion])
            else:
                assert said(text, itertools.chain(*words.OTHER_VERBS[item.motion]))


@pytest.mark.parametrize("level", [1, 2, 3])
def test_lower_levels_leave_nothing_unsaid_and_say_nothing_wrong(level):
    rng = np.random.default_rng(1)
    for scene in scenes(level):
        (item,) = scene.objects
        text = without_background(caption(scene, rng), scene)
        for colour in COLOURS:
            assert said(text, words.COLOUR_WORDS.get(colour, (colour,))) == (colour == item.colour)
        for shape in SHAPES:
            assert said(text, words.SHAPE_WORDS[shape]) == (shape == item.shape)
        for size in SIZES:
            if said(text, words.SIZE_WORDS[size]):
                assert size == item.size
        if item.motion in ("left", "right", "up", "down"):
            opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}[item.motion]
            assert not said(text, words.DIRECTION_WORDS[opposite])


def test_size_is_said_about_half_of_the_time():
    rng = np.random.default_rng(2)
    texts = [caption(scene, rng) for scene in scenes(1, 400)]
    share = np.mean([said(text, ("small", "large")) for text in texts])
    assert 0.4 < share < 0.6


def test_the_top_level_leaves_each_attribute_unsaid_now_and_then():
    rng = np.random.default_rng(3)
    missing = {"colour": 0, "shape": 0, "motion": 0, "background": 0}
    for scene in scenes(4, 300):
        text = caption(scene, rng)
        assert text
        bare = without_background(text, scene)
        item = scene.objects[0]
        missing["background"] += "background" not in text and "backdrop" not in text
        missing["colour"] += not said(bare, words.COLOUR_WORDS.get(item.colour, (item.colour,)))
        missing["shape"] += not said(bare, words.SHAPE_WORDS[item.shape])
        known = words.DIRECTION_WORDS.get(item.motion) or tuple(
            itertools.chain(*words.OTHER_VERBS.get(item.motion, ()))
        )
        missing["motion"] += not said(bare, known)
    assert min(missing.values()) > 20
    assert max(missing.values()) < 100


def test_wordings_differ_and_follow_from_the_generator():
    scene = scenes(1, 1)[0]
    some = captions(scene, 5, np.random.default_rng(4))
    assert len(set(some)) == 5
    assert some == captions(scene, 5, np.random.default_rng(4))


def test_level_one_uses_six_patterns_and_higher_levels_more():
    assert len(words.TEMPLATES) == 6
    vocabularies = {}
    for level in (1, 2):
        rng = np.random.default_rng(5)
        texts = [caption(scene, rng) for scene in scenes(level, 600)]
        vocabularies[level] = {word for text in texts for word in text.split()}
    assert len(vocabularies[2]) > len(vocabularies[1]) + 15
    assert vocabularies[1] <= vocabularies[2]


def test_every_name_can_be_said():
    assert set(words.SHAPE_WORDS) == set(SHAPES)
    assert set(words.SIZE_WORDS) == set(SIZES)
    assert set(words.COLOUR_WORDS) <= set(COLOURS)
    assert set(words.BACKGROUND_WORDS) <= set(BACKGROUNDS)
    assert set(words.DIRECTION_WORDS) == set(DIRECTIONS)


def test_articles_fit_the_next_word():
    rng = np.random.default_rng(6)
    texts = [caption(scene, rng) for scene in scenes(2, 400)]
    assert any("an orange" in text for text in texts)
    assert not any(f" a {vowel}" in f" {text}" for text in texts for vowel in "aeiou")
