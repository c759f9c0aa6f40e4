"""Does this checkpoint belong to these activations? Asked before anything is shown or trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from typing import Literal

from torch import Tensor

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis.observe import FIRES, block_rows, evaluating
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.formats.files import number

FITS_UP_TO = 0.5  # unexplained variance: at least half of the variance is explained
GAIN_FROM = 0.3  # a scale counts from this fall of the cost: a quarter of the error at equal L0
LEAST_ERROR = 1e-4  # differences below this share of the variance are no reason to rescale
MOST_L0 = 2  # times the L0 that the file states: beyond, the rows are not the ones it was trained on
SEARCH_WORK = 2e9  # multiply-adds of one evaluation in the search for the scale; rows are cut to stay below
MOST_SEARCH_ROWS = 1024
_GRID = [10 ** (step / 6) for step in range(-24, 25)]  # 1e-4 ... 1e4, six scales a decade
_GOLDEN = (sqrt(5) - 1) / 2

HookMatch = Literal["match", "mismatch", "unknown"]


@dataclass(frozen=True)
class Preflight:
    """What `preflight` found. NaN where the widths forbid measuring.

    verdict                       "fits", "fits after scaling by <s>" or "does not fit"; `reason` says why
    scale                         the input scale to set (`rewrites.scaled`); 1 unless the verdict asks for another
    best_scale                    the s of least cost, error and L0 together
    input_norm                    mean |x| of these rows
    expected_norm                 best_scale * input_norm, the mean norm at which the dictionary does best
    input_norm_ratio              input_norm / expected_norm: 1 where the activations have the scale of its training
    unexplained_variance, l0      sum |x_r - recon|^2 / sum |x_r - mean x_r|^2 and latents firing per row, at scale 1
    best_unexplained_variance, best_l0      the same at best_scale
    hooks                         "match", "mismatch" or "unknown", of the names below
    """

    verdict: str
    reason: str
    fits: bool
    widths_fit: bool
    n_samples: int
    scale: float
    best_scale: float
    input_norm: float
    expected_norm: float
    input_norm_ratio: float
    unexplained_variance: float
    l0: float
    best_unexplained_variance: float
    best_l0: float
    hooks: HookMatch
    file_hooks: tuple[str, ...]
    data_hooks: tuple[str, ...]
    assumptions: tuple[str, ...] = ()

    @property
    def stamp(self) -> str:
        """One sentence for every later result."""
        names = f"; hook names differ: {', '.join(self.file_hooks)} in the file, {', '.join(self.data_hooks)} here"
        return f"Preflight on {self.n_samples:,} rows: {self.verdict} ({self.reason}){names if self.hooks == 'mismatch' else ''}."


def preflight(dictionary: SparseDictionary, activations: Activations, hooks: Sequence[str] = ()) -> Preflight:
    """Compare a dictionary with activations: widths, hook names, input norm, error and L0, at scale 1 and at the best scale.

        UV(s)   = sum |x_r - f(s x_p) / s|^2 / sum |x_r - mean x_r|^2
        cost(s) = log UV(s) + L0(s) / d_out * log(e n_latents / L0(s))

    The second term is what it takes to say which latents fire; without it the denser code would always win, since a
    larger s moves thresholds and biases out of the way. The best s has the least cost on a logarithmic grid from 1e-4
    to 1e4, refined by golden section to half a percent, on up to 1,024 rows. It is sharp where the data have a mean
    or k is fixed, and good to a factor of two for a ReLU or JumpReLU on centred data, where a scaled dictionary is as
    good at another sparsity. Where every s gives one cost (a homogeneous nonlinearity without biases) s is 1.

    "fits after scaling by s": UV(s) <= 0.5 and cost(1) - cost(s) > 0.3. Otherwise "fits": UV(1) <= 0.5, and at most
    twice the L0 that the file states, if it does. Otherwise "does not fit". `hooks` are the names of the places that
    inputs and targets were read from.

    Widths that differ are a verdict and no error. Raises ValueError for no rows and for values that are not finite.
    """
    if activations.n == 0:
        raise ValueError("preflight: the activations have 0 rows; give at least a few hundred.")
    file_hooks = _file_hooks(dictionary)
    hooks = tuple(hooks)
    names = {"hooks": _compare(file_hooks, hooks), "file_hooks": file_hooks, "data_hooks": hooks}
    names["assumptions"] = tuple(dictionary.provenance.get("assumptions", ()))
    widths = (activations.inputs.shape[1], activations.targets.shape[1])
    if widths != (dictionary.d_in, dictionary.d_out):
        return _refused(activations.n, widths, dictionary, names)
    inputs, targets = (side.to(dictionary.W_enc) for side in (activations.inputs, activations.targets))
    if not (inputs.isfinite().all() and targets.isfinite().all()):
        raise ValueError("preflight: the activations hold values that are not finite; leave such rows out (keep= in Stored).")

    with evaluating(dictionary):
        searched = _search_rows(dictionary, len(inputs))
        part_inputs, part_targets = inputs[:searched], targets[:searched]
        best = _best_scale(lambda s: _cost(dictionary, *_measure(dictionary, part_inputs, part_targets, s)))
        error, l0 = _measure(dictionary, inputs, targets, 1.0)
        best_error, best_l0 = (error, l0) if best == 1 else _measure(dictionary, inputs, targets, best)
    gain = _cost(dictionary, error, l0) - _cost(dictionary, best_error, best_l0)
    scale, fits, reason = _judge(error, best_error, best, gain)
    if scale == 1 and fits and (stated := _stated_l0(dictionary)) and l0 > MOST_L0 * stated:
        fits, reason = False, f"{reason}, but the file says {stated:g} latents a row"
    input_norm = float(inputs.norm(dim=1).mean())
    return Preflight(
        verdict="does not fit" if not fits else "fits" if scale == 1 else f"fits after scaling by {scale:.3g}",
        reason=reason + _sparsity(best_l0 if scale != 1 else l0, dictionary),
        fits=fits,
        widths_fit=True,
        n_samples=activations.n,
        scale=scale,
        best_scale=best,
        input_norm=input_norm,
        expected_norm=best * input_norm,
        input_norm_ratio=1 / best,
        unexplained_variance=error,
        l0=l0,
        best_unexplained_variance=best_error,
        best_l0=best_l0,
        **names,
    )


def _judge(error: float, best_error: float, best: float, gain: float) -> tuple[float, bool, str]:
    """(scale, fits, reason)"""
    if best_error <= FITS_UP_TO and gain > GAIN_FROM:
        return best, True, f"unexplained variance {error:.3f} as the rows are, {best_error:.3f} scaled"
    if error <= FITS_UP_TO:
        return 1.0, True, f"unexplained variance {error:.3f}"
    scaled = f", {best_error:.3f} with inputs scaled by {best:.3g}" if best != 1 else ""
    return 1.0, False, f"unexplained variance {error:.3f}{scaled}; {FITS_UP_TO} is the limit"


def _stated_l0(dictionary: SparseDictionary) -> float | None:
    """Latents per row, where the nonlinearity or the file says it."""
    metadata = dictionary.provenance.get("metadata", {})
    details = metadata.get("training_architecture_details")
    stored = (getattr(dictionary.nonlinearity, "k", None), details.get("k") if isinstance(details, dict) else None, metadata.get("l0"))
    return next((value for value in map(number, stored) if value), None)


def _sparsity(l0: float, dictionary: SparseDictionary) -> str:
    dense = l0 > dictionary.d_in / 2
    return f", L0 {l0:.3g}" + (f" of {dictionary.d_in} dimensions: so dense a code reconstructs almost any rows" if dense else "")


def _cost(dictionary: SparseDictionary, error: float, l0: float) -> float:
    """log UV + L0 / d_out * log(e n_latents / L0)"""
    support = l0 * (1 + log(dictionary.n_latents / l0)) if l0 > 0 else 0.0
    return log(max(error, LEAST_ERROR)) + support / dictionary.d_out


def _measure(dictionary: SparseDictionary, inputs: Tensor, targets: Tensor, s: float) -> tuple[float, float]:
    """UV(s) and the number of latents that fire per row; a sum that overflows counts as no explanation at all."""
    centre = targets.mean(dim=0)
    reads = FIRES * dictionary.input_scale * dictionary.W_enc.norm(dim=1)
    error = variance = fired = 0.0
    size = block_rows(max(dictionary.n_latents, dictionary.d_in, dictionary.d_out))
    for x, target in zip(inputs.split(size), targets.split(size), strict=True):
        encoding = dictionary(x * s)
        error += float((target - encoding.reconstruction / s).square().sum().double())
        variance += float((target - centre).square().sum().double())
        row, latent, value = encoding.latents.entries()
        fired += int((value > (x * s).norm(dim=1)[row] * reads[latent]).sum())
    unexplained = error / variance if variance > 0 else float("inf")
    return (unexplained if unexplained < float("inf") else float("inf")), fired / len(inputs)


def _best_scale(cost_at: Callable[[float], float]) -> float:
    """The s of least cost, or 1 where it is not cheaper than 1."""
    costs = {s: cost_at(s) for s in _GRID}
    coarse = min(costs, key=lambda s: costs[s])
    low, high = log(coarse) - log(10) / 6, log(coarse) + log(10) / 6
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = cost_at(exp(left)), cost_at(exp(right))
    while high - low > 0.005:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = cost_at(exp(left))
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = cost_at(exp(right))
    best = min((exp((low + high) / 2), coarse), key=cost_at)
    return best if cost_at(best) < cost_at(1.0) - 1e-6 else 1.0


def _search_rows(dictionary: SparseDictionary, n: int) -> int:
    work = dictionary.n_latents * (dictionary.d_in + dictionary.d_out)
    return min(n, MOST_SEARCH_ROWS, max(32, int(SEARCH_WORK / work)))


def _file_hooks(dictionary: SparseDictionary) -> tuple[str, ...]:
    named = (dictionary.provenance.get(key) for key in ("hook_name", "hook_name_out"))
    return tuple(name for name in named if name)


def _compare(file_hooks: tuple[str, ...], data_hooks: tuple[str, ...]) -> HookMatch:
    if not file_hooks or not data_hooks:
        return "unknown"
    return "match" if file_hooks == data_hooks else "mismatch"


def _refused(n: int, widths: tuple[int, int], dictionary: SparseDictionary, names: dict) -> Preflight:
    nan = float("nan")
    reason = f"the rows have {widths[0]} and {widths[1]} columns, and the dictionary reads {dictionary.d_in} and writes {dictionary.d_out}"
    return Preflight("does not fit", reason, False, False, n, 1.0, nan, nan, nan, nan, nan, nan, nan, nan, **names)
