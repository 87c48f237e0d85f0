"""The trie against plain passes, forward and backward; where an answer starts; faulty folders."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

import conftest
import policy as policies
import trie as tries
from conftest import CONFIGS, ROOT, adapted_policy, plain_passes, random_model
from envs import Condition, build_prompts
from errors import InputError, about
from lora import LoRALinear, add_adapter
from policy import Policy, checkpoint_layers, encode
from ppo import Learner, sum_gradients
from trie import Trie

TEXTS, ANSWERS = conftest.shared_prefix_texts()


def largest_difference(a, b):
    return max((x - y).abs().max() for x, y in zip(a, b))


def gradients(policy, table):
    """Of a weighted sum of a table's log-probabilities and values, for each parameter."""
    generator = torch.Generator().manual_seed(0)
    loss = sum((torch.randn(x.shape, generator=generator) * x).sum() for x in table)
    return torch.autograd.grad(loss, policy.parameters())


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_forward_and_backward_equal_plain_passes(kind, free):
    policy, trie = adapted_policy(kind, free)
    table, expected = policy(trie), plain_passes(policy, TEXTS, ANSWERS)
    assert largest_difference(table, expected) < 1e-4
    assert table[0].std() > 0.1 and table[1].std() > 0.1  # no comparison of constants
    for ours, theirs in zip(gradients(policy, table), gradients(policy, expected)):
        assert (ours - theirs).abs().max() / (1 + theirs.abs().max()) < 1e-4

    alone, reference = policy(trie, graph=False), plain_passes(policy, TEXTS, ANSWERS, True)
    assert all(map(torch.equal, alone, table)) and not any(x.requires_grad for x in alone)
    assert np.array_equal(policy.probabilities(trie), alone[0].double().exp().numpy())
    assert policy.reference(trie).dtype == torch.float64
    assert largest_difference([policy.reference(trie)], reference) < 1e-4


@pytest.mark.parametrize("free", [False, True])
def test_the_embedded_model_equals_plain_passes(free, tiny):
    names = ("moon7", "moonlit")  # several tokens each, and the first one in common
    policy = Policy(*tiny, None, free)
    texts = build_prompts(Condition(actions=names))
    trie = policy.trie(texts, names)
    assert len(trie.prompts) == 16 and policy.trie(texts, names) is trie
    with torch.no_grad():
        expected = plain_passes(policy, trie.prompts, trie.answers)
    assert largest_difference(policy(trie, graph=False), expected) < 1e-4


def test_gradient_of_the_illegal_answer():
    """d log P(illegal) is the mean of d log P(token) over the illegal tokens, by their chances."""
    model = random_model("llama")
    parameter = model.get_input_embeddings().weight
    log_probs, _ = Policy(model, None, None, free=True)(Trie([[3, 4, 5]], [[6], [7]]))
    [gradient] = torch.autograd.grad(log_probs[0, 2], parameter)
    every = model(torch.tensor([[3, 4, 5]])).logits[0, -1].log_softmax(-1)
    illegal = [token for token in range(320) if token not in (6, 7)]
    chances = every[illegal].exp().detach()
    mean = (every[illegal] * chances / chances.sum()).sum()
    [expected] = torch.autograd.grad(mean, parameter)
    assert gradient.abs().max() > 1e-3
    assert (gradient - expected).abs().max() < 1e-4 * (1 + expected.abs().max())


@pytest.mark.parametrize("legal", [1e-30, 1e-7, 0.3, 0.9, 1 - 1e-6, 1 - 1e-7, 1.0, 1 + 1e-7])
def test_log_illegal_is_stable(legal):
    probabilities = torch.tensor([[legal * 0.75, legal * 0.25]], dtype=torch.float64)
    log_probs = torch.log(probabilities).float().requires_grad_()
    result = policies.log_illegal(log_probs)
    result.backward()
    assert torch.isfinite(result).all() and torch.isfinite(log_probs.grad).all()
    if legal < 1 - 1e-5:
        assert result.item() == pytest.approx(math.log1p(-legal), rel=1e-5, abs=1e-6)
    else:
        assert result.item() < math.log(2e-6)


@pytest.mark.parametrize("kind", ["gemma2", "gpt2"])
def test_checkpointing_changes_nothing_but_the_memory(kind):
    """In an update, whose gradients stay in the parameters; lr is as good as 0."""
    rng = np.random.default_rng(0)
    prompt, action = rng.integers(len(TEXTS), size=(40, 5)), rng.integers(3, size=(40, 5))
    tables, left = [], []
    for change in (lambda model: None, checkpoint_layers):
        policy, trie = adapted_policy(kind)
        change(policy.model)
        tables.append(policy(trie))
        learner = Learner(policy, lr=1e-12, epochs=2)
        learner.update(trie, tables[-1], prompt, action, np.cos(7 * action + prompt))
        left.append([parameter.grad for parameter in policy.parameters()])
    assert all(map(torch.equal, *tables))
    assert largest_difference(*left) < 1e-6
    assert min(gradient.abs().max() for gradient in left[1]) > 1e-4  # each of them is something


def test_a_layer_that_does_not_run_has_a_gradient_of_zero():
    model = random_model("llama")
    model.model.unused = torch.nn.Linear(4, 4)
    add_adapter(model, "player", 4, 8)
    policy = Policy(model, None, "player")
    policy(Trie(TEXTS, ANSWERS))[0].sum().backward()
    norms = [p.grad.norm() for p in policy.parameters() if p.grad is not None]
    gradients = sum_gradients(policy.parameters())
    assert torch.nn.utils.get_total_norm(gradients).item() == pytest.approx(math.hypot(*norms))
    assert all((getattr(model.model.unused, name)["player"].grad == 0).all() for name in "AB")


def test_saved_and_loaded(tmp_path):
    (policy, trie), (other, _) = adapted_policy("llama"), adapted_policy("llama")
    for parameter in other.parameters():
        parameter.data.mul_(2)
    policy.save(tmp_path)
    other.load(tmp_path)
    assert torch.equal(other(trie)[0], policy(trie)[0])
    assert not torch.equal(other(trie)[1], policy(trie)[1])
    other.load(tmp_path, value_head=True)
    assert torch.equal(other(trie)[1], policy(trie)[1])
    conftest.change_tensors(tmp_path / "value_head.safetensors", lambda t: {k: t[k] / 0 for k in t})
    with pytest.raises(InputError, match=r"value_head.*not finite"):
        other.load(tmp_path, value_head=True)


def test_trie_shares_prefixes():
    trie = Trie([[1, 2, 3], [1, 2, 4]], [[5, 6], [5, 7]])
    # 1, 2, then 3 and 4, then 5 under each; the answers' last tokens need no node.
    assert trie.tokens.tolist() == [[1, 2, 3, 5, 4, 5]]
    assert trie.depth.tolist() == [[0, 1, 2, 3, 2, 3]]
    assert trie.keep.tolist() == [2, 3, 4, 5]
    assert trie.branches.tolist() == [[0, 1], [2, 3]]
    assert trie.ancestors[0, 5].tolist() == [True, True, False, False, True, True]
    assert trie.paths == [[(0, 5), (1, 6)], [(0, 5), (1, 7)]]
    assert trie.children == [[5], [6, 7]]


def test_prompts_with_little_in_common_are_packed_apart():
    trie = Trie([[1, 9, 9, 9], [1, 2, 3, 4], [1, 2, 3]], [[5]])
    # [1, 2, 3] is on the way to [1, 2, 3, 4].
    assert trie.tokens.tolist() == [[1, 2, 3, 4], [1, 9, 9, 9]]
    assert trie.keep.tolist() == [2, 3]
    assert trie.branches.tolist() == [[3], [1], [0]]
    seen = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert trie.ancestors[1].int().tolist() == seen


def test_prompts_are_dealt_out(monkeypatch):
    """Each to one of the processes, and those that have most in common to the same one."""
    prompts = [[i % 2, i] for i in range(6)]
    monkeypatch.setattr(tries.distributed, "is_initialized", lambda: True)
    for processes, shares in ((2, [[0, 2, 4], [1, 3, 5]]), (4, [[0, 2], [1, 4], [3], [5]])):
        monkeypatch.setattr(tries.distributed, "get_world_size", lambda n=processes: n)
        for rank, rows in enumerate(shares):
            monkeypatch.setattr(tries.distributed, "get_rank", lambda n=rank: n)
            assert tries.share_of_process(prompts) == rows
    with pytest.raises(InputError, match="processes than the 3 prompts"):
        tries.share_of_process(prompts[:3])


def test_boundary_of_the_embedded_model(tiny):
    _, tokenizer = tiny
    texts, answers = encode(tokenizer, ["Hi."], ("moon7", "K"))
    chat = [{"role": "user", "content": "Hi."}]
    assert texts == [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]]
    assert tokenizer.convert_ids_to_tokens(answers[0]) == ["moon", "##7"]


TURN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
SPACED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]"
    "{% else %} {{ m['content'] }}<s>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template, text", [(None, "Your answer:"), (SPACED, "[Your answer:]")])
def test_a_space_at_the_boundary_belongs_to_the_answer(template, text):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<s>"])
    core.train_from_iterator(["Your answer: red or blue, action1 action2"] * 9, trainer)
    settings = {"eos_token": "<s>", "chat_template": template}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **settings)
    texts, answers = encode(tokenizer, ["Your answer:"], ("red", "blue"))
    assert tokenizer.decode(texts[0]) == text
    assert [tokenizer.decode(answer) for answer in answers] == [" red", " blue"]


def test_names_whose_tokens_cannot_be_answers(tiny):
    glued = AutoTokenizer.from_pretrained(ROOT / "tiny", chat_template=TURN)
    for tokenizer, names, words in (
        (tiny[1], ("moon", "moon7"), "told apart"),  # a name is how another starts
        (tiny[1], ("moon7", "moon"), "told apart"),
        (tiny[1], ("moon", "é"), "unknown or special"),
        (tiny[1], ("moon", "<pad>"), "unknown or special"),
        (glued, ("7", "K"), "not the same after every prompt"),  # it goes on the word before it
    ):
        with pytest.raises(InputError, match=words):
            encode(tokenizer, ["Hi.", "moon"], names)


def weights(change):
    return lambda folder: conftest.change_tensors(folder / "model.safetensors", change)


def first_matrix(change):
    """Change the first layer's first matrix; what is None then is left out."""

    def changed(tensors):
        key = min(key for key in tensors if "proj" in key)
        tensors[key] = change(tensors[key])
        return {key: tensor for key, tensor in tensors.items() if tensor is not None}

    return weights(changed)


def config(**changes):
    return lambda folder: conftest.change_json(folder / "config.json", **changes)


def write(name, text):
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def other_class(name, without=None, **settings):
    """Weights of another class of model (but one), with the embedded model's tokenizer."""

    def write(folder):
        torch.manual_seed(0)
        size = len(AutoTokenizer.from_pretrained(ROOT / "tiny"))
        kind = getattr(transformers, name)
        model = kind(kind.config_class(vocab_size=size, **settings))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(5)
        model.save_pretrained(folder)
        weights(lambda tensors: {k: tensors[k] for k in tensors if k != without})(folder)

    return write


def named(*names):
    """Chat templates by names; the one of the embedded model's own file is the default one."""

    def write(folder):
        own = {"default": (folder / "chat_template.jinja").read_text()}
        (folder / "chat_template.jinja").unlink()
        templates = [{"name": name, "template": own.get(name, "tools")} for name in names]
        conftest.change_json(folder / "tokenizer_config.json", chat_template=templates)

    return write


def only_a_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def code_of_its_own(folder):
    mark = folder.parent / "executed"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    auto = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    config(model_type="unheard-of", auto_map=auto)(folder)


def fewer_embeddings(folder):
    weights(lambda t: {**t, EMBEDDING: t[EMBEDDING][:400].clone()})(folder)
    config(vocab_size=400)(folder)


def appends_a_token(folder):
    (folder / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    token, number = tokenizer.eos_token, tokenizer.eos_token_id
    after = processors.TemplateProcessing(single=f"$A {token}", special_tokens=[(token, number)])
    tokenizer.backend_tokenizer.post_processor = after
    tokenizer.save_pretrained(folder)


def missing_shard(folder):
    shard = folder / "model-00001-of-00002.safetensors"
    (folder / "model.safetensors").rename(shard)
    places = {**dict.fromkeys(load_file(shard), shard.name), "model.norm.weight": "00002"}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
BART = {"decoder_layers": 2, "decoder_attention_heads": 2, "d_model": 32, "init_std": 0.3}
FEWER = {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}
LAYERS = {"num_hidden_layers": 7, "layer_types": ["full_attention"] * 7}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
MODELS = {  # what is done to a model folder -> words of the line that refuses it
    "a weight is missing": (first_matrix(lambda matrix: None), "lack proj"),
    "a head is missing": (other_class("LlamaForCausalLM", HEAD, **SMALL), "lack head"),
    "keys have a prefix": (weights(lambda t: {f"base_model.{k}": t[k] for k in t}), "lack"),
    "another shape": (first_matrix(lambda matrix: matrix[:, :-1].contiguous()), "lack proj"),
    "more layers than weights": (config(**LAYERS), "lack layers.6"),
    "more weights than layers": (config(**FEWER), "no place for layers.5"),
    "a weight of nobody's": (weights(lambda t: {**t, "x.y": t[EMBEDDING] + 0}), "no place for x.y"),
    "quantised": (config(quantization_config={"quant_method": "fp8"}), "quantised name"),
    "a shard is missing": (missing_shard, "00002"),
    "weights that are not finite": (first_matrix(lambda matrix: matrix / 0), "not finite"),
    "an encoder": (other_class("BertLMHeadModel", **SMALL), "nats causal"),
    "positions of its own": (other_class("BartForCausalLM", **BART), "nats positions"),
    "ALiBi": (other_class("FalconForCausalLM", alibi=True, **SMALL), "Falcon ALiBi"),
    "ALiBi, unasked": (other_class("BloomForCausalLM", **SMALL), "Bloom ALiBi"),
    "a recurrence": (other_class("MambaForCausalLM", **SMALL), "layers linear_attention plain"),
    "no default among named templates": (named("tool_use", "rag"), "default"),
    "a cut file": (lambda at: conftest.cut_file(at / "model.safetensors", 1000), "cannot load"),
    "a pickle": (only_a_pickle, "safetensors"),
    "no JSON": (write("config.json", "{"), "cannot load"),
    "too short for one wording": (config(max_position_embeddings=60), "takes 60 tokens has 116"),
    "code in the folder": (code_of_its_own, "code of its own"),
    "an adapter in the folder": (write("adapter_config.json", "{}"), "holds an adapter"),
    "the tokenizer of a larger model": (fewer_embeddings, "knows 400 tokens tokenizer"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    "a tokenizer that appends a token": (appends_a_token, "appends"),
}
TEMPLATES = {
    "{{ raise_exception('a system turn first') }}": "a system turn first",
    "{% for %}": "template fails",
    TURN.replace("m['content']", "m['content'][0]['text']"): "leaves a turn out",
    TURN.replace("m['content']", "m['content'] | upper"): "changes its text",
    "{{ messages[0]['content'] }}": "leaves a turn out",  # the assistant's
    "{{ messages[1]['content'] }}": "leaves a turn out",  # the user's
}
EAGER = ["GPTJForCausalLM", "CodeGenForCausalLM", "GptOssForCausalLM"]
ROTARY = {**SMALL, "num_attention_heads": 4, "rotary_dim": 4, "num_key_value_heads": 2}
ROTARY |= {"head_dim": 8, "intermediate_size": 48, "num_local_experts": 4}
MODELS |= {text: (write("chat_template.jinja", text), words) for text, words in TEMPLATES.items()}


@pytest.mark.parametrize("fault", MODELS)
def test_models_that_are_refused(fault, capsys, tmp_path, monkeypatch):
    """In one line of the program that was told to use them; nothing has been written or run."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # "run the code?"
    damage, words = MODELS[fault]
    model = conftest.damaged_model(tmp_path / "model", damage)
    options = ["--reward", "game", "--prompt", "choice", "structured", "--model", model]
    with conftest.refused(capsys, "--model", *words.split()):
        conftest.run_training(tmp_path / "run", *options)
    assert not (tmp_path / "run").exists() and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", EAGER)
def test_a_class_without_sdpa_equals_plain_passes(name, tmp_path):
    folder = conftest.damaged_model(tmp_path / "m", other_class(name, **ROTARY))
    policy = Policy(*policies.load_model(folder), None, free=True)
    assert policy.model.config._attn_implementation == "eager"
    trie = policy.trie(build_prompts(Condition())[::5], ("action1", "action2"))
    with torch.no_grad():
        expected = plain_passes(policy, trie.prompts, trie.answers)
    assert largest_difference(policy(trie, graph=False), expected) < 1e-4
    assert expected[0].std() > 0.1


def test_of_named_chat_templates_the_default_one_is_used(tmp_path, tiny):
    folder = conftest.damaged_model(tmp_path / "model", named("tool_use", "default"))
    _, tokenizer = policies.load_model(folder)
    assert encode(tokenizer, ["Hi."], ("A", "B")) == encode(tiny[1], ["Hi."], ("A", "B"))


def test_the_date_in_a_template_stands_still():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny")
    chats = [[{"role": "user", "content": "Hi."}]]
    plain = tokenizer.apply_chat_template(chats, tokenize=False)
    assert policies.write_chats(tokenizer, chats) == plain
    dated = "{% set f = '%d %b %Y' %}{{ strftime_now(f) }} {{ strftime_now('%d %b %Y') }} "
    tokenizer.chat_template = dated + TURN
    assert policies.write_chats(tokenizer, chats) == ["1 January 2025 1 January 2025 Hi."]


def bug(*_, **__):
    raise KeyError("a bug")


@pytest.mark.parametrize("place", ["read_answers", "pack", "answer_tokens", "head", "LoRALinear"])
def test_a_bug_comes_out_as_it_is(place, monkeypatch, tiny):
    """Nothing but an InputError is caught, so a fork's own mistake keeps its traceback."""
    names = ("moon", "sun")
    texts = build_prompts(Condition(actions=names))
    policy = Policy(random_model("llama"), tiny[1], "player")
    add_adapter(policy.model, "player", 4, 8)
    trie = Trie(TEXTS, ANSWERS)
    if place in ("read_answers", "pack"):
        monkeypatch.setattr(Trie, place, bug)
    elif place == "answer_tokens":
        monkeypatch.setattr(policies, place, bug)
    elif place == "head":
        monkeypatch.setattr(policy.value_head, "forward", bug)
    else:
        monkeypatch.setattr(LoRALinear, "forward", bug)
    with about("--model"), pytest.raises(KeyError, match="a bug"):
        policy.trie(texts, names)
        policies.check_causal(policy, trie)
        policy(trie)


def test_a_temperature_is_no_fault_of_the_model(monkeypatch):
    """docs/FORK.md says where to put it: what is checked are the logits before it."""
    at_one = policies.answer_log_probs

    def cooler(trie, logits, free):
        return at_one(trie, logits / 0.2, free)

    policy, trie = adapted_policy("llama")
    before = policy.probabilities(trie)
    monkeypatch.setattr(policies, "answer_log_probs", cooler)
    policies.check_causal(policy, trie)
    assert np.abs(policy.probabilities(trie) - before).max() > 0.01


def test_a_bare_model_that_runs_out_of_memory_is_no_model_at_fault(monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("too much")

    model = random_model("llama")
    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        policies.check_runs(model, Trie(TEXTS, ANSWERS))
