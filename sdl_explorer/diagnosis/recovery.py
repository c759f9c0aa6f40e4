"""How well does each latent stand for a true feature? Matches, duplicates, missed features, and latents as classifiers."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis.cofiring import CoFiring, Together, true_codes, true_directions
from sdl_explorer.diagnosis.cosines import cosines_of, latent_blocks
from sdl_explorer.diagnosis.matching import Matcher
from sdl_explorer.diagnosis.observe import Accumulator, Rows, Stream, encoded, finding, observe
from sdl_explorer.diagnosis.sparse import CELLS, row_of
from sdl_explorer.models.dictionary import SparseDictionary

MERGED = 0.5  # signed cosine of a decoder row with two features that it may have merged: equal parts of two give 0.71, of four 0.5
ALONE = 4096  # features that are shown alone at once
LEAST_NORM = 1e-6  # rows below it have no ratio of norms (as in sae-lens)


@dataclass(frozen=True, repr=False)
class Recovery:
    """What `score_recovery` found. "Best" is the largest cosine with a latent's decoder row, absolute unless said otherwise.

    per latent, dead ones included:
    feature, cosine       its best feature, and the signed cosine with it
    precision, recall, f1, accuracy   of "the latent fires" as a classifier of "that feature is active"; 0 where undefined
    slope                 sum z c |W_dec| / sum c^2 over the rows where both are there, in units of the targets: 1 is faithful, less is
                          shrinkage; 0 where they never meet
    copy                  several latents with one best feature, at signed cosine tau or more: all but the best of them
    silent                latents that did not fire on these rows

    per feature:
    matching, matching_cosine   one-to-one on |cosine| (mcc is their mean); -1 and 0 where there are more features than latents
    best_latent, best_cosine    signed
    n_latents_above       latents whose decoder row has signed cosine tau or more with it: more than one is one-to-many
    classifier, classifier_f1   the latent with the best F1 for it, whatever its direction; -1 and 0 where none ever fires with it
    status                "recovered" | "one-to-many" | "merged" (none at tau; its best latent writes another feature too) | "missed"
    n_merged              other features at signed cosine 0.5 or more with the best latent, where that is not further off itself
    residual              |a w_r - recon| / a of the feature shown alone, a its median activation, less and with the data's constant

    l0, true_l0           mean number of latents that fire, and of features that are active, a row
    shrinkage             mean |recon| / |x_r| over rows that are not zero (sae-lens's meaning; `slope` is the other)
    explained_variance    1 - sum |x_r - recon|^2 / sum |x_r - mean x_r|^2, pooled; NaN where targets do not vary
    complete              no other feature is in the rows. Where some are, what is said per feature holds, and the figures over all
                          latents (mean_f1, alive_f1, uniqueness) and true_l0 count latents of unknown features as wrong
    """

    n_samples: int
    names: tuple[str, ...]
    tau: float
    feature: Int[np.ndarray, " n_latents"]
    cosine: Float[np.ndarray, " n_latents"]
    precision: Float[np.ndarray, " n_latents"]
    recall: Float[np.ndarray, " n_latents"]
    f1: Float[np.ndarray, " n_latents"]
    accuracy: Float[np.ndarray, " n_latents"]
    slope: Float[np.ndarray, " n_latents"]
    copy: Bool[np.ndarray, " n_latents"]
    silent: Bool[np.ndarray, " n_latents"]
    matching: Int[np.ndarray, " n_features"]
    matching_cosine: Float[np.ndarray, " n_features"]
    matching_note: str
    best_latent: Int[np.ndarray, " n_features"]
    best_cosine: Float[np.ndarray, " n_features"]
    n_latents_above: Int[np.ndarray, " n_features"]
    classifier: Int[np.ndarray, " n_features"]
    classifier_f1: Float[np.ndarray, " n_features"]
    status: np.ndarray
    n_merged: Int[np.ndarray, " n_features"]
    residual: Float[np.ndarray, " n_features"]
    l0: float
    true_l0: float
    shrinkage: float
    explained_variance: float
    complete: bool = True

    n_features = property(lambda self: len(self.names), doc="True features.")
    n_latents = property(lambda self: len(self.feature), doc="Latents compared.")
    mcc = property(lambda self: float(self.matching_cosine.sum() / min(self.n_features, self.n_latents)), doc="Mean |cos| of the matching.")
    mmcs = property(lambda self: float(self.best_cosine.mean()), doc="Mean over features of the best signed cosine.")
    uniqueness = property(lambda self: len(np.unique(self.feature)) / self.n_latents, doc="Different best features, over the latents.")
    mean_f1 = property(lambda self: float(self.f1.mean()), doc="Over all latents, those that never fire with 0.")
    alive_f1 = property(lambda self: _mean(self.f1[~self.silent]), doc="Over the latents that fired; 0 where none did.")
    feature_f1 = property(lambda self: float(self.classifier_f1.mean()), doc="Mean over features of the best F1 of any latent.")
    dead_fraction = property(lambda self: float(self.silent.mean()), doc="Share of the latents that did not fire on these rows.")
    verdicts = property(
        lambda self: _verdicts(self), doc="The status of each feature in words: recovered, split into k, merged with k, missed."
    )
    missed = property(lambda self: np.flatnonzero(self.status == "missed"), doc="Features that no latent stands for.")

    def __repr__(self) -> str:
        counts = ", ".join(f"{int((self.status == s).sum())} {s}" for s in ("recovered", "one-to-many", "merged", "missed"))
        features = f"{self.n_features} {'features' if self.complete else 'known features beside unknown ones'}"
        f1 = f"f1={self.mean_f1:.3f}, uniqueness={self.uniqueness:.3f}" if self.complete else f"feature_f1={self.feature_f1:.3f}"
        return (
            f"Recovery({features}, {self.n_latents} latents, {self.n_samples:,} rows: {counts} at tau={self.tau:g}; "
            f"mcc={self.mcc:.3f}, {f1}, dead {self.dead_fraction:.1%})"
        )


class _Scorer(Accumulator):
    def __init__(self, stream: Stream, *, tau=0.9, match=True):
        super().__init__(stream)
        if not 0 < tau <= 1:
            raise ValueError(f"score_recovery: tau is {tau}; it is a cosine above 0, at most 1.")
        dictionary = stream.dictionary
        self.features, self.tau = true_directions(stream.activations, dictionary, "score_recovery"), tau
        self.cofiring, self.codes = stream.share(CoFiring), true_codes(stream.activations)
        self.complete = stream.activations.truth is None or stream.activations.truth.complete
        self.matcher = Matcher(len(self.features.names), dictionary.n_latents, dictionary.device) if match else None
        self._compare()
        self.matched = self._match()  # now: it needs the weights alone, and a large matrix goes before the rows come
        self.product, self.square = torch.zeros(2, dictionary.n_latents, dtype=torch.float64)
        self.error = self.variance = self.ratio = 0.0
        self.n_ratio = 0

    def _compare(self) -> None:
        """Each decoder row's best feature and each feature's best row, in blocks of latents."""
        W_dec, targets = self.stream.dictionary.W_dec, self.features.targets
        n_latents, n_features = len(W_dec), len(targets)
        self.feature, self.cosine = torch.zeros(n_latents, dtype=torch.int64), torch.zeros(n_latents)
        self.best_latent, self.best_cosine = torch.full((n_features,), -1), torch.full((n_features,), -torch.inf)
        self.above, self.n_near = torch.zeros(n_features, dtype=torch.int64), torch.zeros(n_latents, dtype=torch.int64)
        for latents, _ in latent_blocks(n_features, torch.zeros(n_latents, dtype=torch.bool, device=W_dec.device)):
            cosines = cosines_of(W_dec[latents], targets)
            best = cosines.abs().argmax(dim=0)
            where = latents.cpu()
            self.feature[where], self.cosine[where] = best.cpu(), cosines.gather(0, best[None])[0].cpu()
            top, at = (part.cpu() for part in cosines.max(dim=1))
            better = top > self.best_cosine
            self.best_latent[better], self.best_cosine[better] = where[at[better]], top[better]
            self.above += (cosines >= self.tau).sum(dim=1).cpu()
            self.n_near[where] = (cosines >= MERGED).sum(dim=0).cpu()
            if self.matcher:
                self.matcher.add(cosines, latents)
            self.stream.pulse()

    def _match(self) -> tuple[np.ndarray, np.ndarray, str]:
        """Each feature's latent and |cosine|, and how it was found."""
        matcher, self.matcher = self.matcher, None
        if matcher is None:
            return *_no_matching(len(self.features.names)), "matching was not asked for"
        return *matcher.solve(signed=False), matcher.note

    def add(self, rows: Rows) -> None:
        latent, row, value = (part.cpu() for part in rows.entries)
        codes = self.codes[rows.start : rows.start + rows.n].cpu()
        code = codes[row, self.feature[latent]].double()
        self.product += torch.bincount(latent, weights=value.double() * code, minlength=rows.n_latents)
        self.square += torch.bincount(latent, weights=code.square(), minlength=rows.n_latents)
        sizes, made = rows.targets.norm(dim=1).cpu().double(), rows.reconstruction.norm(dim=1).cpu().double()
        seen = sizes > LEAST_NORM
        self.ratio += (made[seen] / sizes[seen]).sum().item()
        self.n_ratio += int(seen.sum())
        self.error += (rows.targets - rows.reconstruction).square().sum(dim=1).cpu().double().sum().item()
        self.variance += (rows.targets - self.stream.target_mean).square().sum(dim=1).cpu().double().sum().item()

    def result(self) -> Recovery:
        dictionary, together = self.stream.dictionary, self.cofiring.result()
        feature, cosine = self.feature.numpy().copy(), self.cosine.numpy()  # scipy indexes by arrays that own their data
        n, fired, active = together.n, together.fired, together.active[feature]
        both = np.asarray(together.count[np.arange(len(feature)), feature]).ravel().astype(np.float64)
        classifier, classifier_f1 = _best_classifiers(together)
        matching, matching_cosine, note = self.matched
        norms = dictionary.W_dec.norm(dim=1).cpu().double() / dictionary.target_scale
        return Recovery(
            n_samples=n,
            names=self.features.names,
            tau=float(self.tau),
            feature=feature,
            cosine=cosine,
            precision=_over(both, fired),
            recall=_over(both, active),
            f1=_over(2 * both, fired + active),
            accuracy=(n - fired - active + 2 * both) / n,
            slope=_over((self.product * norms).numpy(), self.square.numpy()),
            copy=self._copies(feature, cosine),
            silent=fired == 0,
            matching=matching,
            matching_cosine=matching_cosine,
            matching_note=note,
            best_latent=self.best_latent.numpy(),
            best_cosine=self.best_cosine.numpy(),
            n_latents_above=self.above.numpy(),
            classifier=classifier,
            classifier_f1=classifier_f1,
            status=self._status(),
            n_merged=self._merged(),
            residual=self._residual(together),
            l0=float(fired.sum() / n),
            true_l0=float(together.active.sum() / n),
            shrinkage=self.ratio / self.n_ratio if self.n_ratio else 0.0,
            explained_variance=1 - self.error / self.variance if self.variance > 0 else float("nan"),
            complete=self.complete,
        )

    def _copies(self, feature: np.ndarray, cosine: np.ndarray) -> np.ndarray:
        """Latents at tau or more that are not the best of their feature."""
        return (cosine >= self.tau) & (self.best_latent.numpy()[feature] != np.arange(len(feature)))

    def _status(self) -> np.ndarray:
        """Below tau, a feature is merged when its best latent is near another feature too: one that both fire, or its parent."""
        above, merged = self.above.numpy(), self._merged() > 0
        return np.where(above > 1, "one-to-many", np.where(above == 1, "recovered", np.where(merged, "merged", "missed")))

    def _merged(self) -> np.ndarray:
        return np.where(self.best_cosine.numpy() >= MERGED, self.n_near[self.best_latent].numpy() - 1, 0)

    def _residual(self, together: Together) -> np.ndarray:
        """What the dictionary leaves of each feature shown alone. Rows may have a constant, which every feature is shown with."""
        dictionary, features = self.stream.dictionary, self.features
        median = torch.as_tensor(self.cofiring.magnitudes(1)[0], device=dictionary.device)[:, None]
        mean = torch.as_tensor(together.strength / together.n, device=dictionary.device).float()
        reads, writes = self.stream.input_mean - mean @ features.inputs, self.stream.target_mean - mean @ features.targets
        left = []
        for part in torch.arange(len(median), device=dictionary.device).split(ALONE):
            shown = Activations(reads + median[part] * features.inputs[part], writes + median[part] * features.targets[part])
            left += [(rows.targets - rows.reconstruction).norm(dim=1) for rows in encoded(dictionary, shown)]
            self.stream.pulse()
        return (torch.cat(left) / median[:, 0]).cpu().numpy()


@finding(_Scorer)
def score_recovery(dictionary: SparseDictionary, activations: Activations, tau: float = 0.9, match: bool = True) -> Recovery:
    """Each latent against its best feature, and each feature against the latents: the metrics of SynthSAEBench, one by one.

        feature_j  = argmax_k |cos(W_dec_j, w_r^k)|
        precision, recall, F1 of "z_j fires" for "codes_k > 0", k = feature_j;  undefined ones are 0
        mcc        = mean |cos| of the best one-to-one matching;  uniqueness = #distinct feature_j / n_latents
        slope_j    = sum z_j c_k |W_dec_j| / sum c_k^2 over the rows where latent and feature are both there

    `mcc`, `uniqueness`, `mean_f1`, the means of precision, recall and accuracy, `l0`, `true_l0`, `shrinkage` and
    `explained_variance` are those of `sae_lens.synthetic`, which counts latents that never fire, with 0: give them beside
    `alive_f1` and `dead_fraction`. Its cosines are absolute, and a row that writes minus a feature matches it; the statuses here are
    signed, as codes are never negative. Firing is z_j > 1e-6 |W_enc_j| |x|, which leaves out rounding at an exact zero. `match=False`
    leaves the one-to-one matching out, which is the slow part at size.

    A feature or latent that is never active scores 0, never NaN. Raises ValueError without true features, for tau outside (0, 1], and for
    what `observe` refuses. Metrics: Chanin et al. 2026 (SynthSAEBench), arXiv 2505.20254 (mcc).
    """
    return observe(dictionary, activations, [(score_recovery, {"tau": tau, "match": match})])[0]


def _best_classifiers(together: Together) -> tuple[np.ndarray, np.ndarray]:
    """The latent with the largest F1 for each feature, the first of equal ones; -1 and 0 where none fires with it."""
    best, score = np.full(len(together.active), -1, dtype=np.int64), np.zeros(len(together.active))
    latents = row_of(together.count)
    for start in range(0, len(latents), CELLS):
        span = slice(start, start + CELLS)
        latent, feature = latents[span], together.count.indices[span]
        f1 = 2 * together.count.data[span] / (together.fired[latent] + together.active[feature])
        before = score.copy()
        np.maximum.at(score, feature, f1)
        at = np.flatnonzero((f1 == score[feature]) & (f1 > before[feature]))[::-1]  # the last one written, the first latent, stays
        best[feature[at]] = latent[at]
    return best, score


def _verdicts(found: Recovery) -> np.ndarray:
    words = {"one-to-many": ("split into", found.n_latents_above), "merged": ("merged with", found.n_merged)}
    return np.array([f"{words[s][0]} {words[s][1][k]}" if s in words else s for k, s in enumerate(found.status.tolist())])


def _no_matching(n_features: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(n_features, -1, dtype=np.int64), np.full(n_features, np.nan, dtype=np.float32)


def _over(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """values / counts, 0 where the count is 0."""
    return np.divide(values, counts, out=np.zeros(len(values)), where=counts > 0)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
