"""Augmentation against NumPy: what each change does, how often, and that it follows the example's own key."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.augmentation import Augmentation, box, crop, cutout, flip, mixup, random_resized_crop, smooth
from trainer.errors import UserError

HEIGHT, WIDTH, CHANNELS = 7, 5, 2
crop_by = jax.jit(crop, static_argnums=2)
places = jax.jit(  # of random crops, for the numbers that each draws from
    lambda draws, *sizes: jax.vmap(lambda one: jnp.stack(box(one, *sizes)))(draws),
    static_argnums=(1, 2, 3),
)


def images(examples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.1, 1, (examples, HEIGHT, WIDTH, CHANNELS)).astype(np.float32)


def keys(examples: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), examples)


def shifted_by(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """The image shifted and padded with zeros, by NumPy."""
    rolled = np.roll(image, (down, right), axis=(0, 1))
    lines, columns = np.arange(HEIGHT) - down, np.arange(WIDTH) - right
    inside = ((lines >= 0) & (lines < HEIGHT))[:, None] & ((columns >= 0) & (columns < WIDTH))
    return np.where(inside[..., None], rolled, 0)


def offsets(before: np.ndarray, after: np.ndarray, farthest: int) -> list[tuple[int, int]]:
    """All shifts of up to `farthest` pixels that turn `before` into `after`."""
    distances = range(-farthest, farthest + 1)
    return [(y, x) for y in distances for x in distances if np.array_equal(shifted_by(before, y, x), after)]


def test_a_crop_by_nothing_is_the_identity():
    before = images(6)
    np.testing.assert_array_equal(crop_by(jnp.asarray(before), keys(6), 0), before)


@pytest.mark.parametrize("most", [1, 2, 4])
def test_each_image_is_moved_by_at_most_the_given_offset_and_zeros_come_in(most):
    examples = 40
    before = images(examples)
    after = np.asarray(crop_by(jnp.asarray(before), keys(examples), most))
    assert after.shape == before.shape
    for one, other in zip(before, after, strict=True):
        [(down, right)] = offsets(one, other, farthest=most + 1)
        assert max(abs(down), abs(right)) <= most


def test_all_offsets_of_both_axes_come_up_about_equally_often():
    examples = 1800
    before = np.tile(images(1), (examples, 1, 1, 1))
    after = np.asarray(crop_by(jnp.asarray(before), keys(examples), 1))
    counts = [
        sum(np.array_equal(image, shifted_by(before[0], y, x)) for image in after)
        for y in (-1, 0, 1)
        for x in (-1, 0, 1)
    ]
    assert sum(counts) == examples
    # 200 expected of each, with a standard deviation of 13.
    assert min(counts) > 140
    assert max(counts) < 260


def test_an_image_is_itself_or_its_mirror_image_as_often_as_asked():
    before = images(1000)
    after = np.asarray(jax.jit(flip, static_argnums=2)(jnp.asarray(before), keys(1000), 0.25))
    is_flipped = (after == before[:, :, ::-1]).all((1, 2, 3))
    assert (is_flipped | (after == before).all((1, 2, 3))).all()
    assert 200 < is_flipped.sum() < 300  # 250 expected, with a standard deviation of 14


def test_cutout_fills_one_square_whose_centre_is_any_pixel():
    before, side = images(1000), 3
    fill = np.array([7.0, 8.0], np.float32)
    after = np.asarray(jax.jit(cutout, static_argnums=2)(jnp.asarray(before), keys(1000), side, jnp.asarray(fill)))
    filled = (after == fill).all(-1)
    np.testing.assert_array_equal(after[~filled], before[~filled])
    centres = np.zeros((HEIGHT, WIDTH), int)
    squares = {  # where a square with this centre is inside the image
        cells.tobytes(): (y, x)
        for y in range(HEIGHT)
        for x in range(WIDTH)
        for cells in [np.abs(np.indices((HEIGHT, WIDTH)) - np.array([y, x])[:, None, None]).max(0) <= 1]
    }
    for cells in filled:
        centres[squares[cells.tobytes()]] += 1
    assert centres.min() > 8  # 1000/35 = 29 expected, with a standard deviation of 5
    assert centres.max() < 60


@pytest.mark.parametrize(("height", "width"), [(10, 10), (30, 40), (10, 50), (64, 16)])
def test_a_random_crop_lies_inside_the_image_with_the_area_and_shape_asked_for(height, width):
    draws = np.random.default_rng(0).uniform(size=(4000, 4)).astype(np.float32)
    top, left, lines, columns = np.asarray(places(draws, height, width, 0.08), np.float64).T
    rounding = 1e-4 * max(height, width)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + lines <= height + rounding).all()
    assert (left + columns <= width + rounding).all()
    area, ratio = lines * columns / (height * width), columns / lines
    largest = min(1, 4 / 3 * height / width, 4 / 3 * width / height)
    assert (area >= 0.08 - 1e-5).all()
    # Uniform: the mean and the standard deviation are those of an interval.
    np.testing.assert_allclose(area.mean(), (0.08 + largest) / 2, rtol=0.03)
    np.testing.assert_allclose(area.std(), (largest - 0.08) / np.sqrt(12), rtol=0.05)
    assert (ratio > 3 / 4 - 1e-4).all()
    assert (ratio < 4 / 3 + 1e-4).all()
    small = area < 0.5 * largest
    if height == width:  # small crops of a square are as often wide as high
        assert abs(np.log(ratio[small]).mean()) < 0.02


def resized(image: np.ndarray, place: Any, size: tuple[int, int]) -> np.ndarray:
    """The rectangle of an image, resized linearly with antialiasing: a triangle over each pixel, in float64."""
    top, left, lines, columns = (float(x) for x in place)

    def weights(start: float, length: float, size: int, count: int) -> np.ndarray:
        step = length / size  # input pixels for one of the result
        middle = start + (np.arange(size) + 0.5) * step
        distance = np.abs(middle[:, None] - (np.arange(count) + 0.5)) / max(step, 1)
        triangle = np.maximum(1 - distance, 0)
        return triangle / triangle.sum(1, keepdims=True)

    rows, cols = weights(top, lines, size[0], image.shape[0]), weights(left, columns, size[1], image.shape[1])
    return np.einsum("ay,bx,yxc->abc", rows, cols, image.astype(np.float64))


def test_a_random_resized_crop_is_the_rectangle_resized_by_float64_numpy():
    before = images(20)
    resize = jax.jit(random_resized_crop, static_argnums=2)
    after = np.asarray(resize(jnp.asarray(before), keys(20), 0.1))
    draws = jax.jit(jax.vmap(lambda key: jax.random.uniform(key, (4,))))(keys(20))
    for image, place, found in zip(before, np.asarray(places(draws, HEIGHT, WIDTH, 0.1)), after, strict=True):
        np.testing.assert_allclose(found, resized(image, place, (HEIGHT, WIDTH)), atol=2e-5)
    whole = np.asarray(resize(jnp.asarray(before[:, :WIDTH]), keys(20), 1.0))
    np.testing.assert_allclose(whole, before[:, :WIDTH], atol=1e-5)  # all of a square


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_means_neighbours_with_a_share_from_the_beta_distribution(alpha):
    examples = 2000
    before, labels = images(examples), np.eye(3, dtype=np.float32)[np.arange(examples) % 3]
    mix = jax.jit(mixup, static_argnums=3)
    after, targets = (np.asarray(x) for x in mix(jnp.asarray(before), jnp.asarray(labels), keys(examples), alpha))
    neighbours = np.arange(examples) ^ 1
    share = np.einsum("nc,nc->n", targets, labels)  # neighbours are never of one class here
    np.testing.assert_allclose(targets, share[:, None] * labels + (1 - share[:, None]) * labels[neighbours], atol=1e-6)
    own = share[:, None, None, None]
    np.testing.assert_allclose(after, own * before + (1 - own) * before[neighbours], atol=1e-6)
    assert share.mean() == pytest.approx(0.5, abs=0.04)
    assert share.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)


def test_an_odd_number_of_examples_has_no_pairs():
    with pytest.raises(UserError, match="mixup pairs the examples of a microbatch; 3 is an odd number"):
        mixup(jnp.asarray(images(3)), jnp.ones((3, 2)), keys(3), 1.0)


def test_smoothing_spreads_its_share_over_all_classes():
    targets = np.array([[1, 0, 0, 0], [0.3, 0, 0.7, 0]], np.float32)
    np.testing.assert_allclose(smooth(jnp.asarray(targets), 0.1), 0.9 * targets + 0.025, rtol=1e-6)


def test_a_changed_image_depends_on_its_own_key_alone_and_every_change_on_another_draw():
    settings = Augmentation(random_resized_crop=0.3, crop=2, flip=0.5, cutout=3)
    change = jax.jit(settings.images)
    before, own = jnp.asarray(images(8)), keys(8)
    after = np.asarray(change(before, own))
    order = np.array([3, 0, 5, 1, 7, 4, 6, 2])
    np.testing.assert_array_equal(change(before[order], own[order]), after[order])
    assert (np.asarray(change(before, keys(8, seed=1))) != after).any((1, 2, 3)).all()
    # A flip says nothing about the crop: of flipped and other images, as many are moved to the left.
    many = keys(2000)
    corners = jnp.zeros((2000, 5, 5, 1)).at[:, 2, 0].set(1.0)  # one bright pixel, at the left
    mirrored = np.asarray(jax.jit(Augmentation(flip=0.5).images)(corners, many))[:, 2, 4, 0] == 1
    is_down = np.asarray(crop_by(corners, many, 1))[:, 3].max((1, 2)) == 1
    assert abs(is_down[mirrored].mean() - is_down[~mirrored].mean()) < 0.08


def test_nothing_is_changed_by_default():
    before = jnp.asarray(images(4))
    np.testing.assert_array_equal(Augmentation().images(before, keys(4)), before)
    assert not Augmentation(crop=1, flip=0.5).softens
    assert Augmentation(mixup=0.1).softens
    assert Augmentation(label_smoothing=0.1).softens
