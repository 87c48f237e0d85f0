"""What an agent says: top answers against enumeration, legality against sampling."""

import numpy as np
import pytest
import torch

import evaluate
import evaluator as evaluators
from conftest import copy_run, read_json, run_training
from envs import ILLEGAL, ORDERS, STATES
from evaluator import Evaluator, likely_texts
from prompts import Condition

CONFIG = {"model": "tiny", "dtype": "float32", "sampling": "free"}


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator(CONFIG)


def next_log_probs(model, texts):
    """Of the token after each text, all of one length: [text, vocabulary]."""
    with torch.no_grad():
        return model(torch.tensor(texts)).logits[:, -1].double().log_softmax(-1)


def test_top_answers_equal_enumeration(evaluator):
    """All texts of two tokens, none left out: 5 most probable ones, in two prompts at once."""
    model = evaluator.model
    prompts, _ = evaluator.tokens(Condition())
    prompts = [prompts[0], prompts[ORDERS]]
    stop = evaluator.tokenizer.eos_token_id
    found = likely_texts(model, prompts, 2, {stop}, 5)

    known = {}
    size = model.config.vocab_size
    for i, prompt in enumerate(prompts):
        first = next_log_probs(model, [prompt])[0]
        for start in torch.arange(size).split(200):
            second = next_log_probs(model, [[*prompt, token] for token in start.tolist()])
            for token, row in zip(start.tolist(), first[start][:, None] + second):
                known.setdefault(token, np.zeros((2, size)))[i] = row.exp().numpy()
        known.setdefault("stop", np.zeros(2))[i] = first[stop].exp()
    stopped = known.pop("stop")
    every = [(stopped.mean(), (stop,), stopped)]
    for token, joint in known.items():
        if token != stop:
            mean = joint.mean(axis=0)
            for other in mean.argsort()[-5:]:
                every.append((mean[other], (token, int(other)), joint[:, other]))
    every.sort(key=lambda entry: -entry[0])
    assert [text for text, _ in found] == [text for _, text, _ in every[:5]]
    for (_, probabilities), (_, _, expected) in zip(found, every):
        assert probabilities == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("legal", ["prefix", "strict"])
def test_legality_equals_sampling(legal):
    """100,000 answers, sampled token by token to one behind the name, read as text."""
    evaluator = Evaluator(CONFIG, legal=legal)
    condition = Condition(names=("action3", "moon7"))  # one token, two tokens
    exact = evaluator.table(None, condition)[0]
    prompts, names = evaluator.tokens(condition)
    length, generator = max(map(len, names)) + 1, torch.Generator().manual_seed(0)

    def texts(prefix, count):
        """How often each text of `length` tokens is sampled after a prefix: {tokens: count}."""
        if len(prefix) == length or prefix[-1:] == (evaluator.tokenizer.eos_token_id,):
            return {prefix: count}
        chances = next_log_probs(evaluator.model, [[*prompts[0], *prefix]])[0].exp()
        drawn = torch.multinomial(chances, count, replacement=True, generator=generator)
        sampled = {}
        for token, times in zip(*[x.tolist() for x in drawn.unique(return_counts=True)]):
            begins = any(tuple(name)[: len(prefix) + 1] == (*prefix, token) for name in names)
            ends = any(tuple(name) == prefix[: len(name)] for name in names)
            if begins or ends:  # any other text is illegal, whatever follows
                sampled |= texts((*prefix, token), times)
        return sampled

    counts, blank = np.zeros(2), set(evaluators.ending_tokens(evaluator.tokenizer))
    for tokens, count in texts((), 100_000).items():
        for i, name in enumerate(names):
            behind = tokens[len(name) : len(name) + 1]
            if tokens[: len(name)] == tuple(name):
                counts[i] += count * (legal == "prefix" or set(behind) <= blank)
    share = counts / 100_000
    error = np.sqrt(exact[:ILLEGAL] * (1 - exact[:ILLEGAL]) / 100_000)
    assert (np.abs(share - exact[:ILLEGAL]) <= 4 * error + 1e-9).all()
    assert exact.sum() == pytest.approx(1) and 0.01 < exact[0] < 0.99


def test_strict_is_never_more_than_prefix(evaluator):
    strict = Evaluator(CONFIG, legal="strict").table(None, Condition())
    prefix = evaluator.table(None, Condition())
    assert (strict[:, :ILLEGAL] <= prefix[:, :ILLEGAL] + 1e-9).all()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluator") / "run"
    run_training(out, "--reward", "utilitarian", "--sampling", "free", "--episodes", "2560")
    return out


def test_both_roles_and_the_warning(run, tmp_path, capsys):
    """Names are tested in both roles; a preference for a word is said."""
    path = tmp_path / "results.json"
    evaluate.main([str(run), "--game", "ipd", "--json", str(path)])
    printed, [agent] = capsys.readouterr().out, read_json(path)["runs"]
    parts = [agent[part]["ipd"] for part in ("games", "swapped")]
    legal = [[p["policy"][s] / (1 - p["illegal"][s]) for s in STATES] for p in parts]
    assert np.mean(legal[0]) - np.mean(legal[1]) > 0.2 and "leans to the word action3" in printed
    swapped = ["--actions", "action4", "action3", "--overwrite", "--json", str(path)]
    evaluate.main([str(run), "--game", "ipd", *swapped])
    assert read_json(path)["runs"][0]["games"] == agent["swapped"]
    assert "leans to the word action3" in capsys.readouterr().out
    # An agent whose training had these names in both roles is not tested twice.
    known = copy_run(run, tmp_path / "known", actions=["action3", "moon", "action4"])
    evaluate.main([str(known), "--game", "ipd", *swapped])
    assert "swapped" not in read_json(path)["runs"][0]
    assert "leans to the word" not in capsys.readouterr().out


def test_answers_are_shown(run, tmp_path, capsys):
    """By default with free sampling: whole texts, each with its probability in every state."""
    path = tmp_path / "results.json"
    names = ["--actions", "action1", "action2"]
    evaluate.main([str(run), "--game", "ipd", *names, "--json", str(path)])
    [agent] = read_json(path)["runs"]
    assert len(agent["answers"]) == 5 and "most probable answers" in capsys.readouterr().out
    said = sum(a["states"]["CC"] for a in agent["answers"] if a["text"].startswith("action1"))
    assert said <= 1 and agent["answers"][0]["text"].startswith("action1")
    evaluate.main([str(run), "--game", "ipd", "--answers", "0", "--overwrite", "--json", str(path)])
    assert "answers" not in read_json(path)["runs"][0]


def test_an_opponent_that_is_a_run(run, tmp_path):
    """It plays on the other side: as exact as against its four numbers."""
    path = tmp_path / "results.json"
    options = ["--game", "chicken", "--actions", "action1", "action2", "--json", str(path)]
    evaluate.main([str(run), "--opponent", str(run), *options])
    against_run = read_json(path)["runs"][0]["games"]["chicken"]["reward"]["game"]
    player = Evaluator(CONFIG).player(run, Condition("chicken"), second=True)
    legal = player[..., :ILLEGAL] / player[..., :ILLEGAL].sum(axis=-1, keepdims=True)
    numbers = [str(p) for p in legal[..., 0].mean(axis=1)]
    evaluate.main([str(run), "--opponent", *numbers, "--overwrite", *options])
    against_numbers = read_json(path)["runs"][0]["games"]["chicken"]["reward"]["game"]
    assert against_run == pytest.approx(against_numbers, abs=0.1)
