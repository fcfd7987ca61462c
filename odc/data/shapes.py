"""The built-in data set: ten light forms on dark ground, drawn from a seed, without a download."""

import math

import torch
import torch.nn.functional as F

SIZE = 32  # pixels, both edges
SPLITS = {"train": (5000, 0), "val": (1000, 1)}  # images, seed

# The distance of points x, y [n, 1024] from the edge of a form in the unit circle, < 0 inside.
FORMS = {
    "disc": lambda x, y, dots: torch.hypot(x, y) - 0.85,
    "square": lambda x, y, dots: _box(x, y, 0.76, 0.76),
    "triangle": lambda x, y, dots: _polygon(x, y, [1.0] * 3),
    "five-pointed star": lambda x, y, dots: _polygon(x, y, [1.0, 0.42] * 5),
    "four-pointed star": lambda x, y, dots: _polygon(x, y, [1.0, 0.36] * 4),
    "ring": lambda x, y, dots: (torch.hypot(x, y) - 0.72).abs() - 0.2,
    "cross": lambda x, y, dots: torch.minimum(_box(x, y, 0.95, 0.27), _box(x, y, 0.27, 0.95)),
    "bar": lambda x, y, dots: _box(x, y, 1.0, 0.27),
    "scattered dots": lambda x, y, dots: torch.hypot(
        x[:, None] - dots[:, :, :1], y[:, None] - dots[:, :, 1:]).amin(1) - 0.22,
    "half disc": lambda x, y, dots: torch.maximum(torch.hypot(x, y - 0.4) - 0.95, y - 0.4),
}


def draw_shapes(count, seed):
    """Images uint8 [count, 32, 32, 3] in a random order, and the FORMS in them: int64 [count]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count)[torch.randperm(count, generator=generator)] % len(FORMS)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    radius = uniform(8.0, 12.5, 1)
    centre = SIZE / 2 + (SIZE / 2 + 1 - radius).clamp(max=3.5) * uniform(-1, 1, 2)
    cos, sin = (turn := uniform(-0.5, 0.5, 1)).cos(), turn.sin()
    at = torch.arange(SIZE) + 0.5
    dx, dy = at.repeat(SIZE) - centre[:, :1], at.repeat_interleave(SIZE) - centre[:, 1:]
    x, y = (dx * cos + dy * sin) / radius, (dy * cos - dx * sin) / radius  # the form's own frame
    angles = torch.arange(6) * math.pi / 3
    ring = 0.68 * torch.stack([angles.cos(), angles.sin()], 1)
    dots = torch.cat([torch.zeros(1, 2), ring]) + uniform(-0.5, 0.5, 7, 2) / 3
    distance = torch.empty_like(x)
    for label, form in enumerate(FORMS.values()):
        rows = labels == label
        distance[rows] = form(x[rows], y[rows], dots[rows])
    inside = (0.5 - distance * radius).clamp(0, 1).view(count, 1, SIZE, SIZE)  # smooth edges
    ground = _colour(uniform(0, 1), uniform(0, 1), uniform(0.02, 0.15))
    ground = ground + uniform(0.01, 0.06, 1, 1, 1) * F.interpolate(
        torch.randn(count, 1, 8, 8, generator=generator), size=(SIZE, SIZE), mode="bilinear")
    waves = uniform(2, 9, 1) * (x * uniform(-1, 1, 1) + y * uniform(-1, 1, 1)) + uniform(0, 6.3, 1)
    slope = x * uniform(-0.15, 0.15, 1) + y * uniform(-0.15, 0.15, 1)
    light = 1 + (slope + uniform(0, 0.12, 1) * torch.sin(waves)).view(count, 1, SIZE, SIZE)
    form = _colour(uniform(0, 1), uniform(0, 0.5), uniform(0.75, 1)) * light
    noise = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    images = ground + (form - ground) * inside + 0.015 * noise
    return (images * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous(), labels


def _box(x, y, half_width, half_height):
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _polygon(x, y, radii):
    """Distance to the polygon with corners at equal angles from the top on, at these radii."""
    angles = [2 * math.pi * k / len(radii) for k in range(len(radii))]
    corners = [(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles)]
    squared = torch.full_like(x, math.inf)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
        ex, ey = bx - ax, by - ay
        along = (((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        squared = torch.minimum(squared, (x - ax - along * ex) ** 2 + (y - ay - along * ey) ** 2)
        if ay != by:  # an edge to the right of the point is crossed: once more in or out
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * ex / ey)
    return squared.sqrt() * torch.where(inside, -1.0, 1.0)


def _colour(hue, saturation, value):
    """Hue, saturation and value in 0..1, each [n], as RGB [n, 3, 1, 1]."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * hue[:, None]) % 6
    rgb = value[:, None] * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))
    return rgb[:, :, None, None]
