"""Mutants of MoME: its vision experts, its language experts, and their place in transformers."""

from __future__ import annotations

from mutant import Mutant

MOLE = "mixpert_kernels/modules/mole.py"
DECODERS = "mixpert_kernels/hf/mome/decoders.py"
TEST_MOLE, TEST_DECODERS = "tests/test_mole.py", "tests/test_mole_decoders.py"

MUTANTS: list[Mutant] = [
    Mutant(
        "mole-beams-in-another-order",
        "a batch of beams is taken for the samples over and over",
        MOLE,
        "probabilities.repeat_interleave(times, dim=0)",
        "probabilities.repeat(times, 1)",
        f"{TEST_DECODERS} -k 'two_requests or sampled'",
    ),
    Mutant(
        "mole-gradient-times-probability",
        "the router's gradient is scaled by the probabilities",
        MOLE,
        "return routing, probabilities if probabilities.requires_grad else None",
        "return routing, probabilities * scores",
        f"{TEST_MOLE} -k every_gradient",
    ),
    Mutant(
        "mole-router-without-gradient",
        "the op is not given what the router's gradient goes to",
        MOLE,
        "return routing, probabilities if probabilities.requires_grad else None",
        "return routing, None",
        f"{TEST_MOLE} -k every_gradient",
    ),
    Mutant(
        "mole-decision-kept-in-training",
        "a layer that is differentiated reuses what it decided without gradients",
        MOLE,
        "if torch.is_grad_enabled() or torch.compiler.is_compiling():",
        "if torch.compiler.is_compiling():",
        f"{TEST_MOLE} -k routed_once",
    ),
    Mutant(
        "mole-decision-outlives-weights",
        "a decision is reused after the router's weights have been written to",
        MOLE,
        "(t.data_ptr(), _version(t)) for t in tensors",
        "(t.data_ptr(), 0) for t in tensors",
        f"{TEST_MOLE} -k routed_once",
    ),
    Mutant(
        "mole-decision-outlives-replaced-weights",
        "a decision is reused after the router's weights have been replaced",
        MOLE,
        "(t.data_ptr(), _version(t)) for t in tensors",
        "(0, _version(t)) for t in tensors",
        f"{TEST_MOLE} -k routed_once",
    ),
    Mutant(
        "mole-decision-made-anew",
        "every token is routed anew",
        MOLE,
        "            request.decide(id(self), state, routing)\n",
        "            pass\n",
        f"{TEST_MOLE} -k 'once_a_request or routed_once'",
    ),
    Mutant(
        "mole-router-under-autocast",
        "autocast rounds what the router decides by",
        MOLE,
        "        with torch.autocast(x.device.type, enabled=False):\n            for layer in self:",
        "        with torch.autocast(x.device.type, enabled=torch.is_autocast_enabled('cpu')):\n"
        "            for layer in self:",
        f"{TEST_MOLE} -k autocast",
    ),
    Mutant(
        "mole-threads-share-an-instruction",
        "what one thread sets is what all threads see",
        MOLE,
        "class _Thread(threading.local):",
        "class _Thread:",
        f"{TEST_MOLE} -k threads",
    ),
    Mutant(
        "mole-copies-are-one-adapter",
        "the copies of stage 2 share their memory",
        MOLE,
        "old.detach()[:1].repeat(experts, *[1] * (old.ndim - 1))",
        "old.detach()[:1].expand(experts, *[-1] * (old.ndim - 1))",
        f"{TEST_MOLE} -k becomes_several",
    ),
    Mutant(
        "mole-originals-adapters-shifted",
        "the original's adapters are written one number further",
        MOLE,
        "row = stacked[ours][k]",
        "row = stacked[ours][k - 1]",
        f"{TEST_MOLE} -k inverse",
    ),
    Mutant(
        "mole-recomputed-with-what-is-set",
        "a layer that is run again in backward sees the request that is set by then",
        DECODERS,
        "request = kwargs.pop(REQUEST, None) or instruction.request",
        "request = (kwargs.pop(REQUEST, None), instruction.request)[1]",
        f"{TEST_DECODERS} -k recomputed",
    ),
    Mutant(
        "mole-request-stays-bound",
        "a layer that was run again in backward leaves its request set",
        DECODERS,
        "            instruction.bind(before)\n",
        "            pass\n",
        f"{TEST_DECODERS} -k recomputed",
    ),
    Mutant(
        "mole-removed-layers-keep-their-class",
        "a layer without its experts still looks for them",
        DECODERS,
        "            layer.__class__ = plain_class(layer)\n",
        "            pass\n",
        f"{TEST_DECODERS} -k removed",
    ),
]

ADT, MOVE, SHARED = (f"mixpert_kernels/modules/{name}.py" for name in ("adt", "move", "shared"))
TEST_ADT, TEST_MOVE = "tests/test_adt.py", "tests/test_move.py"
ADT_IS_OTHERS = f"{TEST_ADT} -k 'other_peoples'"
MOVE_IS_FORMULA = f"{TEST_MOVE} -k 'formula'"

MUTANTS += [
    Mutant(
        "adt-reference-transposed",
        "the first reference points are (row, column), as the original stacked them",
        ADT,
        "torch.stack([x, y], -1)",
        "torch.stack([y, x], -1)",
        f"{TEST_ADT} -k eight_directions",
    ),
    Mutant(
        "adt-self-attention-without-position",
        "queries and keys come from h instead of h + E",
        ADT,
        "qk = shared_linear(h + position,",
        "qk = shared_linear(h,",
        ADT_IS_OTHERS,
    ),
    Mutant(
        "adt-values-with-position",
        "the self-attention's values know their position",
        ADT,
        "shared_linear(h, (self.v_proj,), routing)",
        "shared_linear(h + position, (self.v_proj,), routing)",
        ADT_IS_OTHERS,
    ),
    Mutant(
        "adt-cross-attention-without-position",
        "offsets and weights come from h instead of h + E",
        ADT,
        "self.encoder_attn(h + position,",
        "self.encoder_attn(h,",
        ADT_IS_OTHERS,
    ),
    Mutant(
        "adt-values-of-another-layer",
        "the first layer attends to the last layer's values",
        ADT,
        "zip(self.layers, memories, strict=True)",
        "zip(self.layers, memories[::-1], strict=True)",
        ADT_IS_OTHERS,
    ),
    Mutant(
        "adt-looks-at-padding",
        "standard cross-attention sees one row past an image's last",
        ADT,
        "mask = place < lengths[:, None]",
        "mask = place <= lengths[:, None]",
        ADT_IS_OTHERS,
    ),
    Mutant(
        "adt-mlp-never-dropped",
        "dropout is of the attentions alone",
        ADT,
        "F.dropout(mlp(), self.dropout)",
        "mlp()",
        f"{TEST_ADT} -k dropout_is",
    ),
    Mutant(
        "adt-fresh-layer-adds",
        "the MLP's output projection does not begin at zero",
        ADT,
        "        _zero(self.fc2)\n",
        "",
        f"{TEST_ADT} -k fresh_layer",
    ),
    Mutant(
        "adt-hooks-passed-over",
        "a leaf with a hook is read instead of called",
        SHARED,
        "is_plain(leaf) and not is_hooked(leaf)",
        "is_plain(leaf)",
        f"{TEST_ADT} -k hooked",
    ),
    Mutant(
        "move-cls-weighted",
        "the token of the whole image is routed too",
        MOVE,
        "mix_streams(self._logits(instruction), streams, cls)",
        "mix_streams(self._logits(instruction), streams, cls * self.weights(instruction)[:, :1])",
        MOVE_IS_FORMULA,
    ),
    Mutant(
        "move-cls-not-normalised",
        "the token of the whole image is projected without its branch's norm",
        MOVE,
        "self._projected(cls.to(dtype)[:, None], routing)[:, 0]",
        "shared_linear(cls.to(dtype)[:, None], (self.proj,), routing)[:, 0]",
        MOVE_IS_FORMULA,
    ),
    Mutant(
        "move-weights-of-another-branch",
        "the router's weights are taken in another order",
        MOVE,
        "streams = [tokens for tokens, _ in made]",
        "streams = [tokens for tokens, _ in made][::-1]",
        MOVE_IS_FORMULA,
    ),
    Mutant(
        "move-encoders-drop",
        "a frozen encoder goes into training mode with the rest",
        MOVE,
        "        self.encoder.eval()\n",
        "",
        f"{TEST_MOVE} -k evaluation_mode",
    ),
    Mutant(
        "move-encoders-learn",
        "a frozen encoder runs with autograd",
        MOVE,
        "    @torch.no_grad()\n",
        "",
        f"{TEST_MOVE} -k evaluation_mode",
    ),
    Mutant(
        "move-instructions-not-counted",
        "features of other images than the instructions are taken",
        MOVE,
        "_require(_MOVE, got[0] == images, ",
        "_require(_MOVE, got[0] >= 1, ",
        f"{TEST_MOVE} -k calls_that",
    ),
]
