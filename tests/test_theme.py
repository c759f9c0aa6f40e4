"""Status tokens can be told apart: WCAG contrast, and CIEDE2000 under simulated colour vision deficiencies.

The colour maths here is written from its definitions (WCAG 2.2; Machado, Oliveira & Fernandes 2009; Sharma, Wu & Dalal
2005), so that the package's colours are judged by something outside it.
"""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdl_explorer.views.theme import BACKGROUND, EDGE, MUTED, STATUSES, TEXT, WARNING, classify_statuses, diverging_limits, token

THEMES = ("light", "dark")
MACHADO = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(colour: str) -> np.ndarray:
    srgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    dark, light = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other))
    return (light + 0.05) / (dark + 0.05)


def lab(colour: str, deficiency: str) -> np.ndarray:
    seen = np.clip(np.array(MACHADO[deficiency]) @ linear(colour), 0, 1)
    xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]) @ seen
    ratio = xyz / [0.95047, 1.0, 1.08883]
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def ciede2000(one: np.ndarray, other: np.ndarray) -> float:
    (L1, a1, b1), (L2, a2, b2) = one, other
    mean_c7 = ((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2) ** 7
    g = 0.5 * (1 - np.sqrt(mean_c7 / (mean_c7 + 25.0**7)))
    a1, a2 = a1 * (1 + g), a2 * (1 + g)
    c1, c2 = np.hypot(a1, b1), np.hypot(a2, b2)
    h1, h2 = np.degrees(np.arctan2(b1, a1)) % 360, np.degrees(np.arctan2(b2, a2)) % 360
    grey = c1 * c2 == 0
    turn = 0.0 if grey else (h2 - h1 + 180) % 360 - 180
    dL, dC, dH = L2 - L1, c2 - c1, 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn / 2))
    L, C, H = (L1 + L2) / 2, (c1 + c2) / 2, h1 + h2 if grey else (h1 + turn / 2) % 360
    T = 1 - 0.17 * cosd(H - 30) + 0.24 * cosd(2 * H) + 0.32 * cosd(3 * H + 6) - 0.20 * cosd(4 * H - 63)
    rotation = -np.sin(np.radians(60 * np.exp(-(((H - 275) / 25) ** 2)))) * 2 * np.sqrt(C**7 / (C**7 + 25.0**7))
    light, chroma, hue = dL / (1 + 0.015 * (L - 50) ** 2 / np.sqrt(20 + (L - 50) ** 2)), dC / (1 + 0.045 * C), dH / (1 + 0.015 * C * T)
    return float(np.sqrt(light**2 + chroma**2 + hue**2 + rotation * chroma * hue))


def cosd(degrees: float) -> float:
    return float(np.cos(np.radians(degrees)))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
    ],
)
def test_the_distance_reproduces_published_pairs(one, other, expected):
    assert ciede2000(np.array(one), np.array(other)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("theme", THEMES)
def test_every_token_stands_out_from_the_background(theme):
    for status in STATUSES.values():
        assert contrast(status.colour(theme), BACKGROUND[theme]) >= 3, status.name
        assert contrast(status.edge(theme), BACKGROUND[theme]) >= 3, status.name


@pytest.mark.parametrize("theme", THEMES)
def test_text_can_be_read(theme):
    assert contrast(TEXT[theme], BACKGROUND[theme]) >= 7
    assert contrast(MUTED[theme], BACKGROUND[theme]) >= 4.5
    assert contrast(WARNING[theme], BACKGROUND[theme]) >= 3
    assert contrast(EDGE[theme], BACKGROUND[theme]) >= 3


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("deficiency", MACHADO)
def test_any_two_tokens_differ_under_every_deficiency(theme, deficiency):
    for one, other in combinations(STATUSES.values(), 2):
        distance = ciede2000(lab(one.colour(theme), deficiency), lab(other.colour(theme), deficiency))
        assert distance >= 10, (one.name, other.name, distance)


def test_every_token_has_its_own_shape_and_word():
    for part in ("marker", "shape", "word"):
        assert len({getattr(s, part) for s in STATUSES.values()}) == len(STATUSES)


flags = st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans(), st.floats(-1, 1) | st.just(float("nan"))), min_size=1, max_size=20)


@given(flags, st.floats(0, 1))
def test_first_matching_status_wins(rows, tau):
    dead, unseen, anchored, cosine = (np.array(column) for column in zip(*rows, strict=True))
    for (is_dead, is_unseen, is_anchored, c), status in zip(rows, classify_statuses(dead, unseen, anchored, cosine, tau), strict=True):
        expected = "dead" if is_dead else "unseen" if is_unseen else "anchored" if is_anchored else "matched" if c >= tau else "unmatched"
        assert status == expected
        assert token(status).name == expected


def test_without_matches_nobody_is_matched():
    no = np.zeros(3, dtype=bool)
    assert list(classify_statuses(no, no, no, None, 0.5)) == ["unmatched"] * 3


def test_diverging_limits_are_symmetric_and_survive_missing_values():
    assert diverging_limits([-0.2, np.nan, 0.7]) == (-0.7, 0.7)
    assert diverging_limits([np.nan, np.inf]) == (-1.0, 1.0)
    assert diverging_limits([]) == (-1.0, 1.0)
