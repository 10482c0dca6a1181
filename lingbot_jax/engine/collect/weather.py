"""Weather and time of day: named states of light, what they do to colours, and how one becomes another."""

import dataclasses

import numpy as np
from jaxtyping import Float, UInt8

from lingbot_jax.engine.collect.places import LAMPLIGHT, Mesh

FADE = 8  # frames that a change of weather takes
_PATTERN = 200.0  # map units at which a pattern on the ground has mostly faded into its mean


@dataclasses.dataclass(frozen=True)
class Weather:
    """A state of light; colours in [0, 1] or above (they are clipped last).

    Attributes:
      sentence: of captions. ambient, sun: light of the sky and of the sun. zenith, horizon: of the sky.
      halo: added to the sky around the sun. haze: share of what is seen lost per map unit, to the horizon's colour.
      snow: share of white on what faces up. lamps: of lamps and windows.
    """

    sentence: str
    ambient: tuple[float, float, float]
    sun: tuple[float, float, float]
    zenith: tuple[float, float, float]
    horizon: tuple[float, float, float]
    halo: tuple[float, float, float]
    haze: float
    snow: float = 0.0
    lamps: float = 0.0

    def towards(self, other: "Weather", share: float) -> "Weather":
        """Between this and the other; the sentence stays this one's."""
        mix = lambda a, b: (
            tuple((1 - share) * np.array(a) + share * np.array(b))
            if isinstance(a, tuple)
            else a + share * (b - a)
        )
        names = [f.name for f in dataclasses.fields(Weather) if f.name != "sentence"]
        return dataclasses.replace(self, **{n: mix(getattr(self, n), getattr(other, n)) for n in names})


WEATHERS = {
    "sun": Weather(
        sentence="It is sunny.",
        ambient=(0.50, 0.54, 0.64),
        sun=(0.66, 0.61, 0.48),
        zenith=(0.20, 0.46, 0.88),
        horizon=(0.74, 0.87, 0.97),
        halo=(0.30, 0.26, 0.12),
        haze=0.0008,
    ),
    "fog": Weather(
        sentence="It is foggy.",
        ambient=(0.72, 0.73, 0.74),
        sun=(0.08, 0.08, 0.08),
        zenith=(0.74, 0.77, 0.79),
        horizon=(0.80, 0.82, 0.83),
        halo=(0.05, 0.05, 0.04),
        haze=0.0055,
    ),
    "night": Weather(
        sentence="It is night.",
        ambient=(0.22, 0.27, 0.46),
        sun=(0.12, 0.15, 0.25),
        zenith=(0.03, 0.05, 0.16),
        horizon=(0.15, 0.20, 0.42),
        halo=(0.06, 0.07, 0.10),
        haze=0.0012,
        lamps=1.0,
    ),
    "snow": Weather(
        sentence="It is snowy.",
        ambient=(0.70, 0.74, 0.82),
        sun=(0.16, 0.16, 0.16),
        zenith=(0.66, 0.73, 0.82),
        horizon=(0.86, 0.89, 0.93),
        halo=(0.06, 0.06, 0.05),
        haze=0.0020,
        snow=0.92,
    ),
    "dusk": Weather(
        sentence="It is dusk.",
        ambient=(0.42, 0.33, 0.44),
        sun=(0.66, 0.38, 0.18),
        zenith=(0.24, 0.22, 0.48),
        horizon=(0.98, 0.58, 0.36),
        halo=(0.35, 0.22, 0.02),
        haze=0.0014,
        lamps=0.55,
    ),
}


def light(mesh: Mesh, weather: Weather) -> tuple[Float[np.ndarray, "v 3"], Float[np.ndarray, "v 3"]]:
    """Colours of the corners, near by and far off, before haze."""
    total = mesh.ambient[:, None] * weather.ambient + mesh.sun[:, None] * weather.sun
    total = total + (weather.lamps * 0.8 * np.minimum(mesh.lamp, 1.0))[:, None] * LAMPLIGHT
    white = (weather.snow * mesh.up)[:, None]
    shine = np.minimum(1.0, weather.lamps * mesh.glow.max(-1, keepdims=True))
    paint = lambda albedo: (
        (1 - shine) * (albedo * (1 - white) + 0.95 * white) * total + shine * np.maximum(mesh.glow, 0.0)
    )
    return paint(mesh.albedo), paint(mesh.far)


def through_air(
    near: Float[np.ndarray, "v 3"],
    far: Float[np.ndarray, "v 3"],
    distance: Float[np.ndarray, "v"],
    weather: Weather,
) -> UInt8[np.ndarray, "v 3"]:
    """Colours as they are seen from so many map units away."""
    fade = np.exp(-((distance / _PATTERN) ** 2))[:, None]
    clear = np.exp(-weather.haze * distance)[:, None]
    colour = clear * (fade * near + (1 - fade) * far) + (1 - clear) * np.array(weather.horizon)
    return (np.clip(colour, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def sky(
    directions: Float[np.ndarray, "v 3"], sun: Float[np.ndarray, "3"], weather: Weather
) -> UInt8[np.ndarray, "v 3"]:
    """Colours of the sky in unit directions."""
    rise = np.clip(directions[:, 2:], 0.0, 1.0) ** 0.6
    around = np.clip(directions @ sun, 0.0, 1.0)[:, None] ** 6
    colour = (
        (1 - rise) * np.array(weather.horizon)
        + rise * np.array(weather.zenith)
        + around * np.array(weather.halo)
    )
    return (np.clip(colour, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
