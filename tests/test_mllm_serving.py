"""``transformers serve``, as it comes, on a mixpertized model: real requests with images, against ``generate``."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from _mllms import KINDS, PATCH, PINPOINTS, SIZE
from PIL import Image
from test_mllm_parity import mixed
from test_mllm_processors import SQUARE
from tokenizers import Tokenizer, models, pre_tokenizers

from mixpert_kernels.hf.mllm import forced_routing, record_routing, router_features
from mixpert_kernels.training import fit_router

DOCS = Path(__file__).resolve().parent.parent / "docs" / "serving.md"
NAMES = ["versatile", "photo", "chart"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }} {% endfor %}{% endfor %}"
)
PICTURES = [Image.new("RGB", (32, 16), "white"), Image.new("RGB", (16, 32), "black")]
TOKENS = 8
pytestmark = pytest.mark.usefixtures("one_thread")  # tokens are compared with another process'


def make_processor() -> Any:
    """A processor whose tokenizer has a word for each of the model's tokens, so that an answer tells its tokens."""
    words = SPECIAL + [f"word{i}" for i in range(len(SPECIAL), 64)]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=False))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS
    )
    options = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return transformers.LlavaNextProcessor(
        images, tokenizer, PATCH, chat_template=TEMPLATE, **options
    )


def encoded(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


class Served:
    """A server's process, and the model it serves in this one."""

    def __init__(self, model: Any, processor: Any, url: str, log: Path) -> None:
        self.model, self.processor, self.url, self.log = model, processor, url, log

    def ask(self, *pictures: Image.Image, **options: Any) -> str:
        parts = [{"type": "image_url", "image_url": {"url": encoded(p)}} for p in pictures]
        content = [*parts, {"type": "text", "text": "word7 word8"}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": TOKENS}
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions",
            json.dumps({**body, "temperature": 0, **options}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read().decode()

    def tokens(self, *pictures: Image.Image) -> list[int]:
        answer = json.loads(self.ask(*pictures))["choices"][0]["message"]["content"]
        return self.processor.tokenizer.convert_tokens_to_ids(answer.split())

    def generated(self, *pictures: Image.Image, expert: Any = None) -> tuple[list[int], list]:
        """The tokens that ``generate`` gives in this process, and the experts."""
        content = [{"type": "image", "image": picture} for picture in pictures]
        content.append({"type": "text", "text": "word7 word8"})
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        options = {"max_new_tokens": TOKENS, "do_sample": False}
        with forced_routing(self.model, expert), record_routing(self.model) as records:
            output = self.model.generate(**inputs, **options)
        experts = [NAMES[e] for record in records for e in record.expert.tolist()]
        return output[0, inputs["input_ids"].shape[1] :].tolist(), experts


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A model with distinct experts and a router that has learned to tell the two pictures."""
    directory = tmp_path_factory.mktemp("served")
    kind, processor = KINDS["llava_next"], make_processor()
    plain = kind.build(image_token_id=processor.tokenizer.convert_tokens_to_ids("<image>"))
    model = mixed(kind, distinct=True, model=plain, expert_names=NAMES)
    prompt = "<image> " * len(PICTURES)
    inputs = processor(text=prompt, images=PICTURES, return_tensors="pt")
    fit_router(model, router_features(model, **inputs), torch.tensor([1, 2]))
    model.generation_config.suppress_tokens = list(range(len(SPECIAL)))  # what a text would hide
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def served(directory, tmp_path_factory) -> Iterator[Served]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    scratch = tmp_path_factory.mktemp("server")
    log, command = scratch / "log", str(Path(sys.executable).with_name("transformers"))
    options = ["--trust-remote-code", "--log-level", "info", "--host", "127.0.0.1", "--port", port]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(scratch / "code")}
    with log.open("w") as output:
        server = subprocess.Popen(
            [command, "serve", str(directory), *options],
            env={**environment, "HF_HUB_OFFLINE": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait(server, f"http://127.0.0.1:{port}/health", log)
        model = transformers.AutoModelForImageTextToText.from_pretrained(directory)
        processor = transformers.AutoProcessor.from_pretrained(directory)
        yield Served(model, processor, f"http://127.0.0.1:{port}", log)
    finally:
        server.terminate()
        server.wait(30)


def _wait(server: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + 180
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"the server did not start:\n{log.read_text()}")


def test_an_answer_is_what_generate_gives(served):
    for picture, name in zip(PICTURES, NAMES[1:], strict=True):
        tokens, experts = served.generated(picture)
        assert experts == [name]
        assert served.tokens(picture) == tokens and len(tokens) == TOKENS
        for other in set(NAMES) - {name}:
            assert served.generated(picture, expert=other)[0] != tokens


def test_images_of_one_request_go_to_different_experts(served):
    tokens, experts = served.generated(*PICTURES)
    assert experts == NAMES[1:]
    assert served.tokens(*PICTURES) == tokens
    for other in (*NAMES, NAMES[:0:-1]):
        assert served.generated(*PICTURES, expert=other)[0] != tokens


def test_a_request_without_an_image(served):
    assert served.tokens() == served.generated()[0]


def test_requests_at_the_same_time(served):
    batch = [PICTURES, PICTURES[:1], [], PICTURES[1:]]
    with ThreadPoolExecutor(len(batch)) as pool:
        answers = list(pool.map(lambda pictures: served.tokens(*pictures), batch))
    assert answers == [served.generated(*pictures)[0] for pictures in batch]


def test_a_streamed_answer(served):
    lines = served.ask(*PICTURES, stream=True).splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    words = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks).split()
    tokens = served.processor.tokenizer.convert_tokens_to_ids(words)
    assert tokens == served.generated(*PICTURES)[0]


def test_the_log_tells_the_routes(served):
    served.ask(*PICTURES, max_tokens=1)
    found = re.findall(r"mixpert image to (\w+) \((\d\.\d\d)\)", served.log.read_text())
    assert [name for name, score in found[-2:]] == NAMES[1:]
    assert all(float(score) > 1 / len(NAMES) for name, score in found[-2:])


def test_the_client_of_the_documentation(served, directory, tmp_path, monkeypatch, capsys):
    """The code of docs/serving.md, but for the address and the model's name."""
    monkeypatch.chdir(tmp_path)
    for name, picture in zip(("photo.png", "chart.png"), PICTURES, strict=True):
        picture.save(name)
    code = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[1]
    for written, meant in (
        ("http://localhost:8000", served.url),
        ('"served"', repr(str(directory))),
        ("What are these?", "word7 word8"),
        ("max_tokens=64", f"max_tokens={TOKENS}"),
    ):
        assert code.count(written) == 1
        code = code.replace(written, meant)
    exec(code, {})
    answer = capsys.readouterr().out.split()
    wanted = served.generated(*PICTURES)[0]
    assert served.processor.tokenizer.convert_tokens_to_ids(answer) == wanted
