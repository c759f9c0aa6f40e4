"""Numbers printed in arXiv 2512.05534, and what can be said of ours beside them.

Shares and mean inner products of the *encoder*, on the features that were not anchored. The paper does not print its optimiser,
learning rate, batch, number of steps, initialisation, decoder constraint, penalties, k or number of seeds.
"""

from typing import NamedTuple

METHODS = ("ReLU", "JumpReLU", "TopK", "BatchTopK", "Matryoshka")
WITHIN = {"M_GT": 0.02, "M_IP": 0.01}  # as near as counts as reproduced


class Published(NamedTuple):
    """A printed M_GT (share) and M_IP; `contradicted` says which other printed number it cannot stand beside."""

    M_GT: float | None
    M_IP: float | None
    contradicted: str = ""


def verdict(printed: float | None, ours: float, kind: str, contradicted: str = "") -> str:
    """ "reproduced", "differs", "not specified" (nothing was printed) or "contradicts itself"."""
    if printed is None:
        return "not specified"
    if contradicted:
        return "contradicts itself"
    return "reproduced" if abs(printed - ours) <= WITHIN[kind] else "differs"


def _pairs(rows: dict, contradicted: dict | None = None) -> dict[tuple, Published]:
    """{(row, anchored): Published} from {row: (M_GT %, M_IP, M_GT % anchored, M_IP anchored)}."""
    why, table = contradicted or {}, {}
    for row, (gt, ip, gt_anchored, ip_anchored) in rows.items():
        table[row, False] = Published(gt / 100, ip, why.get(row, ""))
        table[row, True] = Published(gt_anchored / 100, ip_anchored, why.get(row, ""))
    return table


ALONE = "56.42 % is no multiple of 1/1000 and 57.71 % none of 1/970: no single run of 1,000 features"
TABLE1 = _pairs(
    {
        "ReLU": (0.0, 0.205, 0.0, 0.246),
        "JumpReLU": (0.0, 0.237, 0.0, 0.333),
        "TopK": (84.90, 0.983, 87.63, 0.986),
        "BatchTopK": (84.80, 0.981, 89.38, 0.988),
        "Matryoshka": (83.70, 0.982, 87.32, 0.985),
        "Transcoder": (23.60, 0.838, 25.05, 0.838),
        "Crosscoder": (56.42, 0.940, 57.71, 0.941),
    },
    {"Crosscoder": ALONE},
)

TABLE_V2 = {  # arXiv 2512.05534v2, table 1: mean best inner product over encoder directions
    ("bounded", False): Published(None, 0.256),
    ("bounded", True): Published(None, 0.284),
    ("negative", False): Published(None, 0.235),
    ("negative", True): Published(None, 0.260),
}

INTEGERS = "its shares are integers over all n features, against 'only features not used for anchoring', and no tau fits both columns"
TABLE4 = _pairs(
    {
        800: (0.0, 0.361, 100.00, 0.436),
        900: (0.0, 0.298, 98.89, 0.345),
        1000: (0.0, 0.254, 85.50, 0.292),
        1100: (0.0, 0.223, 58.09, 0.258),
        1200: (0.0, 0.203, 30.58, 0.233),
        1300: (0.0, 0.192, 15.23, 0.216),
        1400: (0.0, 0.181, 8.57, 0.207),
    },
    dict.fromkeys(range(800, 1500, 100), INTEGERS),
)

TABLE5 = _pairs(
    {
        ("ReLU", 0.05): (0.0, 0.205, 0.0, 0.246),
        ("ReLU", 0.2): (0.0, 0.204, 0.0, 0.245),
        ("ReLU", 0.5): (0.0, 0.203, 0.0, 0.243),
        ("JumpReLU", 0.05): (0.0, 0.239, 0.0, 0.326),
        ("JumpReLU", 0.2): (0.0, 0.237, 0.0, 0.333),
        ("JumpReLU", 0.5): (0.0, 0.237, 0.0, 0.325),
        ("TopK", 0.05): (84.3, 0.982, 87.3, 0.985),
        ("TopK", 0.2): (85.2, 0.984, 86.8, 0.986),
        ("TopK", 0.5): (84.2, 0.982, 88.2, 0.987),
        ("BatchTopK", 0.05): (86.1, 0.984, 87.5, 0.986),
        ("BatchTopK", 0.2): (84.7, 0.981, 90.7, 0.989),
        ("BatchTopK", 0.5): (83.7, 0.981, 89.6, 0.987),
        ("Matryoshka", 0.05): (83.8, 0.982, 85.8, 0.985),
        ("Matryoshka", 0.2): (84.7, 0.983, 87.6, 0.986),
        ("Matryoshka", 0.5): (83.9, 0.982, 86.4, 0.985),
    }
)

SAME = "equals table 1 digit for digit, which fits 30 anchors, and this table says 100"
TABLE6 = _pairs(  # its column "S" is the probability that a feature is active
    {
        ("ReLU", 0.005): (0.0, 0.231, 0.0, 0.326),
        ("ReLU", 0.01): (0.0, 0.205, 0.0, 0.246),
        ("ReLU", 0.1): (0.0, 0.186, 0.0, 0.191),
        ("JumpReLU", 0.005): (11.8, 0.890, 74.8, 0.970),
        ("JumpReLU", 0.01): (0.0, 0.237, 0.0, 0.333),
        ("JumpReLU", 0.1): (0.0, 0.191, 0.0, 0.193),
        ("TopK", 0.005): (82.2, 0.978, 84.3, 0.981),
        ("TopK", 0.01): (84.90, 0.983, 87.63, 0.986),
        ("TopK", 0.1): (98.8, 0.981, 98.4, 0.979),
        ("BatchTopK", 0.005): (80.5, 0.976, 83.2, 0.980),
        ("BatchTopK", 0.01): (84.80, 0.981, 89.38, 0.988),
        ("BatchTopK", 0.1): (95.6, 0.975, 96.2, 0.976),
        ("Matryoshka", 0.005): (79.3, 0.974, 86.1, 0.983),
        ("Matryoshka", 0.01): (83.70, 0.982, 87.32, 0.985),
        ("Matryoshka", 0.1): (99.7, 0.991, 99.7, 0.991),
    },
    {(method, 0.01): SAME for method in METHODS},
)

DEFAULT_K = "86.7 % here and 84.9 % in table 1: the k of the other tables is none of these three"
TABLE7 = _pairs(
    {32: (100.0, 0.999, 100.0, 0.999), 64: (93.9, 0.992, 93.4, 0.991), 128: (86.7, 0.986, 88.0, 0.987)},
    {128: DEFAULT_K},
)
