"""Where new weights start: the units, the centre and the pre-bias that the data ask for."""

from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor

from sdl_explorer.data.activations import Activations
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.rewrites import shifted

CENTRES = ("mean", "median", "none")


def started_on(
    dictionary: SparseDictionary, rows: Activations, *, centre: str = "mean", normalise: bool = False, pre_bias: bool = False
) -> SparseDictionary:
    """A copy of new weights, made for centred rows of unit scale, that starts on these rows.

        normalise   input_scale = sqrt(d_in / mean |x_p - mean x_p|^2), target_scale likewise: a coordinate has variance 1 on average
        centre      mu is the mean or the geometric median (Bricken et al. 2023) of each side: b_enc <- b_enc - W_enc mu_in,
                    b_dec <- b_dec + mu_out, in units of the weights; "none" leaves the biases alone
        pre_bias    the decoder's bias is subtracted from the input, so that it stays the centre of both sides as it trains

    Codes of the rows are those that the given dictionary has for (x - mu) * input_scale. Raises ValueError for a pre-bias
    where the targets are not the inputs, and for a scale where the rows do not vary.
    """
    if centre not in CENTRES:
        raise ValueError(f"started_on: centre is {centre!r}; it is one of {', '.join(CENTRES)}.")
    same = rows.targets is rows.inputs
    dictionary = deepcopy(dictionary)
    if normalise:
        dictionary.input_scale = unit_scale(rows.inputs, "inputs")
        dictionary.target_scale = dictionary.input_scale if same else unit_scale(rows.targets, "targets")
    if pre_bias:
        if not same:
            raise ValueError(
                f"pre_bias is on and these are a {rows.kind}'s rows, whose targets are not its inputs: the decoder's bias lives among "
                "targets, so it cannot be subtracted from inputs. Leave pre_bias out; centre moves both sides."
            )
        dictionary.subtract_b_dec = True
    if centre == "none":
        return dictionary
    find = geometric_median if centre == "median" else lambda side: side.mean(dim=0)
    inputs = find(rows.inputs)
    return shifted(dictionary, inputs, inputs if same else find(rows.targets))


def unit_scale(rows: Float[Tensor, "n d"], name: str = "rows") -> float:
    """sqrt(d / mean_r |x_r - mean x|^2): times this, rows have a mean squared distance d from their mean."""
    rows = rows.double()
    spread = float((rows - rows.mean(dim=0)).square().sum(dim=1).mean())
    if not 0 < spread < float("inf"):
        raise ValueError(
            f"normalise is on and the mean squared distance of {len(rows):,} {name} from their mean is {spread:g}; a scale needs rows that "
            "differ and are finite. Leave normalise out, or look at the data."
        )
    return (rows.shape[1] / spread) ** 0.5


def geometric_median(rows: Float[Tensor, "n d"], tolerance: float = 1e-7, most: int = 1_000) -> Float[Tensor, " d"]:
    """argmin_y sum_r |x_r - y|, by Weiszfeld's iteration: y <- sum_r w_r x_r / sum_r w_r with w_r = 1 / |x_r - y|.

    Half of the rows may be anything at all and it stays near the others. In float64, from the coordinate-wise median, until a
    step is below `tolerance` times the mean distance, at most `most` steps. A distance counts as at least that much too,
    so that a row at y itself does no harm.
    """
    points = rows.double()
    centre = points.median(dim=0).values
    for _ in range(most):
        distance = torch.linalg.vector_norm(points - centre, dim=1)
        least = tolerance * float(distance.mean())
        if least == 0:
            break
        weight = 1 / distance.clamp(min=least)
        moved = weight @ points / weight.sum()
        step = float(torch.linalg.vector_norm(moved - centre))
        centre = moved
        if step <= least:
            break
    return centre.to(rows.dtype)
