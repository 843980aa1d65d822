"""Draws scenes of the procedural world: antialiased by area coverage, at sub-pixel positions."""

import numpy as np

from data.world_coverage import coverage
from data.world_scene import BACKGROUNDS, COLOURS, OCCLUDER_COLOUR, Scene
from data.world_subjects import texture

__all__ = ["coverage", "render"]


def render(scene: Scene) -> np.ndarray:
    """The clip of a scene, uint8 (f h w 3). Objects are drawn in order, the last one on top, and an
    occluder before them all."""
    height, width = scene.height, scene.width
    video = np.empty((scene.num_frames, height, width, 3))
    video[:] = BACKGROUNDS[scene.background]
    for item in scene.objects:
        colour = np.asarray(COLOURS[item.colour], np.float64)
        for frame, (x, y) in zip(video, item.position):
            alpha = coverage(item.shape, item.radius, x, y, height, width)[:, :, None]
            if item.identity is not None:
                colour = texture(item, x, y, height, width)
            frame += alpha * (colour - frame)
    if scene.occluder is not None:
        left, top, right, bottom = scene.occluder
        video[:, top:bottom, left:right] = OCCLUDER_COLOUR
    return np.round(video).astype(np.uint8)
