"""The configuration of a FusedMixpertTower."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from mixpert_kernels.ops import Strategy

from .expert_names import are_names


class MixpertVisionConfig(PretrainedConfig):
    """What it takes to build a tower again.

    Attributes:
        vision_config: configuration of the transformers vision model the tower was made from.
        projector: how to build the projector: see ``hf/projectors.py``; None for no projector.
        num_experts: E >= 1; expert 0 is the versatile one.
        expert_layers: how many of the last layers have E copies; fewer than the vision model has.
        routing: ``direct``, ``score_threshold`` or ``score_difference``.
        tau: threshold of ``score_threshold``, 0..1.
        delta: threshold of ``score_difference``, 0..1.
        against: ``runner_up`` or ``versatile``, the reference score of ``score_difference``.
        feature_layer: which of the vision model's hidden states is the feature: -1 the last layer's output, -2 the one
            before, counted as in LLaVA's ``vision_feature_layer``.
        final_norm: whether the vision model's final norm stands between the blocks and the projector.
        router_hidden: width of the router's hidden layer; None for a linear router.
        fuse_trunk: run the shared layers of known pre-LN ViTs through the fused plan in inference.
        expert_names: E different names, for people; None for none.
        mixpert_format: of the checkpoint: which parameters there are and what they are called.
    """

    model_type = "mixpert_vision"
    sub_configs = {"vision_config": AutoConfig}  # noqa: RUF012, transformers reads the plain attribute

    vision_config: dict | PretrainedConfig | None = None
    projector: dict | None = None
    num_experts: int = 4
    expert_layers: int = 2
    routing: str = "score_difference"
    tau: float = 0.5
    delta: float = 0.1
    against: str = "runner_up"
    feature_layer: int = -1
    final_norm: bool = False
    router_hidden: int | None = None
    fuse_trunk: bool = True
    expert_names: list[str] | None = None
    mixpert_format: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, PretrainedConfig):
            fields = dict(self.vision_config or {})
            self.vision_config = AutoConfig.for_model(
                fields.pop("model_type", "siglip_vision_model"), **fields
            )
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Raise ValueError unless the values fit together."""
        experts = self.num_experts
        _require(_whole(experts) and experts >= 1, "num_experts", "be at least 1", experts)
        total = self.vision_config.num_hidden_layers
        whole = _whole(self.feature_layer)
        layers = self.feature_layers if whole else 0
        _require(
            whole and 1 <= layers <= total,
            "feature_layer",
            f"lie in 1..{total} or -{total}..-1",
            self.feature_layer,
        )
        least = 0 if self.projector is not None else 1
        _require(
            _whole(self.expert_layers) and least <= self.expert_layers < layers,
            "expert_layers",
            f"lie in {least}..{layers - 1} ({layers} layers of the vision model feed the feature)",
            self.expert_layers,
        )
        hidden = self.router_hidden
        wide = hidden is None or (_whole(hidden) and hidden >= 1)
        _require(wide, "router_hidden", "be None or at least 1", hidden)
        names = self.expert_names
        fits = are_names(names, self.num_experts)
        _require(fits, "expert_names", f"be {self.num_experts} different names", names)
        try:
            self.strategy  # noqa: B018, its constructor checks
        except ValueError as error:
            reason = str(error).removeprefix("route: ").replace("strategy must", "routing must")
            raise ValueError(f"FusedMixpertTower: {reason}") from None

    @property
    def strategy(self) -> Strategy:
        return Strategy(self.routing, self.tau, self.delta, self.against)

    @property
    def feature_layers(self) -> int:
        """How many layers feed the feature."""
        above = self.feature_layer >= 0
        return (
            self.feature_layer
            if above
            else self.vision_config.num_hidden_layers + 1 + self.feature_layer
        )

    @property
    def hidden_size(self) -> int:
        """Width of the features: the projector's output, or D."""
        if self.projector is not None:
            return self.projector["out_features"]
        return self.vision_config.hidden_size


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(holds: bool, name: str, condition: str, got: object) -> None:
    if not holds:
        raise ValueError(f"FusedMixpertTower: {name} must {condition}, got {got}")


AutoConfig.register(MixpertVisionConfig.model_type, MixpertVisionConfig)
