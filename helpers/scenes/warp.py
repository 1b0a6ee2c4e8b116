"""One geometric map from the flat label to the photo: cylinder, wrinkle, rotation, perspective.

`forward` carries points of the label into the photo, `inverse` the other way; the picture is resampled along the
inverse, outlines are carried along the forward map, so that boxes are right to a pixel.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

_BILINEAR = Image.Resampling.BILINEAR


@dataclass
class Warp:
    """A pinhole camera before a flat or cylindrical label; label point (0, 0) is shown at scale 1.

    size: (width, height) of the photo in pixels. middle: photo pixel (x, y) of label point (0, 0). radius: of the
    cylinder about the vertical axis in pixels, or None. angles: yaw, pitch, roll in radians. distance: of the camera
    in pixels. wrinkle: (amplitude, wave number x, wave number y, phase), a sine that shifts the label by up to
    `amplitude` pixels; amplitude * wave number < 0.3.
    """

    size: tuple[int, int]
    middle: tuple[float, float]
    radius: float | None
    angles: tuple[float, float, float]
    distance: float
    wrinkle: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        (cy, cp, cr), (sy, sp, sr) = np.cos(self.angles), np.sin(self.angles)
        yaw = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        pitch = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
        roll = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
        self._turn = roll @ pitch @ yaw

    def rim(self) -> float:
        """How far from (0, 0) along u a cylinder is printed: a little before the camera's horizon on it."""
        assert self.radius is not None, "a plane has no rim"
        return 0.94 * self.radius * float(np.arccos(self.radius / (self.distance + self.radius)))

    def _shift(self, xy: np.ndarray) -> np.ndarray:
        amplitude, kx, ky, phase = self.wrinkle
        wave = xy @ np.array([kx, ky])
        return amplitude * np.stack([np.sin(wave + phase), np.cos(wave - phase)], axis=1)

    def _project(self, uv: np.ndarray) -> np.ndarray:
        u, v = uv[:, 0], uv[:, 1]
        if self.radius:
            turn = u / self.radius
            points = np.stack([self.radius * np.sin(turn), v, self.radius * (1 - np.cos(turn))], axis=1)
        else:
            points = np.stack([u, v, np.zeros_like(u)], axis=1)
        points = points @ self._turn.T
        return self.distance * points[:, :2] / (points[:, 2:] + self.distance) + np.array(self.middle)

    def forward(self, uv: np.ndarray) -> np.ndarray:
        """Label points [N, 2] -> photo pixels [N, 2] (x, y; may lie outside of the photo)."""
        xy = self._project(uv)
        if self.wrinkle[0]:
            for _ in range(6):
                xy = self._project(uv - self._shift(xy))
        return xy

    def inverse(self, xy: np.ndarray) -> np.ndarray:
        """Photo pixels [N, 2] -> label points [N, 2]. A ray that misses the cylinder lands past its rim."""
        rays = np.concatenate([xy - np.array(self.middle), np.full((len(xy), 1), self.distance)], 1) @ self._turn
        eye = -self.distance * self._turn[2]
        if not self.radius:
            uv = (eye - rays * (eye[2] / rays[:, 2:]))[:, :2]
        else:
            a = rays[:, 0] ** 2 + rays[:, 2] ** 2
            depth = eye[2] - self.radius
            b = eye[0] * rays[:, 0] + depth * rays[:, 2]
            c = eye[0] ** 2 + depth**2 - self.radius**2
            t = (-b - np.sqrt(np.maximum(b * b - a * c, 0))) / a
            hit = eye + rays * t[:, None]
            u = self.radius * np.arctan2(hit[:, 0], self.radius - hit[:, 2])
            past = np.hypot(hit[:, 0], self.radius - hit[:, 2]) - self.radius
            uv = np.stack([u + 3 * np.sign(u) * np.maximum(past, 0), hit[:, 1]], axis=1)
        return uv + self._shift(xy)

    def apply(self, image: Image.Image, origin: tuple[float, float]) -> Image.Image:
        """What the camera sees of a picture whose corner is label point `origin`: `size` pixels, black elsewhere.

        A flat label is one projective map; a curved one is cut into cells fine enough for half a pixel.
        """
        width, height = self.size
        if not self.radius and not self.wrinkle[0]:
            return image.transform(self.size, Image.Transform.PERSPECTIVE, self._coefficients(origin), _BILINEAR)
        across, down = (10, 64) if self.radius and not self.wrinkle[0] else (26, 26)
        xs, ys = np.append(np.arange(0, width, across), width), np.append(np.arange(0, height, down), height)
        grid = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2).astype(float)
        uv = (self.inverse(grid) - np.array(origin)).reshape(len(ys), len(xs), 2)
        quads = np.concatenate([uv[:-1, :-1], uv[1:, :-1], uv[1:, 1:], uv[:-1, 1:]], axis=2).tolist()
        xs, ys = xs.tolist(), ys.tolist()
        cells = [((xs[i], ys[j], xs[i + 1], ys[j + 1]), quads[j][i])
                 for j in range(len(ys) - 1) for i in range(len(xs) - 1)]
        return image.transform(self.size, Image.Transform.MESH, cells, _BILINEAR)

    def _coefficients(self, origin: tuple[float, float]) -> list[float]:
        """The eight numbers of Pillow's PERSPECTIVE: u = (ax + by + c) / (gx + hy + 1), v likewise."""
        w, h = self.size
        xy = np.array([[0, 0], [w, 0], [w, h], [0, h]], dtype=float)
        uv = self.inverse(xy) - np.array(origin)
        rows = [[x, y, 1, 0, 0, 0, -u * x, -u * y] for (x, y), (u, v) in zip(xy, uv, strict=True)]
        rows += [[0, 0, 0, x, y, 1, -v * x, -v * y] for (x, y), (u, v) in zip(xy, uv, strict=True)]
        return np.linalg.solve(rows, np.concatenate([uv[:, 0], uv[:, 1]])).tolist()


def outline(rect: tuple[float, float, float, float], step: float = 6.0) -> np.ndarray:
    """Points [N, 2] along the edge of `rect` (x0, y0, x1, y1), in order, at most `step` apart."""
    x0, y0, x1, y1 = rect
    across = np.linspace(0, 1, max(2, int((x1 - x0) / step) + 2))[:-1]
    down = np.linspace(0, 1, max(2, int((y1 - y0) / step) + 2))[:-1]
    top = np.stack([x0 + (x1 - x0) * across, np.full(len(across), y0)], axis=1)
    right = np.stack([np.full(len(down), x1), y0 + (y1 - y0) * down], axis=1)
    return np.concatenate([top, right, [x0 + x1, y0 + y1] - top, [x0 + x1, y0 + y1] - right])


def visible_hull(points: np.ndarray, width: float, height: float) -> np.ndarray | None:
    """The axis-aligned hull [4] (xyxy) of the part of a polygon [N, 2] inside the photo; None where nothing is.

    Sutherland and Hodgman's clipping against the four edges in turn.
    """
    low, high = points.min(0), points.max(0)
    if low.min() >= 0 and high[0] <= width and high[1] <= height:
        return np.concatenate([low, high])
    for axis, sign, limit in ((0, 1, 0.0), (0, -1, -width), (1, 1, 0.0), (1, -1, -height)):
        if not len(points):
            return None
        after = np.roll(points, -1, axis=0)
        here, there = sign * points[:, axis] - limit, sign * after[:, axis] - limit
        crosses = (here >= 0) != (there >= 0)
        cut = points + (after - points) * (here / np.where(crosses, here - there, 1))[:, None]
        both = np.stack([points, cut], axis=1).reshape(-1, 2)
        points = both[np.stack([here >= 0, crosses], axis=1).reshape(-1)]
    if not len(points):
        return None
    return np.clip(np.concatenate([points.min(0), points.max(0)]), 0, (width, height, width, height))
