"""The hand-written LoRA against PEFT, in both directions, and what an adapter must never touch."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from conftest import adapted_model, change_json, cut_file, narrow_matrices, random_model
from lora import (
    LoRALinear,
    adapter,
    adapter_parameters,
    add_adapter,
    load_adapter,
    lora_layers,
    merge_adapter,
    save_adapter,
)

IDS = torch.arange(2, 26).reshape(2, 12)
KINDS = ("gemma2", "llama", "qwen2", "gpt2", "gpt_neox")
adapted = partial(adapted_model, rank=4, alpha=6)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@torch.no_grad()
def adapted_logits(model, name="player"):
    with adapter(model, name):
        return model(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_saved_here_loads_in_peft(kind, tmp_path):
    model = adapted(kind)
    save_adapter(model, "player", tmp_path)
    theirs = PeftModel.from_pretrained(random_model(kind), tmp_path)
    assert (adapted_logits(model) - logits(random_model(kind))).abs().max() > 1e-2
    assert (adapted_logits(model) - logits(theirs)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "kind, targets",
    [("gemma2", ["q_proj", "v_proj"]), ("llama", "all-linear"), ("gpt2", ["c_attn", "c_proj"])],
)
def test_trained_by_peft_loads_here(kind, targets, tmp_path):
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=targets,
        task_type="CAUSAL_LM",
        fan_in_fan_out=kind == "gpt2",
    )
    theirs = get_peft_model(random_model(kind), config)
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        theirs(IDS, labels=IDS).loss.backward()
        optimizer.step()
    theirs.save_pretrained(tmp_path)
    model = random_model(kind)
    load_adapter(model, "player", tmp_path)
    assert (adapted_logits(model) - logits(random_model(kind))).abs().max() > 1e-2
    assert (adapted_logits(model) - logits(theirs.eval())).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_and_none_are_the_base_model(kind):
    base = logits(random_model(kind))
    model = random_model(kind)
    add_adapter(model, "player", 4, 8)
    assert torch.equal(adapted_logits(model), base)
    model = adapted(kind)
    assert torch.equal(adapted_logits(model, None), base) and torch.equal(logits(model), base)


def test_all_linear_layers_but_the_head():
    model = adapted("llama")
    wrapped = {name.rpartition(".")[2] for name in lora_layers(model)}
    attention, mlp = "q_proj k_proj v_proj o_proj".split(), "gate_proj up_proj down_proj".split()
    assert wrapped == {*attention, *mlp}
    assert len(lora_layers(model)) == 7 * 2 and not isinstance(model.lm_head, LoRALinear)
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trainable == set(map(id, adapter_parameters(model, "player")))


def test_gradients_stay_in_the_active_adapter():
    model = adapted("llama")
    add_adapter(model, "other", 2, 2)
    with adapter(model, "player"):
        model(IDS).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(model, "player"))
    assert all(parameter.grad is None for parameter in adapter_parameters(model, "other"))
    for name, parameter in model.named_parameters():
        assert "base" not in name or parameter.grad is None


def test_two_adapters_are_independent():
    model = adapted("llama")
    before = adapted_logits(model)
    add_adapter(model, "other", 2, 2)
    torch.nn.init.normal_(adapter_parameters(model, "other")[1])
    assert torch.equal(adapted_logits(model), before)
    assert not torch.equal(adapted_logits(model, "other"), before)


def test_kaiming_uniform_a():
    model = random_model("llama")
    add_adapter(model, "player", 16, 16)
    a = adapter_parameters(model, "player")[0].detach()  # [16, 32]
    bound = 32**-0.5
    assert a.abs().max() <= bound and a.std() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_bfloat16_base_keeps_float32_adapters():
    model = random_model("llama").to(torch.bfloat16)
    add_adapter(model, "player", 4, 8)
    parameters = adapter_parameters(model, "player")
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    assert adapted_logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_merged_model_is_plain(kind, tmp_path):
    model = adapted(kind)
    expected = adapted_logits(model)
    merge_adapter(model, "player")
    assert not lora_layers(model)
    model.save_pretrained(tmp_path)
    attention = model.config._attn_implementation
    plain = type(model).from_pretrained(tmp_path, attn_implementation=attention)
    assert (logits(plain) - expected).abs().max() < 1e-5 * expected.abs().max()


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda run: cut_file(run / WEIGHTS, 200), "cannot read "),
        (lambda run: narrow_matrices(run / WEIGHTS), "for another model"),
        (lambda run: change_json(run / CONFIG, use_dora=True), "not plain LoRA"),
        (lambda run: change_json(run / CONFIG, peft_type="IA3"), "not plain LoRA"),
        (lambda run: change_json(run / CONFIG, r=3), "for another model"),
        (lambda run: (run / CONFIG).write_text("{"), "cannot read the adapter"),
    ],
)
def test_damaged_adapters_are_refused(damage, message, tmp_path):
    save_adapter(adapted("llama"), "player", tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_adapter(random_model("llama"), "player", tmp_path)


def test_adapter_of_another_architecture(tmp_path):
    save_adapter(adapted("gpt2"), "player", tmp_path)
    with pytest.raises(ValueError, match="for another model"):
        load_adapter(random_model("llama"), "player", tmp_path)
