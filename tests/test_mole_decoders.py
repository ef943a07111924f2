"""Language experts in transformers' decoders: Llama, Qwen2, Mistral, Gemma and others of their make."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from contextlib import nullcontext

import peft
import pytest
import torch
import transformers
from torch import nn

from mixpert_kernels.hf import mome
from mixpert_kernels.modules import MixtureOfLanguageExperts
from mixpert_kernels.testing import randomize_

pytestmark = pytest.mark.usefixtures("one_thread")
PROMISED = ("Llama", "Qwen2", "Mistral", "Gemma")
FOUND = ("Gemma2", "Gemma3Text", "Qwen3", "Phi3", "Cohere")  # by the same walk
SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SENTENCE, HIDDEN = 12, 4
EXPERTS = {"hidden": HIDDEN, "sentence_width": SENTENCE}
STEPS = {"max_new_tokens": 6}


@functools.cache
def made(family: str, attention: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES)
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")
    return randomize_(model._from_config(config, attn_implementation=attention).eval())


def plain(family: str = "Llama", attention: str = "sdpa") -> nn.Module:
    return copy.deepcopy(made(family, attention))


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 48, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def llm():
    """A Llama in float64 with trained experts, so that a wrong one shows and rounding does not."""
    llm = plain().double()
    mome.add_language_experts(llm, **EXPERTS)
    for module in experts_of(llm):
        randomize_(module.router)
        for name in ("down", "down_bias", "up", "up_bias", "scale"):
            parameter = getattr(module, name)
            parameter.data = torch.randn_like(parameter) * 0.5
    return llm


def experts_of(llm: nn.Module) -> list[MixtureOfLanguageExperts]:
    return [m for m in llm.modules() if isinstance(m, MixtureOfLanguageExperts)]


@pytest.fixture
def sentences(llm):
    """Two instructions for which every layer chooses two adapters."""
    many = torch.randn(64, SENTENCE, generator=torch.Generator().manual_seed(2))
    chosen = torch.stack([m.probabilities(many).argmax(1) for m in experts_of(llm)], 1)
    other = next(i for i, row in enumerate(chosen) if (row != chosen[0]).all())
    return many[[0, other]]


@torch.no_grad()
def test_fresh_experts_give_the_plain_models_logits_bit_for_bit():
    prompt, mask = ids(2, 7), torch.ones(2, 7, dtype=torch.int64)
    mask[0, :3] = 0

    def results(llm):
        whole = llm(prompt, attention_mask=mask, use_cache=True)
        step = llm(
            prompt[:, -1:],
            attention_mask=torch.cat([mask, mask[:, -1:]], 1),
            past_key_values=whole.past_key_values,
        )
        sequences = llm.generate(prompt, attention_mask=mask, num_beams=3, **STEPS)
        return whole.logits, step.logits, sequences

    def bits(tensor):
        return tensor if tensor.dtype == torch.int64 else tensor.float().view(torch.int32)

    for family in PROMISED + FOUND:
        for attention in ("eager", "sdpa") if family in PROMISED else ("eager",):
            for dtype in (torch.float32, torch.bfloat16):
                llm = plain(family, attention).to(dtype)
                expected = results(llm)
                with mome.add_language_experts(llm, **EXPERTS).given(torch.randn(2, SENTENCE)):
                    got = results(llm)
                assert len(experts_of(llm)) == 2 and experts_of(llm)[0].up.dtype == dtype
                for one, other in zip(got, expected, strict=True):
                    assert torch.equal(bits(one), bits(other)), (family, attention, dtype)


GENERATED = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 3},
    "beams, one returned": {"num_beams": 3},
}


@torch.no_grad()
@pytest.mark.parametrize("how", GENERATED)
def test_two_requests_in_a_batch_get_what_each_gets_alone(llm, sentences, how):
    instruction, options = mome.instruction_of(llm), GENERATED[how] | STEPS
    returned = options.get("num_return_sequences", 1)
    prompt, mask = ids(2, 7), torch.ones(2, 7, dtype=torch.int64)
    prompt[0, :3] = mask[0, :3] = 0  # the first is shorter
    with instruction.given(sentences):
        both = llm.generate(prompt, attention_mask=mask, **options).view(2, returned, -1)
    others = []
    for b, first in enumerate((3, 0)):
        alone = {"input_ids": prompt[b : b + 1, first:], "attention_mask": mask[b : b + 1, first:]}
        with instruction.given(sentences[b : b + 1]):
            assert torch.equal(llm.generate(**alone, **options), both[b, :, first:])
        with instruction.given(sentences[1 - b : 2 - b]):
            others.append(torch.equal(llm.generate(**alone, **options), both[b, :, first:]))
    assert others == [False, False]


@torch.no_grad()
def test_sampled_sequences_of_a_request_are_of_its_experts(llm, sentences):
    instruction = mome.instruction_of(llm)
    torch.manual_seed(0)
    with instruction.given(sentences):
        sampled = llm.generate(
            ids(2, 5),
            do_sample=True,
            num_return_sequences=3,
            return_dict_in_generate=True,
            output_logits=True,
            **STEPS,
        )
    logits = torch.stack(sampled.logits, 1)  # (6, new tokens, vocabulary)
    assert len(sampled.sequences.unique(dim=0)) > 2
    for row, sequence in enumerate(sampled.sequences):
        with instruction.given(sentences[row // 3][None]):
            alone = llm(sequence[None, :-1]).logits[0, 4:]
        torch.testing.assert_close(logits[row], alone.to(logits.dtype))


@torch.no_grad()
def test_assisted_generation_is_the_greedy_one(llm, sentences):
    with mome.instruction_of(llm).given(sentences[:1]):
        greedy = llm.generate(ids(1, 5), **STEPS)
        assisted = llm.generate(ids(1, 5), assistant_model=plain().double(), **STEPS)
        looked_up = llm.generate(ids(1, 5), prompt_lookup_num_tokens=3, **STEPS)
    assert torch.equal(greedy, assisted) and torch.equal(greedy, looked_up)
    with mome.instruction_of(llm).given(sentences), pytest.raises(ValueError, match="instructions"):
        llm(ids(3, 5))


def gradients(llm, sentences, before_backward=nullcontext, thread=False):
    llm.train()
    llm.zero_grad()
    prompt = ids(2, 7)
    with mome.instruction_of(llm).given(sentences):
        loss = llm(prompt, labels=prompt).loss
    with before_backward():
        if thread:  # as the engine does on a GPU
            worker = threading.Thread(target=loss.backward)
            worker.start()
            worker.join()
        else:
            loss.backward()
    return {name: p.grad for name, p in llm.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("after", ["nothing", "another", "in a thread"])
def test_recomputed_layers_see_the_request_they_first_saw(llm, sentences, reentrant, after):
    expected = gradients(llm, sentences)
    assert all(g is not None for g in expected.values())  # DDP waits for every one
    assert all(g.count_nonzero() for n, g in expected.items() if "router" in n)
    llm.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        llm.enable_input_require_grads()
    calls = []
    experts_of(llm)[0].ffn.register_forward_hook(lambda *_: calls.append(1))
    other = functools.partial(mome.instruction_of(llm).given, sentences.flip(0))
    before_backward = {"another": other}.get(after, nullcontext)
    got = gradients(llm, sentences, before_backward, after == "in a thread")
    assert len(calls) == 2  # it was indeed computed again
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    assert mome.instruction_of(llm).request is None


def test_a_compiled_model_has_no_breaks_and_follows_each_threads_instruction(llm, sentences):
    instruction, prompt = mome.instruction_of(llm), ids(2, 5)
    torch._dynamo.reset()
    counter = torch._dynamo.utils.counters["stats"]
    counter.clear()
    compiled = torch.compile(llm, fullgraph=True, backend="aot_eager")
    results = {}

    @torch.no_grad()
    def serve(name, given):
        with instruction.given(given):
            results[name] = compiled(prompt, use_cache=False).logits, llm(prompt).logits

    orders = {"one": sentences, "other": sentences.flip(0), "same": sentences[[0, 0]]}
    for name, given in orders.items():
        if name == "other":
            worker = threading.Thread(target=serve, args=(name, given))
            worker.start()
            worker.join()
        else:
            serve(name, given)
    for got, expected in results.values():
        torch.testing.assert_close(got, expected)
    assert not torch.allclose(results["one"][0], results["other"][0])
    assert counter["unique_graphs"] == 1


@torch.no_grad()
def test_copies_and_what_is_left_when_the_experts_are_removed(llm, sentences):
    before = plain().double()
    prompt, instruction = ids(2, 5), mome.instruction_of(llm)
    with instruction.given(sentences):
        expected = llm(prompt).logits
        for copied in (copy.deepcopy(llm), pickle.loads(pickle.dumps(llm))):
            assert type(copied.model.layers[0]) is type(llm.model.layers[0])
            with pytest.raises(RuntimeError, match="no instruction is set"):
                copied(prompt)
            with mome.instruction_of(copied).given(sentences):
                assert torch.equal(copied(prompt).logits, expected)
    fresh = plain().double()
    mome.add_language_experts(fresh, **EXPERTS)
    fresh.load_state_dict(llm.state_dict())
    with mome.instruction_of(fresh).given(sentences):
        assert torch.equal(fresh(prompt).logits, expected)
    assert {p.dtype for p in llm.float().parameters()} == {torch.float32}

    ffns = [layer.mlp.ffn for layer in llm.model.layers]
    assert mome.remove_language_experts(llm) is llm
    assert [layer.mlp for layer in llm.model.layers] == ffns
    assert all(type(a) is type(b) for a, b in zip(llm.modules(), before.modules(), strict=True))
    assert list(llm.state_dict()) == list(before.state_dict())
    assert torch.equal(llm.double()(prompt).logits, before(prompt).logits)
    assert vars(llm.model.layers[0]).keys() == vars(before.model.layers[0]).keys()


def test_stage_one_becomes_stage_two():
    llm = plain()
    mome.add_language_experts(llm, experts=1, **EXPERTS)
    prompt = ids(2, 5)
    llm(prompt, labels=prompt).loss.backward()  # no instruction is needed
    torch.optim.SGD([p for n, p in llm.named_parameters() if ".up" in n], 0.1).step()
    with torch.no_grad():
        one = llm(prompt).logits
        mome.reclone_language_experts(llm, 4)
        with mome.instruction_of(llm).given(torch.randn(2, SENTENCE)):
            assert torch.equal(llm(prompt).logits, one)
    assert all(m.experts == 4 and m.up.count_nonzero() for m in experts_of(llm))


@pytest.mark.parametrize("first", ["experts", "lora"])
def test_lora_beside_the_experts(sentences, first):
    llm, prompt = plain().double(), ids(2, 5)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "gate_proj", "down_proj"], init_lora_weights=False
    )
    if first == "experts":
        mome.add_language_experts(llm, **EXPERTS)
        model = peft.get_peft_model(llm, config)
        for module in experts_of(model):  # PEFT froze them
            for name, parameter in module.named_parameters():
                parameter.requires_grad_("lora" in name or not name.startswith("ffn."))
    else:
        model = peft.get_peft_model(llm, config)
        mome.add_language_experts(model, **EXPERTS)
    instruction = mome.instruction_of(model)
    with instruction.given(sentences):
        with torch.no_grad():
            tuned = model(prompt).logits
            with model.disable_adapter():
                assert torch.equal(model(prompt).logits, plain().double()(prompt).logits)
        model(prompt, labels=prompt).loss.backward()
        assert model.generate(prompt, num_beams=2, **STEPS).shape == (2, 11)
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    for part in ("q_proj.lora_A", "mlp.ffn.gate_proj.lora_B", "mlp.up_bias", "mlp.router.2.bias"):
        assert any(part in name for name in trained), part
    assert not any("base_layer" in name for name in trained)
    merged = mome.remove_language_experts(model).merge_and_unload()
    torch.testing.assert_close(merged(prompt).logits, tuned)


def test_every_linear_may_have_a_lora_the_routers_too(llm, sentences):
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    with torch.no_grad():
        before = experts_of(llm)[0].probabilities(sentences)
        model = peft.get_peft_model(llm, config)
        after = experts_of(model)[0].probabilities(sentences)
        assert not torch.allclose(after, before)
    with mome.instruction_of(model).given(sentences):
        model(ids(2, 5)).logits.sum().backward()
    assert any("router.0.lora_A" in n for n, p in model.named_parameters() if p.grad is not None)


def test_adapters_in_float32_beside_a_half_precision_model(sentences):
    llm = plain().bfloat16().requires_grad_(False)
    instruction = mome.add_language_experts(llm, dtype=torch.float32, **EXPERTS)
    prompt = ids(2, 5)
    with instruction.given(sentences):
        llm(prompt, labels=prompt).loss.backward()
        with torch.no_grad():
            assert llm.generate(prompt, **STEPS).shape == (2, 11)
    grads = [p.grad.dtype for p in llm.parameters() if p.grad is not None]
    assert set(grads) == {torch.float32} and len(grads) == 2 * 9


def test_errors_say_what_was_looked_for():
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1)
    )
    sizes = {"hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 8, "num_attention_heads": 1}
    opt = transformers.OPTForCausalLM(
        transformers.OPTConfig(vocab_size=8, num_hidden_layers=1, **sizes)
    )
    for model, got in (
        (gpt2, "got GPT2Model without layers"),
        (opt, "got OPTDecoderLayer without an mlp, layer 0 of OPTDecoder"),
        (nn.Linear(2, 2), "got Linear without layers"),
    ):
        with pytest.raises(ValueError, match=f"`layers`, each with an `mlp`, as Llama.* {got}"):
            mome.add_language_experts(model)
    llm = plain()
    for call in (mome.remove_language_experts, mome.instruction_of, mome.reclone_language_experts):
        with pytest.raises(ValueError, match=f"{call.__name__}: llm must have language experts"):
            call(llm)
    for size in ({"experts": 0}, {"hidden": 0}, {"sentence_width": 0}):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            mome.add_language_experts(llm, **size)
    assert not experts_of(llm)
    mome.add_language_experts(llm, **EXPERTS)
    with pytest.raises(ValueError, match="must have no language experts yet"):
        mome.add_language_experts(llm)
    mome.remove_language_experts(llm)
    llm.model.layers[1].forward = llm.model.layers[1].forward  # what accelerate's hooks do
    with pytest.raises(ValueError, match=r"dispatched to devices .* a hooked LlamaDecoderLayer"):
        mome.add_language_experts(llm)
