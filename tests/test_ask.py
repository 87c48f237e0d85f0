"""What agents say: samples and greedy texts against plain passes, top answers by enumeration."""

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


def test_what_is_sampled_and_what_is_greedy():
    """2,000 samples after two texts of different lengths, and ten greedy tokens."""
    model = conftest.random_model("llama")
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    model.generation_config.update(**HOSTILE)
    torch.manual_seed(0)
    said = ask.generate(model, tokenizer, TEXTS * 2_000, {319}, 1, do_sample=True)
    for i, text in enumerate(TEXTS):
        p = next_probabilities(model, [text])[0] * (np.arange(320) < 319)  # the end is not said
        share = np.bincount([int(token) for token in said[i::2] if token], minlength=320) / 2_000
        assert (np.abs(share - p) <= 5 * np.sqrt(p / 2_000) + 1 / 2_000).all()
        assert (share > 0).sum() > 50
    model.generation_config.update(**HOSTILE)
    for text, greedy in zip(TEXTS, ask.generate(model, tokenizer, TEXTS, set(), 10)):
        for token in map(int, greedy.split()):
            assert token == next_probabilities(model, [text])[0].argmax()
            text = [*text, token]


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
    ask.main([str(run), *options])
    printed, results = capsys.readouterr().out, read_json(path)
    assert list(results) == ["untuned", str(run)] and "passes" not in printed
    condition = Condition("chicken", names, prompt=wording, persona="deontological")
    actions = np.random.default_rng(0).random(4) >= player_of(*tiny, condition)[:, 0, 0]
    answers = [entry["answer"] for entry in results["untuned"]["states"]]
    assert answers == [names[int(action)] for action in actions]
    for agent in results.values():
        for entry, *expected in zip(agent["states"], STATES, build_prompts(condition)[::ORDERS]):
            assert [entry["state"], entry["prompt"]] == expected
            assert "  | " + entry["prompt"].replace("\n", "\n  | ") in printed
            for question in ask.QUESTIONS:
                assert f"  {question}\n  > {entry[question]}\n" in printed
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
        said.append([*read_json(path).values()])
    prompts = encode(tiny[1], build_prompts(Condition(actions=names)), names)[0][::ORDERS]
    assert said[0] == said[1] and read[0] == read[3] == prompts  # of free answers, both agents'
