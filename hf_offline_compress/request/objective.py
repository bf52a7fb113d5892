"""The objective of a rule: how errors of a weight are weighed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import CompressionError, listing

IMPORTANCES = ("none", "fisher", "l1_sensitivity")

NORMALIZATIONS = ("sum", "power", "log")


@dataclass(frozen=True)
class Objective:
    """The error measure.

    For an autoencoder the loss is cosine · CD + l2 · RMSE + l1 · L1α (arXiv 2302.04045), where CD is the mean over rows
    of 1 − cos(ŵ, w) and L1α the mean of |ŵ − w|^α with α annealed from 1 to 0.1. For closed forms it is L2 alone.

    Attributes:
        cosine: weight of the cosine distance.
        l2: weight of the root mean squared error.
        l1: weight of the annealed L1 term.
        calibrated: weight errors by the layer's real inputs: for a linear layer the second moments of its inputs,
            for an embedding how often each token occurs.
        sensitive: also weight errors by their effect on the model's output, to second order (Gauss-Newton): the
            second moments of the gradients at the layer's outputs. Needs `calibrated`.
        importance: weigh rows by gradients of the predicted probability of correct tokens (arXiv 2302.04045): "fisher",
            their squares; "l1_sensitivity", their absolute values; "none". Needs a head to take gradients from.
        parameter_wise: weight every parameter separately instead of whole rows; only for L2 and L1.
        normalization: how the rows' weights are changed where an autoencoder's loss is multiplied by them, before they
            are divided by their mean in a batch: "sum", nothing; "power", their square root; "log", log(1 + w / mean w).
    """

    cosine: float = 0.0
    l2: float = 0.0
    l1: float = 0.0
    calibrated: bool = False
    sensitive: bool = False
    importance: str = "none"
    parameter_wise: bool = False
    normalization: str = "sum"

    def __post_init__(self) -> None:
        """Reject a loss that is nothing, or rewards an error."""
        terms = (self.cosine, self.l2, self.l1)
        if min(terms) < 0 or sum(terms) <= 0:
            raise CompressionError(
                f"The objective's weights are cosine={self.cosine}, l2={self.l2}, l1={self.l1}; "
                "none may be negative and at least one must be above 0."
            )
        if self.sensitive and not self.calibrated:
            raise CompressionError("A sensitive objective must also be calibrated: both are measured on the text.")
        for name, known in (("importance", IMPORTANCES), ("normalization", NORMALIZATIONS)):
            if getattr(self, name) not in known:
                raise CompressionError(f"The {name} '{getattr(self, name)}' is unknown; known are {listing(known)}.")
        if self.calibrated and self.importance != "none":
            raise CompressionError(
                "An objective is either calibrated or weighted by an importance: both set the weight of errors."
            )
        if self.parameter_wise and self.importance == "none":
            raise CompressionError("parameter_wise needs an importance, fisher or l1_sensitivity.")
        if self.parameter_wise and self.cosine:
            raise CompressionError(
                "Parameter-wise weights cannot be used with a cosine loss, which is defined for whole rows only; use l2 or l1, "
                "or leave parameter_wise out."
            )

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of what is asked for, as `Structure.objectives` lists them."""
        asked = [name for name in ("cosine", "l2", "l1", "calibrated", "sensitive") if getattr(self, name)]
        if self.importance != "none":
            asked.append("parameter_wise" if self.parameter_wise else "importance")
        return tuple(asked)

    def without_data(self) -> Objective:
        """Return the objective for when there is no text."""
        return replace(self, calibrated=False, sensitive=False, importance="none", parameter_wise=False)


OBJECTIVES = {
    "l2": Objective(l2=1.0),
    "calibrated": Objective(l2=1.0, calibrated=True),
    "sensitive": Objective(l2=1.0, calibrated=True, sensitive=True),
    "fisher": Objective(l2=1.0, importance="fisher"),
    "l1_sensitivity": Objective(l2=1.0, importance="l1_sensitivity"),
}
