"""mome.build: where visual tokens go, what trains, and that a sample's result is its own, in a batch and with beams."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from _mome import (
    HOLDER,
    IDS,
    MASK,
    OPTIONS,
    PROCESSORS,
    SENTENCE,
    SIZE,
    TEXTS,
    call,
    doubled,
    encoders,
    llm,
    logits,
    make,
    pictures,
    sentences,
    write_bert,
)
from torch import Tensor, nn

from mixpert_kernels import Grids
from mixpert_kernels.hf import mome
from mixpert_kernels.modules.move import Features
from mixpert_kernels.testing import assert_as_accurate

LENGTH = SIZE * SIZE + 1  # visual tokens, CLIP's CLS among them
IGNORED = [-100] * LENGTH


@pytest.fixture(scope="module")
def model() -> mome.MomeForConditionalGeneration:
    return make()


def by_hand(
    model: mome.MomeForConditionalGeneration, every: Tensor, place: list[int]
) -> list[Tensor]:
    """Each sample's embeddings without padding, its visual tokens at ``place``."""
    given = call(model)
    with torch.no_grad():
        visual = model.move(given["images"], sentences(TEXTS))
        text = model.llm.get_input_embeddings()
        rows = []
        for ids, mask, tokens, i in zip(every, MASK, visual, place, strict=True):
            words = [t for t, seen in zip(ids.tolist(), mask.tolist(), strict=True) if seen]
            before, after = words[:i], words[i + (words[i] == HOLDER) :]
            before, after = (torch.tensor(w, dtype=torch.long) for w in (before, after))
            rows.append(torch.cat([text(before), tokens, text(after)]))
    return rows


def prompt_of(model: mome.MomeForConditionalGeneration, ids: Tensor) -> mome.Prompt:
    given = call(model) | {"input_ids": ids}
    embedding = sentences(given.pop("instructions"))
    with torch.no_grad():
        return model.prompt(**given, labels=ids, embedding=embedding)


def test_visual_tokens_are_in_the_placeholders_place(model):
    prompt = prompt_of(model, IDS)
    one, two = by_hand(model, IDS, [1, 2])
    assert prompt.inputs_embeds.shape == (2, 5 + LENGTH, 16)
    assert torch.equal(prompt.inputs_embeds[0, 2:], one)
    assert torch.equal(prompt.inputs_embeds[1], two)
    assert prompt.attention_mask.tolist() == [[0, 0] + [1] * (3 + LENGTH), [1] * (5 + LENGTH)]
    assert prompt.labels.tolist() == [[0, 0, 1, *IGNORED, 5, 6], [1, 7, *IGNORED, 8, 9, 10]]


def test_without_a_placeholder_they_come_first_after_the_padding(model):
    model = copy.copy(model)
    model.image_token_id = None
    ids = IDS.clamp(max=20)
    prompt = prompt_of(model, ids)
    one, two = by_hand(model, ids, [0, 0])
    assert prompt.inputs_embeds.shape == (2, 6 + LENGTH, 16)
    assert torch.equal(prompt.inputs_embeds[0, 2:], one)
    assert torch.equal(prompt.inputs_embeds[1], two)
    assert prompt.attention_mask.tolist() == [[0, 0] + [1] * (4 + LENGTH), [1] * (6 + LENGTH)]
    assert prompt.labels.tolist() == [
        [0, 0, *IGNORED, 1, 20, 5, 6],
        [*IGNORED, 1, 7, 20, 8, 9, 10],
    ]


@pytest.mark.parametrize(
    "ablation",
    [
        {},
        {"mix": "addition"},
        {"options": OPTIONS | {"transform": "pool"}},
        {"branches": {"dino": {"transform": "standard"}, "clip": {"cls": False}}},
        {"experts": 0},
        {"experts": 1},
    ],
    ids=["whole", "addition", "pool", "standard", "move alone", "one adapter"],
)
def test_a_samples_result_is_its_own_in_a_batch(ablation):
    model = make(**ablation)
    truth = doubled(model)
    got = logits(model)
    for b in range(2):
        rows = slice(b, b + 1)
        assert_as_accurate("logits", got[rows], logits(model, rows), logits(truth, rows))
    assert (got[0] - got[1]).abs().max() > 1e-2


def test_another_instruction_is_another_result(model):
    given = call(model)
    same = given | {"instructions": [TEXTS[0]] * 2}
    with torch.no_grad():
        two, one = model(**given).logits, model(**same).logits
    assert_as_accurate("first", two[:1], one[:1], logits(doubled(model))[:1])
    assert (two[1] - one[1]).abs().max() > 1e-2
    routes = mome.route(model, TEXTS)
    assert not torch.equal(*routes.experts)
    embedded = given | {"instructions": sentences(TEXTS)}
    with torch.no_grad():
        assert torch.equal(model(**embedded).logits, two)


@pytest.mark.parametrize("beams", [{"num_beams": 1}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generation_is_each_samples_own(model, beams):
    options = {"max_new_tokens": 6, "do_sample": False, **beams}
    found = model.generate(**call(model), **options).chunk(2)
    for b, tokens in enumerate(found):
        alone = model.generate(**call(model, slice(b, b + 1)), **options)
        assert torch.equal(tokens, alone) and tokens.shape[1] == 6
    assert not torch.equal(*found)
    # Beam by beam the adapters are the sample's: the tokens' likelihood is that of one forward pass.
    output = model.generate(
        **call(model), **options, output_scores=True, return_dict_in_generate=True
    )
    if beams["num_beams"] > 1:
        first = output.sequences[0]
        given = call(model, slice(0, 1))
        given["input_ids"] = torch.cat([given["input_ids"][0], first])[None]
        given["attention_mask"] = torch.cat([given["attention_mask"][0], torch.ones_like(first)])[
            None
        ]
        with torch.no_grad():
            likelihood = model(**given).logits[0, -7:-1].log_softmax(-1)
        want = likelihood.gather(1, first[:, None]).mean()
        torch.testing.assert_close(output.sequences_scores[0], want, rtol=1e-4, atol=1e-4)


def test_gradients_reach_what_trains_and_nothing_else(model):
    model = copy.deepcopy(model).train()
    groups = model.trainable()
    assert list(groups) == ["adapters", "mole_routers", "projections", "transforms", "move_router"]
    assert model.own_parameters().keys() == {n for group in groups.values() for n in group}
    given = call(model)
    loss = model(**given, labels=IDS.masked_fill(IDS == HOLDER, -100)).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        trains = any(name in group for group in groups.values())
        assert parameter.requires_grad == trains
        if not trains:
            assert parameter.grad is None, name
        elif ".k_proj.bias" not in name:  # which changes no softmax
            assert parameter.grad.abs().max() > 0, name
    assert not model.move.branches["pix"].encoder.model.training
    model.llm.lm_head.requires_grad_()
    assert list(model.trainable()["other"]) == ["llm.lm_head.weight"]
    model.freeze()
    assert "other" not in model.trainable()


def test_the_loss_is_that_of_the_texts_own_labels(model):
    labels = IDS.masked_fill((IDS == HOLDER) | (MASK == 0), -100)
    with torch.no_grad():
        output = model(**call(model), labels=labels)
    longer = torch.tensor([[-100, -100, 1, *IGNORED, 5, 6], [1, 7, *IGNORED, 8, 9, 10]])
    pairs = output.logits[:, :-1].flatten(0, 1), longer[:, 1:].flatten()
    plain = nn.functional.cross_entropy(*pairs)
    assert_as_accurate(
        "loss", output.loss, plain, nn.functional.cross_entropy(pairs[0].double(), pairs[1])
    )


def test_text_alone_is_bitwise_the_llms_until_trained():
    built = mome.build(llm(), encoders(), sentence_width=SENTENCE, size=SIZE, options=OPTIONS)
    ids = IDS.clamp(max=20)
    with torch.no_grad():
        got = built(ids, MASK, instructions=sentences(TEXTS)).logits
        assert torch.equal(got, llm()(ids, attention_mask=MASK).logits)


def test_features_may_be_made_beforehand(model):
    given = call(model)
    branches, images = model.move.branches.items(), given["images"]
    given["images"] = {name: branch.encode(images[name]) for name, branch in branches}
    with torch.no_grad():
        assert torch.equal(model(**given).logits, logits(model))


def test_defaults_of_the_branches():
    chosen = make(options={"heads": 2, "layers": 1}).options
    assert chosen["clip"] == {
        "heads": 2,
        "layers": 1,
        "cls": True,
        "transform": "none",
        "norm": True,
    }
    assert (
        chosen["dino"]
        == chosen["pix"]
        == {"heads": 2, "layers": 1, "transform": "deformable", "norm": False}
    )
    model = make(encoders={"dino": encoders()["dino"]}, processors=None)
    assert model.options["dino"]["transform"] == "deformable" and "cls" not in model.options["dino"]
    assert model.processor.processors == {}


def test_half_precision_beside_float32_parts():
    model = make(llm=llm().bfloat16(), dtype=torch.float32)
    kinds = {name: {p.dtype for p in of.values()} for name, of in model.trainable().items()}
    assert all(of == {torch.float32} for of in kinds.values())
    got = logits(model)
    assert got.dtype == torch.bfloat16
    own = {p.dtype for p in make(llm=llm().bfloat16()).own_parameters().values()}
    assert own == {torch.bfloat16}
    exact = logits(doubled(model))
    plain = logits(make(llm=llm().bfloat16(), dtype=torch.float64))  # no error of the parts' own
    assert_as_accurate("logits", got, plain, exact)


def test_an_encoder_of_ones_own_and_a_processor(model):
    class Mean(nn.Module):
        width = 3

        def forward(self, pixel_values: Tensor) -> Features:
            rows = pixel_values.flatten(2).transpose(1, 2).flatten(0, 1)
            return Features(rows, Grids.same(len(pixel_values), *pixel_values.shape[2:]))

    model = make(
        encoders={"mine": Mean()},
        branches={"mine": {"transform": "pool"}},
        processors={"mine": _thumbnails},
    )
    images = model.processor(pictures())
    assert (
        list(images) == ["mine"]
        and model.processor(pictures()[0])["mine"]["pixel_values"].shape[0] == 1
    )
    with torch.no_grad():
        shape = model(IDS, MASK, images=images, instructions=TEXTS).logits.shape
    assert shape == (2, 5 + SIZE * SIZE, 64)
    with pytest.raises(ValueError, match="images must hold at least one"):
        model.processor([])


def _thumbnails(images: list, return_tensors: str) -> dict[str, Tensor]:
    small = np.stack([np.asarray(image.resize((5, 6))) for image in images])  # (B, 6, 5, 3)
    return {"pixel_values": torch.from_numpy(small).permute(0, 3, 1, 2).float()}


def test_directories(tmp_path):
    llm().save_pretrained(tmp_path / "llm")
    for name, encoder in encoders().items():
        encoder.save_pretrained(tmp_path / name)
        PROCESSORS[name].save_pretrained(tmp_path / name)
    settings = tmp_path / "pix" / "preprocessor_config.json"
    asked = json.loads(settings.read_text()) | {"is_vqa": True}  # to render the question: not here
    settings.write_text(json.dumps(asked))
    model = mome.build(
        tmp_path / "llm",
        {name: str(tmp_path / name) for name in encoders()},
        sentence_encoder=write_bert(tmp_path / "bert"),
        size=SIZE,
        options=OPTIONS,
        image_token_id=HOLDER,
    )
    assert model.move.sentence_width == SENTENCE and list(model.sources) == [
        "llm",
        "sentence_encoder",
        *encoders(),
    ]
    assert torch.equal(
        model.processor(pictures())["pix"]["flattened_patches"],
        call(make())["images"]["pix"]["flattened_patches"],
    )
    with torch.no_grad():
        text = model(IDS.clamp(max=20), MASK, instructions=TEXTS).logits
        assert torch.equal(text, llm()(IDS.clamp(max=20), attention_mask=MASK).logits)
        for name, encoder in encoders().items():
            inputs = call(model)["images"][name]
            rows = model.move.branches[name].encode(inputs).rows
            assert torch.equal(rows, mome.Encoder(encoder)(**inputs).rows)


def test_bad_input_is_named(model):
    given = call(model)
    twice = IDS.masked_fill(IDS == 5, HOLDER)
    for change, text in (
        ({"instructions": TEXTS[:1]}, "instructions must be one a sample, 2, got 1"),
        ({"instructions": TEXTS[0]}, "instructions must be a list of texts, .* got a str"),
        ({"instructions": torch.zeros(2, 7)}, r"instructions must be \(B, 8\), got \(2, 7\)"),
        ({"instructions": [1, 2]}, r"instructions must be texts, one a sample, got \[1, 2\]"),
        ({"instructions": None}, "instructions must be given with images, got None"),
        ({"instructions": None, "images": None, "input_ids": MASK}, "given to choose adapters"),
        ({"input_ids": twice}, "one placeholder a sample, token 99, got 2"),
        ({"input_ids": MASK}, "one placeholder a sample, token 99, got 0"),
        ({"images": None}, "no placeholder without images, token 99, got 1"),
        ({"input_ids": IDS[0]}, r"input_ids must be \(B, T\), got \(6,\)"),
        ({"attention_mask": MASK[:, 1:]}, r"attention_mask must have the shape .* \(2, 5\)"),
        ({"labels": IDS[:1]}, r"labels must have the shape of input_ids, \(2, 6\), got \(1, 6\)"),
        ({"images": {"clip": given["images"]["clip"]}}, "got none of dino, pix"),
        ({"images": call(model, slice(0, 1))["images"]}, "one for each of the 1 images"),
    ):
        changed = given | change
        if changed["instructions"] is not None and len(changed["input_ids"]) == 6:
            changed["instructions"] = sentences(["a"] * 6)
        with pytest.raises(ValueError, match=text):
            model(**changed)
    bare = copy.copy(model)
    bare.sentence_encoder = None
    with pytest.raises(
        ValueError, match=r"must be embeddings \(B, 8\) where no sentence encoder is given"
    ):
        bare(**given)
    bare.sentence_encoder = lambda texts: torch.zeros(len(texts), 5)
    with pytest.raises(ValueError, match=r"sentence_encoder must give \(2, 8\), got \(2, 5\)"):
        bare(**given)


def test_bad_arguments_are_named(tmp_path):
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=8)
    )
    nameless = nn.Linear(1, 1)
    for options, text in (
        ({"llm": gpt2}, "llm must have a decoder with `layers`"),
        ({"llm": encoders()["dino"]}, "llm must be a causal LM of transformers, got Dinov2Model"),
        ({"llm": tmp_path / "none"}, "directory must exist"),
        ({"encoders": {}}, "encoders must be a mapping of at least one"),
        ({"encoders": {"llm": nameless}}, "names without dots, other than llm"),
        (
            {"encoders": {"a": 3}, "processors": None},
            r"encoders\['a'\] must be a module or a directory, got int",
        ),
        ({"encoders": {"a": nameless}, "processors": None}, r"encoders\['a'\] must have a width"),
        ({"branches": {"eva": {}}}, "branches must be of the encoders clip, dino, pix, got eva"),
        ({"processors": {"eva": None}}, "processors must be of the encoders"),
        ({"options": {"layer": 2}}, "options of a branch must be of transform, .* got layer"),
        ({"options": {"cls": True}}, "at most one with cls"),
        ({"sentence_encoder": 3}, "sentence_encoder must be a directory, a function or None"),
        ({"mix": "mean"}, "mix must be one of router, addition, got mean"),
        ({"experts": -1}, "experts must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=text):
            make(**options)


@pytest.mark.parametrize("page", ["README.md", "docs/mome.md"])
def test_the_pages_code_runs(page, tmp_path, monkeypatch):
    path = Path(__file__).resolve().parent.parent / page
    if not path.is_file():
        pytest.skip("the repository is not around the tests")
    monkeypatch.chdir(tmp_path)
    _, section = re.split(r"^## (?:MoME|Build)$", path.read_text(), maxsplit=1, flags=re.MULTILINE)
    blocks = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {}
    for block in blocks[: 1 if page == "README.md" else 2]:
        exec(compile(block, page, "exec"), names)
    assert names["tokens"].shape[0] == 2
