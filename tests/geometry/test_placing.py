"""Adapters in a plane: distances by closed forms, whatever the order, and groups of one initial A."""

import numpy as np
import pytest

from lora_lab.errors import OptionError
from lora_lab.geometry.placing import classical, groups_of, neighbours


def distances(points):
    return np.linalg.norm(points[:, None] - points, axis=-1)


def test_two_adapters_and_the_base_keep_all_their_distances():
    """Three points always lie in a plane: the base at ‖ΔW‖ from each, and the two at √(9 + 16 − 2 · 2)."""
    plane = classical(np.array([[9.0, 2], [2, 16]]))
    np.testing.assert_allclose(distances(plane.points), [[0, 21**0.5, 3], [21**0.5, 0, 4], [3, 4, 0]], atol=1e-12)
    assert plane.held == pytest.approx(1)
    assert (np.abs(plane.points).max(0) == plane.points.max(0)).all()


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_points_are_the_two_leading_principal_components(size):
    vectors = np.random.default_rng(0).normal(size=(6, 9)) * [9, 5, 1, 1, 1, 1, 1, 1, 1] * size
    plane = classical(vectors @ vectors.T)
    whole = np.vstack([vectors, np.zeros(9)])
    centred = whole - whole.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(plane.points), np.abs(u[:, :2] * s[:2]), rtol=1e-6, atol=1e-7 * size)
    assert plane.held == pytest.approx((s[:2] ** 2).sum() / (s**2).sum())
    order = [3, 0, 5, 1, 2, 4]
    turned = classical(vectors[order] @ vectors[order].T)
    np.testing.assert_allclose(distances(turned.points[:6]), distances(plane.points[order]), rtol=1e-6)


def test_nothing_lies_where_all_began():
    plane = classical(np.zeros((3, 3)))
    assert (plane.points == 0).all()
    assert plane.held == 0
    assert classical(np.array([[4.0]])).points[:, 0] == pytest.approx([1, -1])


def test_neighbours_of_two_clusters_are_their_own():
    rng = np.random.default_rng(0)
    vectors = np.vstack([rng.normal(size=(6, 40)) + 20 * side for side in rng.normal(size=(2, 40))])
    gram = vectors @ vectors.T
    points = neighbours(gram, classical(gram))
    assert points.shape == (13, 2)
    assert (points == neighbours(gram, classical(gram))).all()
    nearest = distances(points[:12])
    np.fill_diagonal(nearest, np.inf)
    assert ((nearest.argmin(1) < 6) == (np.arange(12) < 6)).all()
    with pytest.raises(OptionError, match=r"^3 adapters; t-SNE needs at least 4$"):
        neighbours(gram[:3, :3], classical(gram[:3, :3]))


def test_adapters_of_one_start_form_a_group_through_others():
    assert groups_of(6, [(0, 3), (4, 5), (3, 1)]) == [1, 1, None, 1, 2, 2]
    assert groups_of(2, []) == [None, None]
