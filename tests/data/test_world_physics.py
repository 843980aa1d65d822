"""The closed forms against independent arithmetic: conservation, contacts, fine stepping."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import world_physics as physics

TIMES = np.linspace(0.0, 2.0, 201)
speeds = st.floats(-40, 40)
fractions = st.floats(0, 1)


@given(start=st.floats(-100, 100), velocity=speeds)
def test_uniform_motion_covers_equal_distances_in_equal_times(start, velocity):
    path = physics.uniform(TIMES, start, velocity)
    assert path.position[0] == start
    np.testing.assert_allclose(np.diff(path.position), velocity * 0.01, atol=1e-9)
    np.testing.assert_array_equal(path.velocity, velocity)


@given(start=st.floats(-100, 100), velocity=speeds, gravity=st.floats(0.1, 50))
def test_acceleration_agrees_with_torricelli(start, velocity, gravity):
    path = physics.accelerate(TIMES, start, velocity, gravity)
    np.testing.assert_allclose(
        path.velocity**2, velocity**2 + 2 * gravity * (path.position - start), atol=1e-7
    )


@given(fraction=fractions, velocity=speeds, low=st.floats(-10, 10), room=st.floats(1, 40))
def test_reflection_stays_inside_and_keeps_kinetic_energy(fraction, velocity, low, room):
    high = low + room
    path = physics.reflect(TIMES, min(low + fraction * room, high), velocity, low, high)
    assert path.position.min() >= low - 1e-9
    assert path.position.max() <= high + 1e-9
    np.testing.assert_array_equal(path.velocity**2, velocity**2)


@given(fraction=st.floats(0.05, 0.95), velocity=speeds.filter(lambda v: abs(v) > 1))
def test_reflection_touches_a_wall_exactly_at_the_listed_times(fraction, velocity):
    low, high = 2.0, 12.0
    start = low + fraction * (high - low)
    path = physics.reflect(TIMES, start, velocity, low, high)
    at_contact = physics.reflect(np.array(path.contacts), start, velocity, low, high).position
    np.testing.assert_allclose(np.minimum(at_contact - low, high - at_contact), 0, atol=1e-9)
    # Walls alternate, starting with the one that the object moves towards.
    walls = [high, low] if velocity > 0 else [low, high]
    expected = [walls[k % 2] for k in range(len(path.contacts))]
    np.testing.assert_allclose(at_contact, expected, atol=1e-9)
    # Between two contacts the object crosses the whole room; none is left out.
    np.testing.assert_allclose(np.diff(path.contacts), (high - low) / abs(velocity), atol=1e-9)
    travelled = abs(velocity) * TIMES[-1]
    first = abs(walls[0] - start)
    assert len(path.contacts) == int(np.floor((travelled - first) / (high - low) + 1))


def test_reflection_by_hand():
    path = physics.reflect(np.array([0.0, 1.0, 2.0, 3.0, 4.0]), 6.0, 3.0, 0.0, 10.0)
    np.testing.assert_allclose(path.position, [6, 9, 8, 5, 2])
    np.testing.assert_allclose(path.velocity, [3, 3, -3, -3, -3])
    np.testing.assert_allclose(path.contacts, [4 / 3])
    path = physics.reflect(np.array([0.0, 1.0, 2.0]), 1.0, -4.0, 0.0, 10.0)
    np.testing.assert_allclose(path.position, [1, 3, 7])
    np.testing.assert_allclose(path.velocity, [-4, 4, 4])


drops = {
    "height": st.floats(0.5, 30),
    "velocity": st.floats(-10, 20),
    "gravity": st.floats(2, 40),
    "restitution": st.floats(0.3, 1.0),
}


def energy(path, gravity, floor):
    return 0.5 * path.velocity**2 + gravity * (floor - path.position)


@given(**drops)
def test_energy_falls_only_at_contacts_and_by_the_square_of_restitution(
    height, velocity, gravity, restitution
):
    floor = 30.0
    path = physics.drop(TIMES, floor - height, velocity, gravity, floor, restitution)
    assert path.position.max() <= floor + 1e-9
    before = 0.5 * velocity**2 + gravity * height
    contacts = np.searchsorted(np.array(path.contacts), TIMES, side="right")
    flying = contacts < 40  # after more bounces the energy is down at rounding errors
    np.testing.assert_allclose(
        energy(path, gravity, floor)[flying],
        before * restitution ** (2 * contacts[flying]),
        rtol=1e-6,
        atol=1e-8 * before,
    )


@given(**drops)
def test_bounce_times_are_exact(height, velocity, gravity, restitution):
    floor = 30.0
    arguments = (floor - height, velocity, gravity, floor, restitution)
    contacts = np.array(physics.drop(TIMES, *arguments).contacts)[:20]
    at_contact = physics.drop(contacts, *arguments)
    np.testing.assert_allclose(at_contact.position, floor, atol=1e-8)
    impact = np.sqrt(velocity**2 + 2 * gravity * height)
    expected = -impact * restitution ** np.arange(1, len(contacts) + 1)
    np.testing.assert_allclose(at_contact.velocity, expected, atol=1e-7)
    # Each flight of a ball thrown up at v lasts 2 v / g.
    np.testing.assert_allclose(np.diff(contacts), -2 * expected[:-1] / gravity, atol=1e-9)


def test_drop_by_hand():
    # From 5 m at g = 10: one second down, impact at 10, rebound at 5, half a second up.
    times = np.array([0.0, 1.0, 1.5, 2.0, 2.25])
    path = physics.drop(times, 0.0, 0.0, 10.0, 5.0, 0.5)
    np.testing.assert_allclose(path.contacts, [1.0, 2.0])
    np.testing.assert_allclose(path.position, [0.0, 5.0, 3.75, 5.0, 4.6875])
    np.testing.assert_allclose(path.velocity, [0.0, -5.0, 0.0, -2.5, 0.0])


def test_the_bounces_end_where_their_geometric_series_does():
    times = np.array([2.999, 3.001, 50.0])
    path = physics.drop(times, 0.0, 0.0, 10.0, 5.0, 0.5)
    # 1 s down, then flights of 1, 1/2, 1/4 ... seconds: still from t = 3 on.
    assert 3 - path.contacts[-1] < 1e-6
    assert path.position[0] < 5.0
    np.testing.assert_array_equal(path.position[1:], 5.0)
    np.testing.assert_array_equal(path.velocity[1:], 0.0)


@given(height=st.floats(1, 30), gravity=st.floats(2, 40))
def test_an_elastic_drop_is_periodic(height, gravity):
    period = 2 * np.sqrt(2 * height / gravity)
    times = np.array([0.1, 0.1 + period, 0.1 + 3 * period])
    path = physics.drop(times, -height, 0.0, gravity, 0.0, 1.0)
    assert path.position[1:] == pytest.approx(path.position[0], abs=1e-7)


def test_drop_agrees_with_fine_stepping():
    position, velocity, step, positions = 0.0, 3.0, 1e-5, []
    for k in range(200_001):
        if k % 25_000 == 0:
            positions.append(position)
        position += velocity * step + 5.0 * step**2
        velocity += 10.0 * step
        if position > 5.0 and velocity > 0:
            velocity *= -0.7
    path = physics.drop(np.arange(9) * 0.25, 0.0, 3.0, 10.0, 5.0, 0.7)
    np.testing.assert_allclose(path.position, positions, atol=2e-3)


collisions = {
    "gap": st.floats(0, 10),
    "one": st.floats(-10, 20),
    "other": st.floats(-20, 10),
    "masses": st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
}


@given(**collisions)
def test_a_collision_keeps_momentum_and_energy_and_lets_nothing_through(gap, one, other, masses):
    paths = physics.collide(TIMES, (1.0, 4.0 + gap), (one, other), masses, 3.0)
    velocities = np.stack([path.velocity for path in paths])
    m, before = np.array(masses)[:, None], np.array([[one], [other]])
    momentum, energy = (m * velocities).sum(axis=0), (m * velocities**2).sum(axis=0)
    np.testing.assert_allclose(momentum - (m * before).sum(), 0, atol=1e-9)
    np.testing.assert_allclose(energy - (m * before**2).sum(), 0, atol=1e-8)
    assert (paths[1].position - paths[0].position).min() >= 3.0 - 1e-9
    assert paths[0].contacts == paths[1].contacts
    meets = one > other and gap <= (one - other) * TIMES[-1]
    assert len(paths[0].contacts) == meets
    for contact in paths[0].contacts:
        at, other_at = (
            path.position[0]
            for path in physics.collide(
                np.array([contact]), (1.0, 4.0 + gap), (one, other), masses, 3.0
            )
        )
        assert other_at - at == pytest.approx(3.0, abs=1e-7)


def test_collisions_by_hand():
    times = np.array([0.0, 1.0, 2.0, 3.0])
    # Equal masses exchange their velocities; a ball at rest takes all of it.
    one, other = physics.collide(times, (0.0, 4.0), (2.0, 0.0), (1.0, 1.0), 2.0)
    np.testing.assert_allclose(one.position, [0, 2, 2, 2])
    np.testing.assert_allclose(other.position, [4, 4, 6, 8])
    assert one.contacts == (1.0,)
    # Three times as heavy: 2 at 1 against 2 at -1 have a common velocity of 0.5.
    one, other = physics.collide(times, (0.0, 4.0), (1.0, -1.0), (3.0, 1.0), 2.0)
    np.testing.assert_allclose(one.velocity, [1, 0, 0, 0])
    np.testing.assert_allclose(other.velocity, [-1, 2, 2, 2])
