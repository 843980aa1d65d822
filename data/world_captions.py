"""Captions for scenes of the procedural world: templates, synonyms, word order, things left unsaid.

Level 1 has six sentence patterns and always says colour, shape, motion and background, and the size
about half of the time. Higher levels add patterns and synonyms; the top level also leaves things
unsaid, unless a complete caption is asked for. Scenarios are worded as level 1.
"""

import numpy as np

from data.world_motion import pick
from data.world_scene import LEVELS, Object, Scene

# The first word is always in use, the rest where the level has synonyms.
COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "crimson"),
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise"),
}
SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big"),
}
# At every level: people say "blue background", and a blue object is a different, lighter blue.
BACKGROUND_WORDS: dict[str, tuple[str, ...]] = {
    "gray": ("gray", "grey"),
    "navy": ("navy", "dark blue", "blue"),
}
DIRECTION_WORDS: dict[str, tuple[str, ...]] = {
    "left": ("left", "to the left", "leftwards"),
    "right": ("right", "to the right", "rightwards"),
    "up": ("up", "upwards", "towards the top"),
    "down": ("down", "downwards", "towards the bottom"),
    "up-left": ("up and to the left", "diagonally up and left", "towards the top left"),
    "up-right": ("up and to the right", "diagonally up and right", "towards the top right"),
    "down-left": ("down and to the left", "diagonally down and left", "towards the bottom left"),
    "down-right": (
        "down and to the right",
        "diagonally down and right",
        "towards the bottom right",
    ),
}
# (present participle, third person), for straight motions followed by a direction.
STRAIGHT_VERBS: tuple[tuple[str, str], ...] = (
    ("moving", "moves"),
    ("sliding", "slides"),
    ("drifting", "drifts"),
    ("gliding", "glides"),
    ("travelling", "travels"),
)
OTHER_VERBS: dict[str, tuple[tuple[str, str], ...]] = {
    "falling": (
        ("falling", "falls"),
        ("dropping", "drops"),
        ("falling to the ground", "falls to the ground"),
    ),
    "bouncing": (
        ("bouncing on the ground", "bounces on the ground"),
        ("falling and bouncing", "falls and bounces"),
        ("dropping and bouncing back up", "drops and bounces back up"),
    ),
    "ricocheting": (
        ("bouncing off the walls", "bounces off the walls"),
        ("ricocheting off the walls", "ricochets off the walls"),
        ("hitting the wall and bouncing back", "hits the wall and bounces back"),
    ),
}
# {doing}, {does}: objects with their motions as participle and as third person.
TEMPLATES: tuple[str, ...] = (
    "{doing} on {a_background} background",
    "{does} on {a_background} background",
    "on {a_background} background, {does}",
    "{a_background} background with {doing}",
    "{doing}, {background} background",
    "{does} in front of {a_background} background",
)
MORE_TEMPLATES: tuple[str, ...] = (
    "a video of {doing} on {a_background} background",
    "a short clip in which {does}, the background is {background}",
    "{does}. the background is {background}",
    "against {a_background} backdrop, {does}",
)
BARE_TEMPLATES: tuple[str, ...] = ("{doing}", "{does}", "a video of {doing}", "a clip: {does}")
# Of scenarios. {a}, {b}: the objects that collide.
COLLISIONS: tuple[tuple[str, str], ...] = (
    ("{a} and {b} colliding", "{a} and {b} collide"),
    ("{a} colliding with {b}", "{a} collides with {b}"),
)
PAN_TEMPLATES: tuple[str, ...] = (
    "the camera pans {way} over {things} on {a_background} background",
    "the camera moves {way} over {things} on {a_background} background",
    "on {a_background} background, the camera pans {way} over {things}",
    "{a_background} background with {things}, the camera moves {way}",
    "the camera panning {way} over {things}, {background} background",
    "the camera moves {way} over {things} in front of {a_background} background",
)
# One wording each: what is asked of a model is in the given frames.
FIXED: dict[str, str] = {
    "uniform": "a red ball moving at constant speed on a black background",
    "collision": "a red ball and a blue ball colliding on a black background",
    "parabola": "a red ball thrown through the air on a black background",
}


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _words(rng: np.random.Generator, words: tuple[str, ...], synonyms: bool, plain: int = 1) -> str:
    return pick(rng, words if synonyms else words[:plain])


def _object_phrase(
    item: Object, rng: np.random.Generator, synonyms: bool, unsaid: frozenset[str]
) -> str:
    words = []
    if rng.random() < 0.5:
        words.append(_words(rng, SIZE_WORDS[item.size], synonyms))
    if "colour" not in unsaid:
        words.append(_words(rng, COLOUR_WORDS.get(item.colour, (item.colour,)), synonyms))
    words.append("shape" if "shape" in unsaid else _words(rng, SHAPE_WORDS[item.shape], synonyms))
    return _article(" ".join(words))


def _motion_phrase(item: Object, rng: np.random.Generator, synonyms: bool) -> tuple[str, str]:
    """The motion as a participle and in the third person."""
    if item.motion in OTHER_VERBS:
        verbs = OTHER_VERBS[item.motion]
        return pick(rng, verbs if synonyms else verbs[:1])
    doing, does = pick(rng, STRAIGHT_VERBS if synonyms else STRAIGHT_VERBS[:2])
    direction = _words(rng, DIRECTION_WORDS[item.motion], synonyms, plain=2)
    return f"{doing} {direction}", f"{does} {direction}"


def caption(scene: Scene, rng: np.random.Generator, *, complete: bool = False) -> str:
    """One wording of what the scene shows, in lower case.

    Args:
        complete: say every object's colour, shape and motion, and the background, at every level;
            for prompts whose answers are scored.
    """
    if scene.level is None:
        return _scenario_caption(scene, rng)
    level = LEVELS[scene.level]
    unsaid: frozenset[str] = frozenset()
    if level.omissions and not complete:
        # At most one of the attributes, so that a caption never says nothing at all.
        choices = ("", "", "colour", "shape", "motion", "background")
        unsaid = frozenset({pick(rng, choices)})
    doing, does = [], []
    for place in rng.permutation(len(scene.objects)):
        item = scene.objects[place]
        name = _object_phrase(item, rng, level.synonyms, unsaid)
        participle, third_person = _motion_phrase(item, rng, level.synonyms)
        if "motion" in unsaid:
            participle, third_person = "", "is there"
        doing.append(f"{name} {participle}".strip())
        does.append(f"{name} {third_person}")
    templates = TEMPLATES + MORE_TEMPLATES if level.synonyms else TEMPLATES
    if "background" in unsaid:
        templates = BARE_TEMPLATES
    parts = {"doing": " and ".join(doing), "does": " and ".join(does)}
    return _fill(rng, templates, scene, **parts)


def _fill(rng: np.random.Generator, templates: tuple[str, ...], scene: Scene, **parts: str) -> str:
    background = pick(rng, BACKGROUND_WORDS.get(scene.background, (scene.background,)))
    return pick(rng, templates).format(
        background=background, a_background=_article(background), **parts
    )


def _scenario_caption(scene: Scene, rng: np.random.Generator) -> str:
    """As level 1: nothing unsaid, no synonyms. Subjects are never described: their names number their
    reference pictures, and come in any order."""
    if scene.scenario in FIXED:
        return FIXED[scene.scenario]
    order = rng.permutation(len(scene.objects))
    if scene.scenario == "subjects":
        names = ["the subject"] if len(order) == 1 else ["subject one", "subject two"]
        items = [(names[place], scene.objects[place]) for place in order]
    else:
        shuffled = [scene.objects[place] for place in order]
        items = [(_object_phrase(o, rng, False, frozenset()), o) for o in shuffled]
    if scene.scenario == "pan":
        assert scene.camera is not None
        way = _words(rng, DIRECTION_WORDS[_axis_direction(*scene.camera)], False, plain=2)
        things = " and ".join(name for name, _ in items)
        return _fill(rng, PAN_TEMPLATES, scene, way=way, things=things)
    if scene.scenario == "collisions":
        (a, _), (b, _) = items
        doing, does = (text.format(a=a, b=b) for text in pick(rng, COLLISIONS))
        return _fill(rng, TEMPLATES, scene, doing=doing, does=does)
    behind = " behind a bar" if scene.occluder is not None else ""
    phrases = [(name, *_motion_phrase(item, rng, synonyms=False)) for name, item in items]
    doing = " and ".join(f"{name} {participle}{behind}" for name, participle, _ in phrases)
    does = " and ".join(f"{name} {third_person}{behind}" for name, _, third_person in phrases)
    return _fill(rng, TEMPLATES, scene, doing=doing, does=does)


def _axis_direction(dx: float, dy: float) -> str:
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "up" if dy < 0 else "down"


def captions(scene: Scene, n: int, rng: np.random.Generator) -> list[str]:
    """`n` different wordings; the only one where a scenario has one."""
    assert n >= 1, n
    if scene.scenario in FIXED:
        n = 1
    found: dict[str, None] = {}
    while len(found) < n:
        found[caption(scene, rng)] = None
    return list(found)
