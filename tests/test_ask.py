"""What agents say: samples against plain passes, top answers by enumeration."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ask
import conftest
from conftest import change_json, copy_run, damaged_model, player_of, read_json
from envs import ORDERS, STATES, Condition, build_prompts
from policy import encode

TEXTS = [[5, 6, 7], [8, 9, 10, 11, 12]]
HOSTILE = {"temperature": 0.2, "top_k": 3, "top_p": 0.5, "repetition_penalty": 3.0}


def next_probabilities(model, texts):  # [text, vocabulary]
    return model(torch.tensor(texts)).logits[:, -1].detach().double().softmax(-1).numpy()


def test_what_is_sampled():
    """2,000 samples after each of two texts of different lengths."""
    model = conftest.random_model("llama")
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    model.generation_config.update(**HOSTILE)
    torch.manual_seed(0)
    said = ask.generate(model, tokenizer, TEXTS * 2_000, {319}, 1)
    for i, text in enumerate(TEXTS):
        p = next_probabilities(model, [text])[0] * (np.arange(320) < 319)  # the end is not said
        share = np.bincount([int(token) for token in said[i::2] if token], minlength=320) / 2_000
        assert (np.abs(share - p) <= 5 * np.sqrt(p / 2_000) + 1 / 2_000).all()
        assert (share > 0).sum() > 50


def test_top_answers_equal_enumeration(monkeypatch):
    """All texts of two tokens, none left out: 20 most probable ones, in two prompts at once."""
    model, stop, joint = conftest.random_model("llama"), 7, np.zeros((2, 320, 320))
    for own, prompt in zip(joint, TEXTS):
        first = next_probabilities(model, [prompt])[0]
        own[:] = first[:, None] * next_probabilities(model, [[*prompt, x] for x in range(320)])
        own[stop] = first[stop], *[0] * 319  # a text of its own, whatever follows
    best = np.divmod(joint.mean(axis=0).ravel().argsort()[:-21:-1], 320)
    found, unseen = ask.likely_texts(model, TEXTS, 2, {stop}, 20)
    assert unseen is None and stop in best[0]
    for (text, p), a, b in zip(found, *best, strict=True):
        assert text == ((a,) if a == stop else (a, b))
        assert p == pytest.approx(joint[:, a, b], rel=1e-3)
    monkeypatch.setattr(ask, "PASSES", 1)  # behind the first tokens nothing was looked
    first = joint.sum(axis=2).mean(axis=0) * (np.arange(320) != stop)
    assert ask.likely_texts(model, TEXTS, 2, {stop}, 20)[1] == pytest.approx(first.max(), rel=1e-3)


def test_ask(run, tiny, tmp_path, capsys, monkeypatch):
    """Prompts, answers and own words in every state; where the search runs out, it says so."""
    path, mine = tmp_path / "out.json", tmp_path / "mine.txt"
    wording, names = "Choose {first} or {second}. They did {other}.", ("action3", "action4")
    mine.write_text(wording)
    options = f"--json {path} --game chicken --prompt {mine} --persona deontological".split()
    ask.main([str(run), *options, "--seed", "3"])
    printed, asked = capsys.readouterr().out, read_json(path)
    results = asked.pop("agents")
    assert asked["prompt"] == wording and asked["game"] == ["chicken"]
    assert list(results) == ["untuned", str(run)] and "passes" not in printed
    condition = Condition("chicken", names, prompt=wording, persona="deontological")
    rng = np.random.default_rng(3)
    questions = rng.choice(ask.QUESTIONS, 4).tolist()
    actions = rng.random(4) >= player_of(*tiny, condition)[:, 0, 0]
    answers = [entry["answer"] for entry in results["untuned"]["states"]]
    assert answers == [names[int(action)] for action in actions]
    for agent in results.values():
        expected = zip(STATES, build_prompts(condition)[::ORDERS], questions)
        for entry, (state, prompt, question) in zip(agent["states"], expected, strict=True):
            assert entry["state"] == state and entry["prompt"] == prompt
            assert "  | " + entry["prompt"].replace("\n", "\n  | ") in printed
            assert f"  {question}\n  > {entry['reply']}\n" in printed
        assert len(agent["answers"]) == 5 and agent["unseen"] is None
    assert results["untuned"]["answers"] != results[str(run)]["answers"]
    with conftest.refused(capsys, "--json", "--overwrite"):
        ask.main([str(run), *options])
    # A folder's generation settings, and a token for padding that the model has no row for.
    own = copy_run(run, tmp_path / "own", model=damaged_model(tmp_path / "model", lambda _: None))
    change_json(tmp_path / "model" / "generation_config.json", **HOSTILE)
    change_json(tmp_path / "model" / "tokenizer_config.json", pad_token="<beyond>")
    monkeypatch.setattr(ask, "PASSES", 1)
    generate, said, read = ask.generate, [], []
    monkeypatch.setattr(ask, "generate", lambda *a, **k: read.append(a[2]) or generate(*a, **k))
    for which in (run, own):
        ask.main([str(which), "--sampling", "free", "--json", str(path), "--overwrite"])
        assert "stopped after 1 passes: others may have 0." in capsys.readouterr().out
        said.append([*read_json(path)["agents"].values()])
    prompts = encode(tiny[1], build_prompts(Condition(actions=names)), names)[0][::ORDERS]
    assert said[0] == said[1] and read[0] == read[2] == prompts  # of free answers, both agents'


def test_the_seed_alone_draws_questions_and_words(run, tmp_path):
    """The same seed twice, with other draws in between, then another one."""
    path, said = tmp_path / "out.json", []
    for seed in ("1", "1", "2"):
        torch.rand(7)
        options = ["--sampling", "free", "--seed", seed, "--json", str(path), "--overwrite"]
        ask.main([str(run), *options])
        said.append(read_json(path)["agents"])
    assert said[0] == said[1]
    replies = [[s["reply"] for s in agents["untuned"]["states"]] for agents in said]
    assert replies[0] != replies[2] and all(replies[0])
    seen = {s["question"] for agents in said for s in agents["untuned"]["states"]}
    assert seen == {*ask.QUESTIONS}
