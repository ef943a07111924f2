"""FusedMixpertTower: a vision model and projector whose last layers are experts, one an image."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from mixpert_kernels import ops
from mixpert_kernels.modules import PreNormPlan, Router, expertize
from mixpert_kernels.modules.by_expert import by_expert
from mixpert_kernels.modules.grouped import GroupedLayerNorm, GroupedLinear, GroupedRMSNorm
from mixpert_kernels.routing import Routing
from mixpert_kernels.training import Calibration, calibrate

from . import checkpoint, projectors
from .capture import CapturedTower
from .configuration import MixpertVisionConfig
from .families import Call, cut, family_of, with_layers
from .inputs import check_forced, check_pixels, images_of, resolve_images
from .names import renames
from .outputs import MixpertOutput
from .trunk import fuses_routing, run_trunk


class FusedMixpertTower(PreTrainedModel):
    """A drop-in vision tower and projector that routes each image of a batch to one of E experts.

    The shared trunk is the transformers model it was made from, cut before its last n layers; those layers and the
    projector have E copies. Made by ``from_vision_model`` or ``from_pretrained``.

    Source: Mixpert (arXiv 2505.24541). Expert 0 is the versatile one.
    """

    config_class = MixpertVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["ExpertBlock"]  # noqa: RUF012, transformers reads the plain attribute

    def __init__(
        self,
        config: MixpertVisionConfig,
        *,
        vision_model: nn.Module | None = None,
        projector: nn.Module | None = None,
    ) -> None:
        config.check()  # again: values may have been set since it was made
        super().__init__(config)
        if vision_model is None:
            vision_model = AutoModel.from_config(config.vision_config)
            projector = projectors.build(config.projector)
        self._family = family_of(vision_model)
        shared = config.feature_layers - config.expert_layers
        self.trunk, rest = cut(vision_model, self._family, shared)
        self._drop_unused_norm()
        self.router = Router(
            config.vision_config.hidden_size, config.num_experts, config.router_hidden
        )
        self.experts = nn.ModuleList(
            expertize(block, config.num_experts) for block in rest[: config.expert_layers]
        )
        self.projector = None if projector is None else expertize(projector, config.num_experts)
        if not any(p.is_meta for p in self.parameters()):
            for (
                module
            ) in self.modules():  # clones, and what they were cloned from, keep their weights
                module._is_hf_initialized = True
        self._trunk_plans = [PreNormPlan.of(block) for block in self._trunk_blocks]
        self.post_init()

    @classmethod
    def from_vision_model(
        cls,
        vision_model: nn.Module,
        projector: nn.Module | None = None,
        *,
        num_experts: int = 4,
        expert_layers: int = 2,
        routing: str = "score_difference",
        tau: float = 0.5,
        delta: float = 0.1,
        against: str = "runner_up",
        feature_layer: int = -1,
        final_norm: bool = False,
        router_hidden: int | None = None,
        fuse_trunk: bool = True,
        expert_names: list[str] | None = None,
    ) -> FusedMixpertTower:
        """Make a tower of a transformers vision model: every expert a clone of its last layers.

        Before any training each route gives what the vision model and projector gave.

        Args:
            vision_model: SigLIP, SigLIP2, CLIP, DINOv2 (with or without registers), ViT, DINOv3-ViT, InternVL's, or any
                model with one list of blocks. The trunk shares its parameters; it is not changed.
            projector: any module (B, T, D) to (B, T, P); None for none. Cloned, not changed.
            num_experts: E.
            expert_layers: n, how many of the last layers that feed the feature are cloned.
            routing: ``direct``, ``score_threshold`` or ``score_difference``.
            tau: threshold of ``score_threshold``, 0..1. Neither has a published value: the defaults are ours.
            delta: threshold of ``score_difference``, 0..1; ``calibrate`` picks both on labelled data.
            against: the reference score of ``score_difference``: ``runner_up`` or ``versatile``.
            feature_layer: which of the model's hidden states is the feature, as in LLaVA's ``vision_feature_layer``:
                -1 the last layer's output before the final norm, -2 the one before. Later layers are dropped.
            final_norm: put the model's final norm, shared, between the blocks and the projector.
            router_hidden: width of the router's hidden layer; None for a linear router.
            fuse_trunk: run the shared layers through the fused plan in inference.
            expert_names: E names, for people.

        Raises:
            ValueError: an argument is out of its range, the model type is not supported or a leaf cannot be cloned.

        Example:
            >>> from transformers import SiglipVisionConfig, SiglipVisionModel
            >>> vision = SiglipVisionModel(SiglipVisionConfig(hidden_size=32, intermediate_size=64,
            ...     num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14))
            >>> tower = FusedMixpertTower.from_vision_model(vision, nn.Linear(32, 8), delta=0.2).eval()
            >>> tower(torch.randn(2, 3, 28, 28), expert=torch.tensor([3, 1])).last_hidden_state.shape
            torch.Size([2, 4, 8])
        """
        family = family_of(vision_model)
        config = MixpertVisionConfig(
            vision_config=copy.deepcopy(vision_model.config),
            projector=projectors.describe(projector),
            num_experts=num_experts,
            expert_layers=expert_layers,
            routing=routing,
            tau=tau,
            delta=delta,
            against=against,
            feature_layer=feature_layer,
            final_norm=final_norm,
            router_hidden=router_hidden,
            fuse_trunk=fuse_trunk,
            expert_names=expert_names,
        )
        last = config.feature_layers == config.vision_config.num_hidden_layers
        if final_norm and not (family.final_norm and last):
            raise ValueError(
                "FusedMixpertTower: final_norm must be False where the feature is not the last layer's or the model's "
                f"norm is not known, got True with feature_layer {feature_layer}"
            )
        tower = cls(config, vision_model=vision_model, projector=projector)
        like = next(vision_model.parameters())
        tower.router.to(like.device, like.dtype)
        return tower.train(vision_model.training)

    def forward(
        self,
        pixel_values: Tensor,  # (B, C, H, W)
        *,
        image_of_tile: Tensor | None = None,  # (B,)
        base_tile: Tensor | None = None,  # (I,)
        expert: Tensor | None = None,  # (I,)
        interpolate_pos_encoding: bool = False,
        output_router: bool = True,
    ) -> MixpertOutput:
        """Encode a batch of tiles, each image by one expert.

        Args:
            pixel_values: (B, C, H, W) floating point, on the tower's device.
            image_of_tile: (B,) integers ascending from 0 without gaps: the image each tile is a crop of (AnyRes);
                None: a tile is an image. Best a CPU tensor: values are checked only where reading them is free.
            base_tile: (I,) integers: the tile that shows the whole image, the one routed by; default each image's
                first.
            expert: (I,) integers: forced routes (teacher routing); None: the router decides.
            interpolate_pos_encoding: accept any image size, interpolating the position embeddings.
            output_router: also return the scores (computed for forced routes only then).

        Returns:
            MixpertOutput.

        Raises:
            ValueError: an argument has the wrong rank, size, channels, dtype, device, length or values.
        """
        self._check_pixels(pixel_values, interpolate_pos_encoding)
        tiles = pixel_values.shape[0]
        image_of_tile, base_tile = resolve_images(image_of_tile, base_tile, tiles, self.device)
        images = tiles if base_tile is None else base_tile.shape[0]
        if expert is not None:
            check_forced(expert, images, self.config.num_experts)
        x, args, kwargs = self._run_trunk(pixel_values, interpolate_pos_encoding)
        if expert is not None and not output_router:
            expert = expert.to(x.device, non_blocking=True)
            of_tile = expert if image_of_tile is None else expert[image_of_tile]
            routing = Routing.forced(of_tile, self.config.num_experts)
            y = self.expert_segment(x, routing, *args, **kwargs)
        else:
            y, routing = self._routed_segment(x, image_of_tile, base_tile, expert, args, kwargs)
        chosen = routing.expert if base_tile is None else routing.expert[base_tile]
        return MixpertOutput(
            last_hidden_state=y,
            expert=chosen.long(),
            router_scores=routing.scores if output_router else None,
        )

    def trunk_features(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False
    ) -> Tensor:
        """Return what the shared layers give for tiles (B, C, H, W): (B, T, D)."""
        self._check_pixels(pixel_values, interpolate_pos_encoding)
        return self._run_trunk(pixel_values, interpolate_pos_encoding)[0]

    def router_features(
        self,
        pixel_values: Tensor,
        image_of_tile: Tensor | None = None,
        base_tile: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> Tensor:  # (I, D) float32
        """Return the pooled trunk features that the router scores: cache them once to train it."""
        self._check_pixels(pixel_values, interpolate_pos_encoding)
        tiles = pixel_values.shape[0]
        _, base_tile = resolve_images(image_of_tile, base_tile, tiles, self.device)
        x, *_ = self._run_trunk(pixel_values, interpolate_pos_encoding)
        base = x if base_tile is None else x.index_select(0, base_tile)
        return base.mean(1, dtype=torch.float32)

    def route(
        self,
        x: Tensor,  # (B, T, D)
        image_of_tile: Tensor | None = None,
        base_tile: Tensor | None = None,
        expert: Tensor | None = None,
    ) -> Routing:
        """Route trunk features by this tower's router and strategy; ``expert`` (I,) forces the routes."""
        images = images_of(x, image_of_tile, base_tile, expert)
        return ops.route(
            x, self.router.weights, self.config.strategy, **images, eps=self.router.eps
        )

    def expert_segment(self, x: Tensor, routing: Routing, *args: Any, **kwargs: Any) -> Tensor:
        """Run trunk features (B, T, D) through each tile's expert layers and projector: (B, T, P).

        Further arguments are what this architecture's blocks are called with, such as position embeddings.
        """
        if not args and not kwargs:
            args = self._family.args
        alike = not kwargs and all(a is None for a in args)  # nothing that belongs to a tile
        if alike:
            return by_expert(lambda x, routing: self._segment(x, routing, args, {}), x, routing)
        return self._segment(x, routing, args, kwargs)

    def _routed_segment(
        self, x: Tensor, image_of_tile, base_tile, expert, args: tuple, kwargs: dict
    ) -> tuple[Tensor, Routing]:
        """Route, and run the expert segment; on a GPU the router and the first product are one launch."""
        if not (fuses_routing(x) and self.experts and self.experts[0].can_route(args, kwargs)):
            routing = self.route(x, image_of_tile, base_tile, expert)
            return self.expert_segment(x, routing, *args, **kwargs), routing
        images = images_of(x, image_of_tile, base_tile, expert)
        router = (self.router.weights, self.config.strategy)
        x, routing = self.experts[0].run_routed(x, *router, **images, router_eps=self.router.eps)
        return self._segment(x, routing, args, kwargs, first=1), routing

    def _segment(
        self, x: Tensor, routing: Routing, args: tuple, kwargs: dict, first: int = 0
    ) -> Tensor:
        for block in self.experts[first:]:
            x = block(x, routing, *args, **kwargs)
        if self.config.final_norm:
            x = self.trunk.get_submodule(self._family.final_norm)(x)
        return x if self.projector is None else self.projector(x, routing)

    def _check_pixels(self, pixels: Tensor, interpolate: bool) -> None:
        any_size = interpolate or self._family.any_size
        check_pixels(pixels, self.config.vision_config, self.device, any_size=any_size)

    def _run_trunk(self, pixels: Tensor, interpolate: bool) -> Call:
        plans = self._trunk_plans if self.config.fuse_trunk else [None] * len(self._trunk_plans)
        return run_trunk(self._family, self.trunk, plans, pixels, interpolate)

    def calibrate(
        self, loader_or_features: Any, labels: Tensor | None = None, **options: Any
    ) -> Calibration:
        """Pick tau or delta on labelled data, set it, and return the accuracy/fallback curve.

        See ``mixpert_kernels.training.calibrate``, whose arguments these are.
        """
        return calibrate(self, loader_or_features, labels, **options)

    def capture(self, batch_sizes: list[int | tuple[int, int]], **options: Any) -> CapturedTower:
        """Record CUDA graphs for inference, one a batch size, each replayed for any routing.

        Spares the host its launches, which at small batches take longer than the work. See ``CapturedTower``, whose
        arguments these are.
        """
        return CapturedTower(self, batch_sizes, **options)

    def export_expert(self, expert: int) -> tuple[nn.Module, nn.Module | None]:
        """Return the plain transformers vision model and projector that expert ``expert`` amounts to.

        The vision model has the layers that feed the feature; its last hidden state before the final norm is the
        feature. Modules after the blocks that the tower had dropped are as the architecture initialises them.
        """
        experts = self.config.num_experts
        if not 0 <= expert < experts:
            raise ValueError(f"export_expert: expert must lie in 0..{experts - 1}, got {expert}")
        vision = AutoModel.from_config(
            with_layers(self.config.vision_config, self.config.feature_layers)
        )
        like = next(self.trunk.parameters())
        vision.to(like.device, like.dtype)  # first: float64 must not pass through float32
        vision.load_state_dict(self.trunk.state_dict(), strict=False)
        blocks = vision.get_submodule(self._family.blocks)
        first = len(blocks) - len(self.experts)
        for i, block in enumerate(self.experts):
            blocks[first + i].load_state_dict(block.select(expert).state_dict())
        projector = None if self.projector is None else self.projector.select(expert)
        return vision.train(self.training), projector

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save as transformers does, all or nothing: an interrupted save leaves the old checkpoint.

        Raises:
            ValueError: the projector is of a kind that can't be rebuilt, or the directory is a file.
        """
        if self.config.projector is not None and self.config.projector["kind"] == "custom":
            raise ValueError(
                "save_pretrained: projector must be nn.Linear, nn.Sequential or of LLaVA's shape, got "
                f"{type(self.projector.block).__name__}"
            )
        kwargs.setdefault(
            "save_original_format", False
        )  # the names of this version, not of an old one
        if not kwargs.get("is_main_process", True):  # transformers has it write nothing
            return
        save = super().save_pretrained
        checkpoint.write_whole(save_directory, lambda draft: save(draft, **kwargs))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ):
        """Load a checkpoint directory; every parameter must be in it.

        Raises:
            ValueError: the directory is missing, truncated, of another model or format, or lacks a parameter, has one
                too many or one of another shape; the message names it.
        """
        path = checkpoint.locate(pretrained_model_name_or_path, cls.config_class.model_type, (1,))
        config = kwargs.get("config") or cls.config_class.from_pretrained(path)
        with torch.device("meta"):
            wanted = set(cls(config).state_dict())
        mapping = renames(checkpoint.keys(path), wanted, config.vision_config.model_type)
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # reported in info, and an error below
        tower, info = super().from_pretrained(
            path,
            *args,
            output_loading_info=True,
            **({"key_mapping": mapping} if mapping else {}),
            **kwargs,
        )
        for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(fault):
                names = ", ".join(sorted(str(key) for key in info[fault])[:3])
                raise ValueError(
                    f"from_pretrained: {path} must hold exactly the tower's parameters, got "
                    f"{fault.replace('_', ' ')}: {names}"
                )
        return (tower, info) if wants_info else tower

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, GroupedLinear | GroupedLayerNorm | GroupedRMSNorm | Router):
            module.reset_parameters()

    @property
    def _trunk_blocks(self) -> nn.ModuleList:
        return self.trunk.get_submodule(self._family.blocks)

    def _drop_unused_norm(self) -> None:
        path = self._family.final_norm
        if path is not None and not self.config.final_norm and path in self.trunk._modules:
            self.trunk._modules[path] = None


AutoModel.register(MixpertVisionConfig, FusedMixpertTower)
