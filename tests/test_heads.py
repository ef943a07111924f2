"""What stands on a tower: the losses of a classifier and of a language model, trained and checked by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from _recipes import EXPERTS, captioned_folder, data, rows, stages, table, tiny_language

from mixpert_kernels.hf import heads
from mixpert_kernels.hf.heads import Classifier, PrefixLM
from mixpert_kernels.training import Recipe, train
from mixpert_kernels.training.data import read_images


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run."""
    root = data(tmp_path_factory.mktemp("heads"))
    made = table(root, stage=stages(steps=1))
    return Path(train(Recipe.from_dict(made), progress=False)["recipe"]["output"])


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_language(tmp_path_factory.mktemp("language"))


def prefix_recipe(root: Path, language: Path, **changes: object) -> Recipe:
    made = table(root, "text", stage=stages(steps=6, batch=8), **changes)
    made["model"] = {
        "siglip": made["model"]["siglip"],
        "expert_layers": 1,
        "language": str(language),
    }
    return Recipe.from_dict(made)


def test_images_with_text_train_a_language_model(language: Path, tmp_path: Path):
    for name in ("train", "test", "held_out"):
        captioned_folder(tmp_path / name)
    results = train(prefix_recipe(tmp_path, language), progress=False)
    assert results["domains"]["chart"]["images"] == 4
    joint_rows = [row for row in rows(tmp_path / "text") if row["stage"] == "joint"]
    assert joint_rows[-1]["loss"] < joint_rows[0]["loss"]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    head = tmp_path / "text" / "head"
    saved = AutoModelForCausalLM.from_pretrained(head)
    assert AutoTokenizer.from_pretrained(head).eos_token == "</s>"
    trained = torch.load(tmp_path / "text" / "checkpoint.pt", weights_only=True)["model"]
    for name, value in saved.state_dict().items():
        assert torch.equal(value, trained[f"language.{name}"]), name


def test_the_loss_is_the_language_models_own_on_the_answer(language: Path, tmp_path: Path):
    """Each sample alone, unpadded, by transformers' loss; and a batch of unequal lengths gives the same."""
    root = captioned_folder(tmp_path / "images", each=1)
    (root / "photo" / "0.txt").write_text("what ?\nred blue red")
    torch.manual_seed(0)
    model, preprocess = heads.build(prefix_recipe(tmp_path, language).model, [])
    assert isinstance(model, PrefixLM)
    images = read_images(root, "text", EXPERTS)
    pixels = preprocess([images.open(i) for i in range(len(images))])
    route = torch.zeros(len(images), dtype=torch.int64)
    with torch.no_grad():
        out = model(pixels, **model.targets(images.samples), expert=route)
        for i, sample in enumerate(images.samples):
            words = sample.prompt.split() + sample.text.split() + ["</s>"]
            tokens = torch.tensor([model.tokenizer.convert_tokens_to_ids(words)])
            features = model.tower(pixels[i : i + 1], expert=route[:1]).last_hidden_state
            embedded = torch.cat([features, model.language.get_input_embeddings()(tokens)], 1)
            skipped = features.shape[1] + len(sample.prompt.split())
            labels = torch.full((1, embedded.shape[1]), -100)
            labels[:, skipped:] = tokens[:, len(sample.prompt.split()) :]
            want = model.language(inputs_embeds=embedded, labels=labels)
            answer = len(sample.text.split()) + 1
            assert int(out.counts[i]) == answer
            torch.testing.assert_close(out.losses[i] / answer, want.loss)
            greedy = want.logits[0, skipped - 1 : -1].argmax(-1)
            assert bool(out.correct[i]) == torch.equal(greedy, labels[0, skipped:])
    assert out.counts.tolist() == [2, 2, 4, 2]


def test_a_classifiers_loss_is_cross_entropy_of_mean_features(classifier: Path):
    model = Classifier.from_run(classifier)
    pixels, labels = torch.randn(3, 3, 16, 16), torch.tensor([1, 0, 1])
    route = torch.tensor([2, 0, 1])
    with torch.no_grad():
        out = model(pixels, labels, expert=route)
        features = model.tower(pixels, expert=route).last_hidden_state
        logits = features.mean(1) @ model.head.weight.T + model.head.bias
    want = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(out.losses, want)
    assert torch.equal(out.correct, logits.argmax(1) == labels) and out.counts.tolist() == [1] * 3


def test_directories_that_do_not_fit_are_named(language: Path, tmp_path: Path, classifier: Path):
    data(tmp_path)
    for name in ("train", "test", "held_out"):
        captioned_folder(tmp_path / "texts" / name)
    for changes, text in (
        ({"siglip": None, "vision": str(tmp_path)}, "must hold config.json"),
        (
            {"siglip": None, "vision": str(classifier / "tower")},
            "must be a checkpoint without experts",
        ),
        ({"expert_layers": 2}, "expert_layers must"),
        ({"head": None, "language": str(tmp_path)}, "causal language model"),
        ({"head": None, "language": str(language), "projector": 7}, "must be 24, the language"),
    ):
        model = {k: v for k, v in {**table(tmp_path)["model"], **changes}.items() if v is not None}
        where = tmp_path / "texts" if "language" in model else tmp_path
        settings = Recipe.from_dict({**table(where, "bad"), "model": model})
        with pytest.raises(ValueError) as error:
            train(settings, progress=False)
        assert text in str(error.value) and not settings.output.exists()
