"""The hand-written LoRA and NF4 against PEFT and bitsandbytes; what an adapter must never touch."""

import os
from functools import partial

import bitsandbytes
import pytest
import torch
from peft import PeftModel

import lora
import nf4
from conftest import adapted_model, change_json, change_tensors, cut_file, random_model
from errors import InputError
from lora import active_adapter, add_adapter, load_adapter, lora_layers, save_adapter
from nf4 import NF4Linear
from policy import load_model

IDS = torch.arange(2, 26).reshape(2, 12)
KINDS = ("gemma2", "llama", "qwen2", "gpt2", "gpt_neox")
adapted = partial(adapted_model, rank=4, alpha=6)


@torch.no_grad()
def logits(model, name=None):
    with active_adapter(model, name):
        return model(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_saved_here_loads_in_peft_and_comes_back(kind, tmp_path):
    model, again = adapted(kind), random_model(kind)
    save_adapter(model, "player", tmp_path)
    theirs = PeftModel.from_pretrained(random_model(kind), tmp_path)
    assert (logits(model, "player") - logits(random_model(kind))).abs().max() > 1e-2
    assert (logits(model, "player") - theirs(IDS).logits).abs().max() < 1e-5
    load_adapter(again, "player", tmp_path)
    assert torch.equal(logits(again, "player"), logits(model, "player"))
    theirs.save_pretrained(tmp_path)  # with all that PEFT might have turned on: not read here
    with pytest.raises(InputError, match="not one of train"):
        load_adapter(again, "player", tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_and_none_are_the_base_model(kind):
    base, model = random_model(kind), random_model(kind)
    add_adapter(model, "player", 4, 8)
    assert torch.equal(logits(model, "player"), logits(base))
    model = adapted(kind)
    assert torch.equal(logits(model), logits(base))
    assert torch.equal(model(IDS).logits, logits(base))  # outside of any block
    assert lora.base_fingerprint(model) == lora.base_fingerprint(base)
    base.get_input_embeddings().weight.data[0, 0] += 1
    assert lora.base_fingerprint(model) != lora.base_fingerprint(base)


def test_a_base_in_4_bits_is_the_same_on_a_cpu_and_on_a_gpu():
    """What is not in 4 bits is float32 there, bfloat16 here."""
    fingerprints = set()
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model("llama")
        nf4.quantise_layers(model, dtype)
        fingerprints.add(lora.base_fingerprint(model))
    assert len(fingerprints) == 1
    model.get_input_embeddings().weight.data[0, 0] += 1
    assert lora.base_fingerprint(model) not in fingerprints


def test_all_linear_layers_but_the_head():
    model = adapted("llama")
    wrapped = {name.rpartition(".")[2] for name in lora_layers(model)}
    assert wrapped == {*"q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()}
    assert len(lora_layers(model)) == 7 * 2 and not isinstance(model.lm_head, lora.LoRALinear)
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trainable == set(map(id, lora.adapter_parameters(model, "player")))
    layer = torch.nn.Linear(3, 2).eval()
    wrapped = lora.LoRALinear(layer)
    assert wrapped.weight is layer.weight  # some models look at it
    assert not wrapped.training  # a fork's dropout does not act in evaluation


def test_two_adapters_are_independent():
    model = adapted("llama")
    before = logits(model, "player")
    add_adapter(model, "other", 2, 2)
    torch.nn.init.normal_(lora.adapter_parameters(model, "other")[1])
    assert torch.equal(logits(model, "player"), before)
    assert not torch.equal(logits(model, "other"), before)
    # Gradients stay in the active one, and out of the base.
    with active_adapter(model, "player"):
        model(IDS).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in lora.adapter_parameters(model, "player"))
    assert all(parameter.grad is None for parameter in lora.adapter_parameters(model, "other"))
    assert all(p.grad is None for name, p in model.named_parameters() if "base" in name)


def test_float32_kaiming_uniform_a_on_a_bfloat16_base():
    model = random_model("llama").to(torch.bfloat16)
    add_adapter(model, "player", 16, 16)
    parameters = lora.adapter_parameters(model, "player")
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    assert logits(model, "player").dtype == torch.bfloat16
    a, bound = parameters[0].detach(), 32**-0.5  # [16, 32]
    assert a.abs().max() <= bound and a.std() == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_model_is_plain(kind, tmp_path):
    model = adapted(kind)
    expected = logits(model, "player")
    lora.merge_adapter(model, "player")
    assert not lora_layers(model)
    model.save_pretrained(tmp_path)
    attention = model.config._attn_implementation
    plain = type(model).from_pretrained(tmp_path, attn_implementation=attention)
    assert (logits(plain) - expected).abs().max() < 1e-5 * expected.abs().max()


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def each(change):
    """Change every matrix of an adapter."""
    return lambda run: change_tensors(run / WEIGHTS, lambda t: {k: change(t[k]) for k in t})


FAULTS = {  # what is done to an adapter's folder -> what it is said to be
    "cut": (lambda run: cut_file(run / WEIGHTS, 200), "cannot read .*safetensors"),
    "nan": (each(lambda matrix: matrix * float("nan")), "not finite"),
    "inf": (each(lambda matrix: matrix * float("inf")), "not finite"),
    "gpt2": (lambda run: save_adapter(adapted("gpt2"), "player", run), "for another model"),
    "narrow": (each(lambda matrix: matrix[:, :-1].contiguous()), "for another model"),
    "rank": (lambda run: change_json(run / CONFIG, r=3), "for another model"),
    "no config": (lambda run: (run / CONFIG).unlink(), "cannot read .*config"),
    "no JSON": (lambda run: (run / CONFIG).write_text("{"), "cannot read .*config"),
}
for text in ("[]", "{}", '{"r": 8, "peft_type": "LORA"}'):
    FAULTS[text] = lambda run, text=text: (run / CONFIG).write_text(text), "cannot read .*config"
OTHER = {"init_lora_weights": "pissa", "bias": "all", "peft_type": "IA3", "use_rslora": True}
OTHER |= {"rank_pattern": {"q_proj": 2}, "target_modules": ["q_proj"], "of_next_year": True}
for key, value in OTHER.items():
    FAULTS[key] = lambda run, new={key: value}: change_json(run / CONFIG, **new), f"another {key}"


@pytest.mark.parametrize("fault", FAULTS)
def test_adapters_that_are_refused(fault, tmp_path):
    save_adapter(adapted("llama"), "player", tmp_path)
    damage, said = FAULTS[fault]
    damage(tmp_path)
    with pytest.raises(InputError, match=said):
        load_adapter(random_model("llama"), "player", tmp_path)


def test_a_block_of_nf4_by_hand():
    """-2, the largest in size, has code 0; 0 has 7, 2 has 15, and 1 / 2 the level 0.44, 12."""
    weight = torch.tensor([-2.0, 0, 2, 1] * 16)
    codes, absmax = nf4.quantise(weight)
    assert absmax.tolist() == [2] and codes.tolist() == [0 << 4 | 7, 15 << 4 | 12] * 16


@pytest.mark.parametrize("shape", [(48, 160), (7, 9), None])  # not whole blocks; trained
def test_nf4_equals_bitsandbytes(shape):
    theirs = bitsandbytes.functional
    torch.manual_seed(0)
    model, _ = load_model(os.environ.get("REAL_MODEL", "tiny"), "cpu")
    linear = torch.nn.Linear(*shape[::-1]) if shape else model.model.layers[-1].mlp.down_proj
    codes, state = theirs.quantize_4bit(linear.weight.data, quant_type="nf4", blocksize=64)
    ours = NF4Linear(linear)
    assert torch.equal(ours.codes[: codes.numel()], codes.flatten())
    assert torch.equal(ours.absmax, state.absmax)
    assert torch.equal(ours.weight, theirs.dequantize_4bit(codes, state))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_nf4_computes_learns_and_merges_as_its_dequantised_weights(kind):
    """Logits and the adapter's gradients; of a layer nothing is left in float but its bias."""
    ours, plain = random_model(kind), random_model(kind)
    nf4.quantise_layers(ours, torch.float32)
    for path, layer in ours.named_modules():
        if isinstance(layer, NF4Linear):
            other, weight = plain.get_submodule(path), layer.weight
            other.weight.data = weight.T if kind == "gpt2" else weight
            assert {name for name, _ in layer.named_parameters()} <= {"bias"}
    for model in (ours, plain):
        add_adapter(model, "player", 4, 6)
        torch.manual_seed(1)
        for parameter in lora.adapter_parameters(model, "player"):
            torch.nn.init.normal_(parameter, std=0.1)
        with active_adapter(model, "player"):
            model(IDS).logits.square().mean().backward()
    assert (logits(ours, "player") - logits(plain, "player")).abs().max() < 1e-5
    pairs = zip(*(lora.adapter_parameters(model, "player") for model in (ours, plain)))
    assert all((a.grad - b.grad).abs().max() < 1e-4 for a, b in pairs)
    before = logits(ours, "player")
    lora.merge_adapter(ours, "player")
    assert not any(isinstance(layer, NF4Linear) for layer in ours.modules())
    assert (logits(ours) - before).abs().max() < 1e-4 * before.abs().max()


def test_peft_on_a_bitsandbytes_base_gives_the_same(tmp_path):
    """Probabilities of an adapter on a 4-bit base, theirs and ours."""
    ours = random_model("llama")
    nf4.quantise_layers(ours, torch.float32)
    add_adapter(ours, "player", 4, 6)
    for parameter in lora.adapter_parameters(ours, "player"):
        torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(ours, "player", tmp_path)
    theirs = random_model("llama")
    for path, layer in list(theirs.named_modules()):
        if isinstance(layer, torch.nn.Linear) and path != "lm_head":
            four = bitsandbytes.nn.Linear4bit(
                *layer.weight.shape[::-1], bias=False, quant_type="nf4"
            )
            four.weight = bitsandbytes.nn.Params4bit(
                layer.weight.data, quant_type="nf4", blocksize=64
            )
            theirs.set_submodule(path, four.to("cpu"))
    theirs = PeftModel.from_pretrained(theirs, tmp_path)
    with torch.no_grad():
        difference = theirs(IDS).logits.softmax(-1) - logits(ours, "player").softmax(-1)
    assert difference.abs().max() < 1e-3
