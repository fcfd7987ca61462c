"""The built-in set of images: ten forms in many colours, drawn from a seed, without a file or a download.

Each image is 32 x 32 RGB: one light form on a dark, faintly textured ground. Colour, place, size, rotation (within half
a radian) and texture vary so much that the clusters of an untrained network mix the forms: Online Deep Clustering has
something to discover.
"""

import math

import torch
import torch.nn.functional as F

FORMS = ("disc", "square", "triangle", "five-pointed star", "four-pointed star", "ring", "cross", "bar",
         "scattered dots", "half disc")
SIZE = 32  # pixels, both edges
SPLITS = {"train": (5000, 0), "val": (1000, 1)}  # images, seed


def draw_shapes(count, seed):
    """Draw `count` images, as many of each form as of any other (up to one), in a random order.

    Returns images uint8 [count, 32, 32, 3] and labels int64 [count], the index into FORMS.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count)[torch.randperm(count, generator=generator)] % len(FORMS)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    radius = uniform(8.0, 12.5, 1)
    reach = (SIZE / 2 + 1 - radius).clamp(max=3.5)  # a large form may touch the edge of the image, but not more
    centre = SIZE / 2 + reach * uniform(-1, 1, 2)
    x, y = _rotated_grid(centre, uniform(-0.5, 0.5, 1))
    x, y = x / radius, y / radius  # the form's own frame: it lies in the unit circle

    distance = torch.empty(count, SIZE * SIZE)
    dots = _scattered_dots(uniform(-0.5, 0.5, 7, 2))
    for label in range(len(FORMS)):
        rows = torch.where(labels == label)[0]
        distance[rows] = _signed_distance(FORMS[label], x[rows], y[rows], dots[rows])
    # A pixel is covered in proportion to the distance of its centre from the edge, in pixels: this smooths the edges.
    inside = (0.5 - distance * radius).clamp(0, 1).view(count, 1, SIZE, SIZE)

    ground = _colour(uniform(0, 1), uniform(0, 1), uniform(0.02, 0.15))
    ground = ground + uniform(0.01, 0.06, 1, 1, 1) * _noise(8, count, generator)
    # Stripes and a slope of brightness, in the form's frame, so that they turn with it.
    stripes = torch.sin(uniform(2, 9, 1) * (x * uniform(-1, 1, 1) + y * uniform(-1, 1, 1)) + uniform(0, 6.3, 1))
    slope = x * uniform(-0.15, 0.15, 1) + y * uniform(-0.15, 0.15, 1)
    light = 1 + (slope + uniform(0, 0.12, 1) * stripes).view(count, 1, SIZE, SIZE)
    form = _colour(uniform(0, 1), uniform(0, 0.5), uniform(0.75, 1)) * light
    images = ground + (form - ground) * inside + 0.015 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return (images * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous(), labels


def _rotated_grid(centre, angle):
    """Pixel centres [1024] in frames moved to centre [n, 2] and turned by angle [n, 1]: x and y, each [n, 1024]."""
    at = torch.arange(SIZE) + 0.5
    dx = at.repeat(SIZE) - centre[:, :1]
    dy = at.repeat_interleave(SIZE) - centre[:, 1:]
    return dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()


def _signed_distance(form, x, y, dots):
    """Distance [n, 1024] of each point to the edge of a form in the unit circle, negative inside."""
    radius = torch.hypot(x, y)
    if form == "disc":
        return radius - 0.85
    if form == "square":
        return _box(x, y, 0.76, 0.76)
    if form == "triangle":
        return _polygon(x, y, [1.0] * 3)
    if form == "five-pointed star":
        return _polygon(x, y, [1.0, 0.42] * 5)
    if form == "four-pointed star":
        return _polygon(x, y, [1.0, 0.36] * 4)
    if form == "ring":
        return (radius - 0.72).abs() - 0.2
    if form == "cross":
        return torch.minimum(_box(x, y, 0.95, 0.27), _box(x, y, 0.27, 0.95))
    if form == "bar":
        return _box(x, y, 1.0, 0.27)
    if form == "half disc":
        return torch.maximum(torch.hypot(x, y - 0.4) - 0.95, y - 0.4)
    distances = torch.hypot(x[:, None] - dots[:, :, :1], y[:, None] - dots[:, :, 1:])  # scattered dots: [n, 7, 1024]
    return distances.amin(1) - 0.22


def _box(x, y, half_width, half_height):
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _polygon(x, y, radii):
    """Signed distance to the polygon whose corners lie at equal angles, the first at the top, at the given radii."""
    angles = [2 * math.pi * k / len(radii) for k in range(len(radii))]
    corners = [(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles)]
    squared = torch.full_like(x, math.inf)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
        ex, ey = bx - ax, by - ay
        along = (((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey)).clamp(0, 1)  # nearest point of this edge
        squared = torch.minimum(squared, (x - ax - along * ex) ** 2 + (y - ay - along * ey) ** 2)
        if ay != by:  # an edge to the right of the point is crossed: once more in or out
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * ex / ey)
    return squared.sqrt() * torch.where(inside, -1.0, 1.0)


def _scattered_dots(jitter):
    """Seven places in the unit circle, one in the middle and six around, each moved by jitter [n, 7, 2] / 3."""
    angles = torch.arange(6) * math.pi / 3
    places = torch.cat([torch.zeros(1, 2), 0.68 * torch.stack([angles.cos(), angles.sin()], 1)])
    return places + jitter / 3


def _colour(hue, saturation, value):
    """Hue, saturation and value in 0..1, each [n], as RGB [n, 3, 1, 1]."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * hue[:, None]) % 6
    rgb = value[:, None] * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))
    return rgb[:, :, None, None]


def _noise(cells, count, generator):
    """Smooth gray noise [n, 1, 32, 32] of standard deviation about 1."""
    coarse = torch.randn(count, 1, cells, cells, generator=generator)
    return F.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear")
