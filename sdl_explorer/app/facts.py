"""Tables and sentences about a session: every number on screen is one of these."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from sdl_explorer.labels import Label, Labels
from sdl_explorer.views.theme import classify, token
from sdl_explorer.views.words import count

STATUS_COLUMNS = ("latent", "status", "firing_rate", "mean_activation", "samples_since_fired")


@dataclass(frozen=True)
class Gathered:
    """What one view draws. `pending`: something is still being computed. `key` changes when any of the values does."""

    key: tuple
    values: tuple
    pending: bool
    error: Exception | None
    step: int | None
    note: str = ""


def latent_table(dictionary, health, alignment, tau: float) -> pd.DataFrame:
    """One row per latent: status, rate, norms, and where there is something to compare with, the best match of both sides."""
    norm = lambda rows: rows.detach().float().norm(dim=1).cpu().numpy()
    table = pd.DataFrame(
        {
            "latent": np.arange(health.n_latents),
            "status": classify(health, alignment, None, tau),
            "firing_rate": health.firing_rate,
            "mean_activation": health.mean_activation,
            "samples_since_fired": health.samples_since_fired,
            "encoder_norm": norm(dictionary.W_enc),
            "decoder_norm": norm(dictionary.W_dec),
            "encoder_response": health.encoder_response,
            "decoder_response": health.decoder_response,
        }
    )
    if alignment is not None:
        per = alignment.per_latent
        names = np.array(alignment.names, dtype=object)
        table["decoder_feature"], table["decoder_feature_name"] = per.decoder_feature, names[per.decoder_feature]
        table["decoder_cosine"] = per.decoder_cosine
        table["encoder_feature"], table["encoder_feature_name"] = per.encoder_feature, names[per.encoder_feature]
        table["encoder_cosine"] = per.encoder_cosine
        table["response_feature"], table["response_cosine"] = per.response_feature, per.response_cosine
    return table


def labelled(table: pd.DataFrame, labels: Labels) -> pd.DataFrame:
    """With what a person said of each latent, where anything was said."""
    said = {label.about[0]: label for label in labels if len(label.about) == 1}
    if not said:
        return table
    of = [said.get(i, Label((i,), "")) for i in table["latent"].tolist()]
    return table.assign(label=[one.says for one in of], note=[one.note for one in of])


def latent_lines(row: pd.Series, word: str) -> list[str]:
    """What the inspector says about one latent, from its row of the latent table; `word` is 'feature' or 'anchor'."""
    status = token(row["status"])
    fires = (
        f"Fires on {row['firing_rate']:.2%} of rows, mean activation {row['mean_activation']:.3g}."
        if row["firing_rate"] > 0
        else f"Silent in {count(row['samples_since_fired'])} samples: rate below {3 / max(row['samples_since_fired'], 1):.1g} at 95 %."
    )
    lines = [f"{status.shape} {status.word}: {status.meant('decoder_feature' in row)}.", fires]
    lines.append(f"Norms: encoder {row['encoder_norm']:.3f}, decoder {row['decoder_norm']:.3f}.")
    if "decoder_feature" in row:
        lines.append(f"Decoder writes {word} {row['decoder_feature_name']}: cosine {row['decoder_cosine']:.3f}.")
        lines.append(f"Encoder reads {word} {row['encoder_feature_name']}: cosine {row['encoder_cosine']:.3f}.")
    if row["firing_rate"] > 0:
        lines.append(f"Cosine to what fires it: encoder {row['encoder_response']:.3f}, decoder {row['decoder_response']:.3f}.")
    return lines


def feature_lines(feature: int | None, alignment) -> list[str]:
    """What the inspector says about the true feature (or anchor) that goes with the latent."""
    if feature is None or alignment is None or feature >= alignment.n_features:
        return []
    lines = [f"Best latents for {alignment.names[feature]}:"]
    for side in ("decoder", "encoder", "response"):
        latent, cosine = getattr(alignment, f"{side}_latent")[feature], getattr(alignment, side)[feature]
        lines.append(f"{side}: latent {latent}, cosine {cosine:.3f}")
    return lines


def describe_data(source, sample) -> str:
    """Lines about the data for the left rail."""
    truth = sample.truth
    lines = [f"{type(source).__name__}: {sample.kind}"]
    width = str(source.width_in) if source.width_in == source.width_out else f"{source.width_in} in, {source.width_out} out"
    lines.append(f"width {width}; " + ("rows generated without end" if source.n is None else f"{count(source.n)} rows"))
    if truth is None:
        lines.append("no ground truth")
    elif not truth.complete:
        lines.append(getattr(source, "summary", f"{count(truth.n_features)} features are known, and others are not"))
    else:
        parents = sum(p is not None for p in truth.parents)
        lines.append(f"ground truth: {count(truth.n_features)} features" + (f", {count(parents)} with a parent" if parents else ""))
    removed = getattr(source, "removed", None)
    if removed is not None and getattr(removed, "rows", 0):
        lines.append(f"left out: {count(removed.rows)} rows, {removed.variance:.1%} of the variance")
    return "\n".join(lines)


def describe_model(session) -> str:
    lines = [f"{session.method}", f"{count(session.n_latents)} latents, seed {session.seed}, {session.device}"]
    if session.preflight is not None:
        lines.append(f"preflight: {session.preflight.verdict}")
        if session.preflight.scale != 1:
            lines.append("open with rescale=True to read rows at that scale")
    if session.folder is not None:
        lines.append(f"{session.folder.name}: {session.disk_used / 1e6:.1f} of {session.budget / 1e6:,.0f} MB of commits")
    return "\n".join(lines)


OURS = (ValueError, TypeError, OSError, ArithmeticError, RuntimeError, ImportError)  # errors that our own sentences come as


def failure(error: Exception) -> str:
    """An error as a sentence. A message that we wrote stands alone; another one keeps its type."""
    text = str(error) or type(error).__name__
    return text if isinstance(error, OURS) else f"{type(error).__name__}: {text}"
