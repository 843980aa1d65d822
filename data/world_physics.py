"""Closed-form motion for the procedural world, along one axis at a time.

Every function maps an array of times to exact positions and velocities: nothing is integrated step
by step, so the error does not grow with the length of the clip or with its frame rate. Units are
whatever the caller uses consistently (the world uses pixels and seconds).

At the very instant of a contact the velocity is the one after it.
"""

from dataclasses import dataclass

import numpy as np

# Flights shorter than this (in units of time) are not told apart from lying still.
REST = 1e-9


@dataclass(frozen=True)
class Path1D:
    """Motion along one axis: position and velocity per time (f,), and the times of contacts."""

    position: np.ndarray
    velocity: np.ndarray
    contacts: tuple[float, ...] = ()


def uniform(times: np.ndarray, start: float, velocity: float) -> Path1D:
    """Constant velocity: x(t) = start + velocity * t."""
    return Path1D(start + velocity * times, np.full_like(times, velocity))


def accelerate(times: np.ndarray, start: float, velocity: float, gravity: float) -> Path1D:
    """Constant acceleration: x(t) = start + velocity * t + gravity * t^2 / 2."""
    position = start + velocity * times + 0.5 * gravity * times**2
    return Path1D(position, velocity + gravity * times)


def reflect(times: np.ndarray, start: float, velocity: float, low: float, high: float) -> Path1D:
    """Elastic bounces between two walls: uniform motion folded into a triangle wave.

    Args:
        times: (f,), not negative.
        start: position at time 0, in [low, high].
        velocity: before the first contact.
        low, high: where the centre is when the object touches the walls; low < high.
    """
    assert low < high, (low, high)
    assert low <= start <= high, (low, start, high)
    room = high - low
    # In units of the room, the unfolded motion meets a wall at every integer.
    unfolded = (start - low + velocity * times) / room
    if velocity < 0:
        cell = np.ceil(unfolded) - 1.0
    else:
        cell = np.floor(unfolded)
    odd = np.mod(cell, 2.0) == 1.0
    fraction = unfolded - cell
    position = low + room * np.where(odd, 1.0 - fraction, fraction)
    # A start that lies on the wall it moves away from is no contact.
    moving = np.where(odd, -velocity, velocity)
    end = float(times.max()) if len(times) else 0.0
    contacts: list[float] = []
    if velocity != 0.0:
        first = (high - start if velocity > 0 else start - low) / abs(velocity)
        period = room / abs(velocity)
        count = int(np.floor((end - first) / period)) + 1 if end >= first else 0
        contacts = [first + k * period for k in range(count)]
    return Path1D(position, moving, tuple(contacts))


def drop(
    times: np.ndarray,
    start: float,
    velocity: float,
    gravity: float,
    floor: float,
    restitution: float,
) -> Path1D:
    """Fall on a floor and bounce, each flight a parabola between exactly known contacts.

    The n-th rebound leaves the floor at restitution^n times the first impact's speed, so flights
    form a geometric series; with restitution < 1 the object lies still after its finite sum.

    Args:
        times: (f,), not negative.
        start: position at time 0 (the axis points down), at most `floor`.
        velocity: at time 0, down is positive.
        gravity: positive, down.
        floor: where the centre is when the object touches the floor.
        restitution: speed after a contact over the speed before it, in [0, 1].
    """
    assert gravity > 0, gravity
    assert 0 <= restitution <= 1, restitution
    assert start <= floor, (start, floor)
    impact = float(np.sqrt(velocity**2 + 2 * gravity * (floor - start)))
    contact = (impact - velocity) / gravity
    first = accelerate(times, start, velocity, gravity)
    position, moving = first.position.copy(), first.velocity.copy()
    end = float(times.max()) if len(times) else 0.0
    contacts: list[float] = []
    while contact <= end:
        contacts.append(contact)
        rebound = restitution * impact
        after = times >= contact
        flight = 2 * rebound / gravity
        if flight < REST:
            position[after], moving[after] = floor, 0.0
            break
        since = times[after] - contact
        position[after] = floor - rebound * since + 0.5 * gravity * since**2
        moving[after] = -rebound + gravity * since
        contact, impact = contact + flight, rebound
    return Path1D(position, moving, tuple(contacts))


def collide(
    times: np.ndarray,
    starts: tuple[float, float],
    velocities: tuple[float, float],
    masses: tuple[float, float],
    reach: float,
) -> tuple[Path1D, Path1D]:
    """Two bodies on a line that meet once, elastically: momentum and kinetic energy are kept.

    In the frame of the centre of mass an elastic collision turns both velocities round, so
    v' = 2 V - v with V = (m1 v1 + m2 v2) / (m1 + m2).

    Args:
        times: (f,), not negative.
        starts: positions at time 0, the first at least `reach` below the second.
        velocities: before the contact.
        masses: positive.
        reach: the distance of the centres at contact.
    """
    gap, closing = starts[1] - starts[0] - reach, velocities[0] - velocities[1]
    assert gap >= 0, (starts, reach)
    contact = gap / closing if closing > 0 else np.inf
    common = (masses[0] * velocities[0] + masses[1] * velocities[1]) / (masses[0] + masses[1])
    before, since = np.minimum(times, contact), np.maximum(times - contact, 0.0)
    met = times >= contact
    end = float(times.max()) if len(times) else 0.0
    contacts = (float(contact),) if contact <= end else ()
    one, other = (
        Path1D(
            start + velocity * before + (2 * common - velocity) * since,
            np.where(met, 2 * common - velocity, velocity),
            contacts,
        )
        for start, velocity in zip(starts, velocities)
    )
    return one, other
