"""LLaVA-OneVision with experts: from its directory to answers about a photo, a chart and a document in one batch.

    python docs/examples/llava_onevision.py MODEL_DIR [--data DIR] [--out DIR]
    python docs/examples/llava_onevision.py --tiny

The second builds a tiny model of random weights first and takes seconds. Explained in llava_onevision.md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from textwrap import shorten

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mixpert_kernels.demo import images
from mixpert_kernels.demo.figure import draw_figure
from mixpert_kernels.demo.results import Routed
from mixpert_kernels.hf.mllm import mixpertize, record_routing, router_features
from mixpert_kernels.training import fit_router

DOMAINS = ["photo", "chart", "document"]
EXPERTS = ["versatile", *DOMAINS]
QUESTIONS = {
    "photo": "What is in this photo?",
    "chart": "What does this chart show?",
    "document": "What is this document about?",
}
BATCH = 8


def load(directory, device, dtype):
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype).to(device).eval()
    processor = AutoProcessor.from_pretrained(directory)
    processor.tokenizer.padding_side = "left"  # a batch's prompts end where its answers begin
    return model, processor


def encode(model, processor, pictures):
    """What the model's vision tower is called with, batch by batch."""
    for i in range(0, len(pictures), BATCH):
        inputs = processor.image_processor(pictures[i : i + BATCH], return_tensors="pt")
        yield inputs.to(model.device, model.dtype)


def train_router(model, processor, samples):
    # The whole image as one tile decides its route: for training there is no need of finer ones.
    side = model.config.vision_config.image_size
    small = [sample.image.resize((side, side)) for sample in samples]
    features = [router_features(model, **inputs) for inputs in encode(model, processor, small)]
    labels = torch.tensor([EXPERTS.index(sample.domain) for sample in samples])
    fit_router(model, torch.cat(features), labels, lr=1e-2)


@torch.no_grad()
def routes(model, processor, samples):
    with record_routing(model) as records:
        for inputs in encode(model, processor, [sample.image for sample in samples]):
            model.get_image_features(**inputs)
    return torch.cat([record.expert for record in records]).tolist()


def prompt(question):
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def ask(model, processor, samples, max_new_tokens):
    prompts = [prompt(QUESTIONS[sample.domain]) for sample in samples]
    inputs = processor(
        text=processor.apply_chat_template(prompts, add_generation_prompt=True),
        images=[sample.image for sample in samples],
        padding=True,
        return_tensors="pt",
    ).to(model.device, model.dtype)
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    answers = output.sequences[:, inputs["input_ids"].shape[1] :]
    words = processor.batch_decode(answers, skip_special_tokens=True)
    router = output.router[0]  # of all images, in the order of the prompts
    return list(zip(words, router.expert.tolist(), router.scores.tolist(), strict=True))


def labelled_images(folder, per_domain):
    """Images to train the router on, and others to see what it learnt: drawn, or from folder/DOMAIN/."""
    if folder is None:
        return images.training_set(per_domain), images.evaluation_set()
    training, held_out = [], []
    for domain in DOMAINS:
        paths = images.image_files(folder / domain)
        if len(paths) < 2:
            raise ValueError(f"data: {folder / domain} must hold at least 2 images, got 1")
        for i, path in enumerate(paths):
            sample = images.Sample(path.stem, domain, images.open_image(path))
            (held_out if i % 4 == 0 else training).append(sample)
    return training, held_out


def print_accuracy(samples, experts):
    right = {domain: [] for domain in DOMAINS}
    for sample, expert in zip(samples, experts, strict=True):
        right[sample.domain].append(EXPERTS[expert] == sample.domain)
    shares = (f"{domain} {sum(own)} of {len(own)}" for domain, own in right.items())
    print(f"          right on others: {', '.join(shares)}")


def print_answers(samples, results):
    for sample, (answer, expert, scores) in zip(samples, results, strict=True):
        shown = ", ".join(f"{name} {p:.2f}" for name, p in zip(EXPERTS, scores, strict=True))
        print(f"\n{sample.name} -> {EXPERTS[expert]} ({shown})")
        print(f"{QUESTIONS[sample.domain]} {answer!r}")
    print()


def draw(path, samples, results):
    routed, notes = [], []
    for sample, (answer, expert, scores) in zip(samples, results, strict=True):
        routed.append(Routed(expert, EXPERTS.index(sample.domain), tuple(scores)))
        notes.append(shorten(f"{QUESTIONS[sample.domain]} {answer}", 90))
    draw_figure(path, samples, routed, EXPERTS, "One batch, three experts", notes)


def same(results, others):
    pairs = zip(results, others, strict=True)
    alike = sum(result[:2] == other[:2] for result, other in pairs)
    return f"{alike} of {len(results)} answers and routes are the same"


def run(directory, args):
    model, processor = load(directory, args.device, args.dtype)
    mixpertize(model, 4, 2, expert_names=EXPERTS)
    print(f"model     {type(model).__name__}, experts {', '.join(EXPERTS)}")

    training, held_out = labelled_images(args.data, args.images)
    train_router(model, processor, training)
    print(f"router    trained on {len(training)} images")
    print_accuracy(held_out, routes(model, processor, held_out))

    # One batch: an image of each domain that the router was not trained on.
    samples = [next(s for s in held_out if s.domain == domain) for domain in DOMAINS]
    results = ask(model, processor, samples, args.max_new_tokens)
    print_answers(samples, results)
    alone = [ask(model, processor, [sample], args.max_new_tokens)[0] for sample in samples]
    print(f"alone     {same(results, alone)}")

    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    del model
    model, processor = load(args.out, args.device, args.dtype)
    print(f"reloaded  {same(results, ask(model, processor, samples, args.max_new_tokens))}")
    draw(args.out / "routes.png", samples, results)
    print(f"written   model, processor and routes.png to {args.out}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, help="directory of a LLaVA-OneVision")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model (default)")
    parser.add_argument("--data", type=Path, help="folder of images in photo/, chart/, document/")
    parser.add_argument("--images", type=int, default=24, help="drawn a domain, without --data")
    parser.add_argument("--out", type=Path, default=Path("llava-onevision-mixpert"))
    parser.add_argument("--max-new-tokens", type=int, help="default: 64, tiny 8")
    parser.add_argument("--dtype", default="auto", help="float32, ...; default: the directory's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.model and args.tiny:
        parser.error("--tiny must come without a directory")
    args.max_new_tokens = args.max_new_tokens or (64 if args.model else 8)
    if args.model:
        run(args.model, args)
        return
    import tiny_llava_onevision

    with tempfile.TemporaryDirectory() as directory:
        run(tiny_llava_onevision.write(Path(directory)), args)


if __name__ == "__main__":
    main()
