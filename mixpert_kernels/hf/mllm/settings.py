"""What ``config.mixpert`` of a mixpertized model holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any

from mixpert_kernels.hf.expert_names import are_names
from mixpert_kernels.ops import Strategy

CALL = "mixpertize"


@dataclass(frozen=True)
class Settings:
    """Everything it takes to turn the plain model of a configuration into the mixpertized one.

    Attributes:
        num_experts: E >= 1; expert 0 is the versatile one.
        expert_layers: n >= 1, how many of the last blocks that feed the feature have E copies.
        routing: ``direct``, ``score_threshold`` or ``score_difference``.
        tau: threshold of ``score_threshold``, 0..1.
        delta: threshold of ``score_difference``, 0..1.
        against: ``runner_up`` or ``versatile``, the reference score of ``score_difference``.
        router_hidden: width of the router's hidden layer; None for a linear router.
        expert_names: E different names, for people; None for none.
    """

    num_experts: int = 4
    expert_layers: int = 2
    routing: str = "score_difference"
    tau: float = 0.5
    delta: float = 0.1
    against: str = "runner_up"
    router_hidden: int | None = None
    expert_names: list[str] | None = None

    @classmethod
    def of(cls, found: Any) -> Settings:
        """Read ``config.mixpert``.

        Raises:
            ValueError: it is no dictionary of settings.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(found, dict) or not found.keys() <= known:
            raise ValueError(f"{CALL}: config.mixpert must hold {sorted(known)}, got {found}")
        return cls(**found)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def strategy(self) -> Strategy:
        return Strategy(self.routing, self.tau, self.delta, self.against)

    def check(self, layers: int) -> None:
        """Raise ValueError unless the values fit together and ``layers`` blocks feed the feature."""
        experts, cloned, hidden = self.num_experts, self.expert_layers, self.router_hidden
        _require(_whole(experts) and experts >= 1, "num_experts", "be at least 1", experts)
        _require(
            _whole(cloned) and 1 <= cloned <= layers,
            "expert_layers",
            f"lie in 1..{layers} ({layers} layers feed the feature)",
            cloned,
        )
        wide = hidden is None or (_whole(hidden) and hidden >= 1)
        _require(wide, "router_hidden", "be None or at least 1", hidden)
        names = self.expert_names
        fits = isinstance(names, list | tuple | None) and are_names(names, experts)
        _require(fits, "expert_names", f"be {experts} different names", names)
        for name, threshold in (("tau", self.tau), ("delta", self.delta)):
            _require(isinstance(threshold, Real), name, "be a number", threshold)
        try:
            self.strategy  # noqa: B018, its constructor checks
        except ValueError as error:
            reason = str(error).removeprefix("route: ").replace("strategy must", "routing must")
            raise ValueError(f"{CALL}: {reason}") from None


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(holds: bool, name: str, condition: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{CALL}: {name} must {condition}, got {got}")
