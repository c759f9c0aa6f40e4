"""The classical baseline: scikit-learn's online dictionary learning behind a `SparseDictionary`.

Not a `Method`: nothing here descends a gradient, and the whole fit is one call. Mairal et al. 2009 (ICML); Beck &
Teboulle 2009 (FISTA).
"""

import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sdl_explorer.data.activations import Activations
from sdl_explorer.models.dictionary import Nonlinearity, SparseDictionary
from sdl_explorer.models.methods.pursuit import OMP


class Lasso(Nonlinearity):
    """z = argmin_{z >= 0} |x - mu - A^T z|^2 / 2 + alpha sum_i z_i, atoms a_i = rows of `W_enc`, b_enc = -A mu.

        z <- relu(y - (A A^T y - pre + alpha) / L),   y <- z + momentum (z - former z),   L = |A|_2^2

    FISTA with a restart where a step climbs; the Gram matrix is (n_latents, n_latents). `masks_only` is False: the penalty
    takes from each code, and each code depends on the others.
    """

    masks_only = False
    explains_rows = True

    def __init__(self, alpha: float = 0.1, n_iterations: int = 500):
        super().__init__()
        self.alpha, self.n_iterations = float(alpha), int(n_iterations)

    def settings(self):
        return {"alpha": self.alpha, "n_iterations": self.n_iterations}

    def forward(self, pre: Float[Tensor, "n n_latents"], *, inputs, dictionary: SparseDictionary) -> Tensor:
        gram = dictionary.W_enc @ dictionary.W_enc.T
        curvature = torch.linalg.matrix_norm(dictionary.W_enc, ord=2).square().clamp(min=torch.finfo(pre.dtype).tiny)
        codes = ahead = torch.zeros_like(pre)
        inertia = pre.new_ones(len(pre), 1)
        for _ in range(self.n_iterations):
            moved = (ahead - (ahead @ gram - pre + self.alpha) / curvature).relu()
            climbs = ((ahead - moved) * (moved - codes)).sum(dim=1, keepdim=True) > 0
            grown = torch.where(climbs, 1.0, (1 + (1 + 4 * inertia.square()).sqrt()) / 2)
            ahead = torch.where(climbs, moved, moved + (inertia - 1) / grown * (moved - codes))
            codes, inertia = moved, grown
        return codes


def learn_classically(
    activations: Activations,
    n_latents: int,
    *,
    alpha: float | int = 0.3,
    k: int | None = None,
    n_passes: int = 10,
    batch_size: int = 256,
    centre: bool = True,
    seed: int = 0,
) -> SparseDictionary:
    """scikit-learn's `MiniBatchDictionaryLearning` with codes >= 0, fitted on these rows (an SAE's).

        min over D, |D_i| <= 1, and codes >= 0 of   mean_r |x_r - mu - codes_r D|^2 / 2 + alpha sum_i codes_ri

    Decoder and encoder rows are the components, scaled to norm 1; b_dec is the mean mu, which is 0 without `centre`:
    better where silence is zero, as in generated data. sigma is `Lasso(alpha)`, or with `k` non-negative `OMP(k)` (the fit
    stays the lasso's). Atoms start as random rows. alpha is in units of the data: a latent stays silent unless it explains
    more than alpha. Cost grows with n_latents^2; a few thousand latents at most.
    """
    import sklearn
    from sklearn.decomposition import MiniBatchDictionaryLearning  # seconds to import, and needed here alone
    from sklearn.exceptions import ConvergenceWarning

    from sdl_explorer.models.formats.base import provenance  # formats import the methods

    if activations.kind != "sae":
        raise ValueError(
            f"learn_classically: these are a {activations.kind}'s rows, and dictionary learning explains its own input; give an SAE's."
        )
    if not 1 <= n_latents <= activations.n:
        raise ValueError(
            f"learn_classically: n_latents is {n_latents} and there are {activations.n} rows; the atoms start as rows, so give more."
        )
    if not 0 < alpha < float("inf"):
        raise ValueError(f"learn_classically: alpha is {alpha}; a penalty is a positive finite number.")
    if k is not None and not 1 <= k <= n_latents:
        raise ValueError(f"learn_classically: k is {k} and n_latents {n_latents}; k is a whole number from 1 to n_latents.")
    rows = activations.inputs.detach().cpu().float()
    mean = rows.mean(dim=0) * centre
    centred = rows - mean
    start = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:n_latents]
    settings: dict[str, Any] = {
        "n_components": n_latents,
        "alpha": alpha,
        "max_iter": n_passes,
        "batch_size": min(batch_size, len(rows)),
        "fit_algorithm": "cd",
        "transform_algorithm": "lasso_cd",
        "transform_max_iter": 2_000,
        "tol": 0.0,  # all passes: its early stops end at about 50 mini-batches, with a fraction of the atoms found
        "max_no_improvement": None,
        "dict_init": F.normalize(centred[start], dim=1).double().numpy(),
        "positive_code": True,
        "random_state": seed,
    }
    learner = MiniBatchDictionaryLearning(**settings)
    with warnings.catch_warnings():  # atoms that start alike leave a mini-batch's codes undetermined; the fit parts them
        warnings.simplefilter("ignore", ConvergenceWarning)
        learner.fit(centred.double().numpy())
    D = F.normalize(torch.from_numpy(learner.components_).float(), dim=1)
    sigma = Lasso(alpha) if k is None else OMP(k)
    dictionary = SparseDictionary(D, D, -D @ mean, mean, sigma).eval()
    details = {"algorithm": "MiniBatchDictionaryLearning", "alpha": alpha, "n_passes": n_passes, "centre": centre, "seed": seed}
    dictionary.provenance = provenance("native", "scikit-learn", sklearn.__version__, kind="sae", metadata=details)
    return dictionary
