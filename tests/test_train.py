"""The door: what a user types, what the run folder holds, and what happens to bad input."""

import csv
import json
import shutil
import subprocess
import sys
from itertools import permutations

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

import envs
import evaluate
import train
from conftest import ROOT, random_model, refused
from policy import Policy, encode, load_model
from rewards import moral_accuracy
from runs import processes

SHORT = ["--episodes", "48", "--batch", "16"]  # enough to have a run folder
ENOUGH = ["--episodes", "10240"]                  # less than half of the default is enough to learn one optimum


def run(out, *options):
    """A run in this process; its result.json."""
    train.main(["--out", str(out), *options])
    return json.loads((out / "result.json").read_text())


def setup(*options):
    """What `train.setup` returns, without a run."""
    args = train.parse_args(["--reward", "game", "--out", "never-written", *options])
    with processes(args):
        return train.setup(args)


# -------------------------------------------------------------------------------------------------------------------- learning
# All seeds, rewards and opponents are in benchmarks/learning.py; here one of each.

@pytest.mark.parametrize("reward, optimum", [("game", [0, 0, 0, 0]), ("utilitarian", [1, 1, 1, 1]), ("deontological", [1, None, 1, None]),
                                             ("game+deontological", [1, 0, 1, 0])])
def test_learns_the_optimum_worked_out_by_hand(reward, optimum, tmp_path):
    result = run(tmp_path / "run", "--reward", reward, *ENOUGH)
    for p, best in zip(result["policy_after"].values(), optimum):
        assert best is None or abs(p - best) <= 0.05
    assert any(best is not None and abs(p - best) > 0.05 for p, best in zip(result["policy_before"].values(), optimum))


def test_learns_to_be_legal(tmp_path):
    result = run(tmp_path / "run", "--reward", "utilitarian", "--sampling", "free", *ENOUGH)
    assert 0.2 <= np.mean(list(result["illegal_before"].values())) <= 0.7
    assert max(result["illegal_after"].values()) <= 0.02 and min(result["policy_after"].values()) >= 0.95


def test_shadow_of_the_future(tmp_path):
    patient = run(tmp_path / "patient", "--reward", "game", "--gamma", "0.9", *ENOUGH)
    assert patient["policy_after"]["CC"] >= 0.95


# ------------------------------------------------------------------------------------------------------------------ the run folder

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of seed 1 and one of seed 2, short ones."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run(folder / name, "--reward", "utilitarian", "--sampling", "free", "--seed", seed, *SHORT, *(["--merge"] if name == "a" else []))
    return folder


def test_same_seed_same_bytes(runs):
    for file in ("metrics.csv", "adapter_model.safetensors", "value_head.safetensors"):
        a, b, c = ((runs / name / file).read_bytes() for name in "abc")
        assert a == b and a != c


def test_metrics(runs):
    rows = list(csv.DictReader(open(runs / "a" / "metrics.csv")))
    assert [int(row["episodes"]) for row in rows] == [16, 32, 48]
    for row in rows:
        assert sum(int(row[kind]) for kind in train.ACTION_TYPES) == 16 * 5
        assert -6 <= float(row["reward"]) <= 6
        assert float(row["accuracy"]) == pytest.approx(np.mean([float(row[f"P(C|{state})"]) for state in envs.STATES]), abs=1e-5)  # to cooperate
    assert float(rows[0]["kl"]) == pytest.approx(0, abs=1e-6) and float(rows[-1]["kl"]) > 1e-4  # it starts as the base model
    assert float(rows[0]["kl_coef"]) == train.DEFAULTS["embedded"]["kl_coef"] > float(rows[1]["kl_coef"])


def test_every_setting_arrives(tmp_path, monkeypatch):
    """One update with nothing at its default, replayed by hand from the untuned policy on the same generator."""
    from ppo import Learner
    given = {}
    create = Learner.__init__
    monkeypatch.setattr(Learner, "__init__", lambda self, policy, **settings: given.update(settings) or create(self, policy, **settings))
    out = tmp_path / "run"
    run(out, "--reward", "game+deontological", "--game", "bach-stravinsky", "--opponent", "0.9", "0.2", "0.6", "0.4", "--sampling", "free",
        "--xi", "2", "--illegal", "-4", "--rounds", "7", "--episodes", "50", "--batch", "50", "--actions", "moon", "river", "--lr", "0.001",
        "--epochs", "3", "--clip", "0.3", "--kl-coef", "0.15", "--kl-target", "5", "--vf-coef", "0.25", "--gamma", "0.5", "--seed", "9",
        "--rank", "4", "--alpha", "12", "--layout", "both", "--prompt", "unstructured")
    assert given == dict(lr=0.001, epochs=3, clip=0.3, kl_coef=0.15, kl_target=5, vf_coef=0.25, gamma=0.5)
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (4, 12)

    payoffs = envs.payoff_array("bach-stravinsky")
    model, tokenizer = load_model("tiny", "cpu", "float32")
    texts = envs.prompts(payoffs, ("moon", "river"), "both", envs.TEMPLATES["unstructured"])
    table = Policy(model, None, *encode(tokenizer, texts, ("moon", "river")), free=True)()[0].detach().double().exp().numpy().reshape(4, 4, 3)
    mine, theirs = envs.play(np.random.default_rng(9), table, envs.memory_one((0.9, 0.2, 0.6, 0.4)), 50, 7)
    points, counts = [], dict.fromkeys(train.ACTION_TYPES, 0)
    for state, action, move, other in zip(*(array.ravel() for array in (mine.state, mine.action, mine.move, theirs.move))):
        after_c = state in (0, 2)  # the opponent's last move is the second letter of CC CD DC DD
        counts[("C", "D", "illegal")[action] + "|" + "DC"[after_c]] += 1
        points.append(-4 if action == 2 else payoffs[move, other, 0] - 2 * (move == 1 and after_c))
    row = next(csv.DictReader(open(out / "metrics.csv")))
    assert float(row["reward"]) == pytest.approx(np.mean(points), abs=1e-5)
    assert {kind: int(row[kind]) for kind in counts} == counts and row["phase"] == "game+deontological"
    # Its P(C) is 0.9, 0.6, 0.2, 0.4 in CC CD DC DD: C has 2.7, 1.8, 0.6 and 1.2 points, D -1.8, 0.8, -0.4 and 1.2: a tie, which does not count.
    assert float(row["accuracy"]) == pytest.approx(table[:3, :, 0].mean(), abs=1e-5)


# ----------------------------------------------------------------------------------------------------------- other seats and phases

def test_two_learners_with_rewards_of_their_own(tmp_path):
    out = tmp_path / "run"
    result = run(out, "--reward", "deontological", "--opponent", "learner", "--opponent-reward", "game", *ENOUGH)
    assert min(result["policy_after"][state] for state in ("CC", "DC")) >= 0.9 and max(result["opponent_policy_after"].values()) <= 0.05
    rows = list(csv.DictReader(open(out / "metrics.csv")))
    assert float(rows[-1]["opponent reward"]) > 1 and float(rows[-1]["reward"]) > -0.1
    assert all(sum(int(row[f"{seat}{kind}"]) for kind in train.ACTION_TYPES) == 256 * 5 for row in rows for seat in ("", "opponent "))
    assert (out / "adapter_model.safetensors").read_bytes() != (out / "opponent" / "adapter_model.safetensors").read_bytes()
    theirs = list(csv.DictReader(open(out / "opponent" / "metrics.csv")))
    assert list(theirs[0]) == ["episodes", "phase", "condition", *(name.removeprefix("opponent ") for name in rows[0] if name.startswith("opponent "))]
    assert [row["reward"] for row in theirs] == [row["opponent reward"] for row in rows]
    assert {row["phase"] for row in theirs} == {"game"} and {row["phase"] for row in rows} == {"deontological"}
    evaluate.main([str(out), str(out / "opponent"), "--game", "ipd", "--actions", "action1", "action2", "--json", str(tmp_path / "out.json"),
                   "--plot", str(tmp_path / "figures")])
    results = json.loads((tmp_path / "out.json").read_text())
    assert [one["n"] for one in results["groups"]] == [1, 1, 1]  # the two seats are not two seeds
    assert [one["label"] for one in results["groups"]][1:] == ["deontological", "game, seat opponent"]
    seen = results["runs"]
    for agent, key in zip(seen, ("policy_after", "opponent_policy_after")):
        assert list(agent["games"]["ipd"]["policy"].values()) == pytest.approx(list(result[key].values()), abs=1e-4)


def test_a_learning_opponent_is_paid_and_judged_from_its_own_side(tmp_path):
    """In a game that is not the same from both sides; against the numbers of the other columns."""
    result = run(tmp_path / "run", "--reward", "game", "--opponent", "learner", "--game", "bach-stravinsky", "--episodes", "32", "--batch", "16")
    payoffs = envs.payoff_array("bach-stravinsky")
    rows = list(csv.DictReader(open(tmp_path / "run" / "metrics.csv")))
    for row in rows:
        mine, theirs = (envs.memory_one([float(row[f"{seat}P(C|{state})"]) for state in envs.STATES]) for seat in ("", "opponent "))
        for seat, me, other, view in (("", mine, theirs, payoffs), ("opponent ", theirs, mine, envs.other_seat(payoffs))):
            accuracy = moral_accuracy("game", me, view, replies=envs.replies(other))
            assert float(row[f"{seat}accuracy"]) == pytest.approx(accuracy, abs=1e-4)
        assert row["reward"] != row["opponent reward"]
    for seat in ("", "opponent "):
        told = result[f"{seat.replace(' ', '_')}policy_before"]
        assert {state: float(rows[0][f"{seat}P(C|{state})"]) for state in envs.STATES} == pytest.approx(told, abs=1e-5)


def test_the_seats_see_the_game_from_their_own_sides():
    """Bach or Stravinsky: a cell's points change places between the two seats' prompts."""
    learners, _, tokenizer = setup("--opponent", "learner", "--game", "bach-stravinsky")
    mine, theirs = (" ".join(map(tokenizer.decode, learner.policy.shards[0][1].tokens)) for learner in learners)
    assert "3, 2" in mine and "2, 3" in mine and mine != theirs
    assert mine.index("3, 2") < mine.index("2, 3") and theirs.index("2, 3") < theirs.index("3, 2")


def test_unlearning(tmp_path):
    result = run(tmp_path / "run", "--reward", "game", "--then", "utilitarian", "--switch", "10240", "--episodes", "14080")
    rows = list(csv.DictReader(open(tmp_path / "run" / "metrics.csv")))
    assert [row["phase"] for row in rows] == ["game"] * 40 + ["utilitarian"] * 15
    assert max(float(rows[40][f"P(C|{state})"]) for state in result["policy_after"]) <= 0.05
    assert min(result["policy_after"].values()) >= 0.95


def test_a_beginning_of_another_rank_is_refused(runs, capsys, tmp_path):
    with refused(capsys, "--init", "--rank 8 --alpha 16"):
        train.main(["--reward", "game", "--init", str(runs / "a"), "--rank", "3", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_trained_run_as_opponent_and_as_beginning(runs, tmp_path):
    trained = json.loads((runs / "a" / "result.json").read_text())
    result = run(tmp_path / "run", "--reward", "game", "--opponent", str(runs / "a"), "--init", str(runs / "a"), "--sampling", "free", *SHORT)
    assert result["policy_before"] == pytest.approx(trained["policy_after"], abs=1e-6)
    first = next(csv.DictReader(open(tmp_path / "run" / "metrics.csv")))
    assert float(first["kl"]) > 1e-4  # the reference is the base model, not the run it begins with
    _, seats, _ = setup("--opponent", str(runs / "a"))
    _, [frozen] = seats(envs.Condition("ipd", ("action1", "action2"), "original", "structured"))
    assert train.by_state(frozen, 0) == pytest.approx(trained["policy_after"], abs=1e-6)
    assert frozen.shape == (4, 4, 3)  # it was trained with free sampling, so it may answer illegally here, too


def test_result_and_config(runs):
    result = json.loads((runs / "a" / "result.json").read_text())
    assert list(result) == ["reward", "opponent", "seed", "seconds", "policy_before", "policy_after", "illegal_before", "illegal_after"]
    assert (result["reward"], result["opponent"], result["seed"]) == ("utilitarian", "tit-for-tat", 1)
    first = next(csv.DictReader(open(runs / "a" / "metrics.csv")))
    for state, p in result["policy_before"].items():
        assert p == pytest.approx(float(first[f"P(C|{state})"]), abs=1e-5)
    config = json.loads((runs / "a" / "config.json").read_text())
    assert config["lr"] == train.DEFAULTS["embedded"]["lr"] and config["sampling"] == "free" and "torch" in config["versions"]


def test_adapter_reproduces_the_policy_after(runs):
    """The saved adapter, loaded on a fresh base, has the policy that result.json reports; so has the merged model."""
    from envs import C, payoff_array, prompts
    from lora import load_adapter
    reported = list(json.loads((runs / "a" / "result.json").read_text())["policy_after"].values())
    for path, name in ((ROOT / "tiny", "player"), (runs / "a" / "merged", None)):
        model, tokenizer = load_model(path, "cpu", "float32")
        if name:
            load_adapter(model, name, runs / "a")
        texts, answers = encode(tokenizer, prompts(payoff_array("ipd"), ("action1", "action2")), ("action1", "action2"))
        table = Policy(model, name, texts, answers, free=True)()[0].detach().exp().numpy().reshape(4, 4, 3)
        assert table[..., C].mean(1) == pytest.approx(reported, abs=1e-5)


def test_last_batch_may_be_smaller(tmp_path):
    run(tmp_path / "run", "--reward", "game", "--episodes", "20", "--batch", "16", "--rounds", "3")
    rows = list(csv.DictReader(open(tmp_path / "run" / "metrics.csv")))
    assert [int(row["episodes"]) for row in rows] == [16, 20] and sum(int(rows[1][kind]) for kind in train.ACTION_TYPES) == 4 * 3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_any_causal_model_trains(kind, tmp_path, tiny):
    """Another architecture with random weights, the embedded tokenizer, and the paper's defaults."""
    model = random_model(kind)
    model.resize_token_embeddings(len(tiny[1]))
    model.save_pretrained(tmp_path / "model")
    tiny[1].save_pretrained(tmp_path / "model")
    run(tmp_path / "run", "--reward", "utilitarian", "--model", str(tmp_path / "model"), "--episodes", "2")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["rank"], config["batch"], config["lr"]) == (64, 1, 1.41e-5)


def test_every_update_plays_one_draw_of_what_is_listed(tmp_path):
    """Against always-defect: the states of a round name the points that the drawn game gives, so the reward tells which game was played."""
    out = tmp_path / "run"
    result = run(out, "--reward", "utilitarian", "--game", "stag-hunt", "random", "--actions", "moon", "river", "K", "--layout", "rows", "both",
                 "--prompt", "structured", "game", "--opponent", "always-defect", "--episodes", "96", "--batch", "4", "--lr", "1e-9")
    rows = list(csv.DictReader(open(out / "metrics.csv")))
    drawn = [row["condition"].split("; ") for row in rows]
    assert {tuple(names.split()) for _, names, _, _ in drawn} == set(permutations(["moon", "river", "K"], 2))
    assert {layout for _, _, layout, _ in drawn} == {"rows", "both"} and {prompt for _, _, _, prompt in drawn} == {"structured", "game"}
    assert 6 < sum(game == "stag-hunt" for game, *_ in drawn) < 18
    for row, (game, *_) in zip(rows, drawn):
        cells = envs.GAMES["stag-hunt"] if game == "stag-hunt" else [tuple(map(int, cell.split(","))) for cell in game.split()]
        cooperations = sum(int(row[f"C|{last}"]) for last in "CD")  # of 20 rounds; the other plays D
        assert float(row["reward"]) == pytest.approx((cooperations * sum(cells[1]) + (20 - cooperations) * sum(cells[3])) / 20, abs=1e-4)
        assert float(row["kl"]) == pytest.approx(0, abs=1e-5)  # the reference is that of the same prompts
    untuned = setup("--actions", "moon", "river", "--game", "stag-hunt", "--layout", "rows")[0][0]
    assert result["policy_before"] == pytest.approx(train.by_state(train.by_order(untuned.act()), 0), abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("options, words", [
    ([], ["--reward"]), (["--reward", "kind"], ["--reward", "utilitarian"]), (["--game", "poker"], ["--game", "ipd"]),
    (["--opponent", "nobody"], ["--opponent", "tit-for-tat"]), (["--opponent", "1", "0", "1"], ["--opponent", "four"]),
    (["--opponent", "1", "0", "1", "2"], ["--opponent", "each from 0 to 1"]),
    (["--opponent", "nan", "0", "1", "0"], ["--opponent", "four"]),
    (["--episodes", "0"], ["--episodes", "at least 1"]), (["--episodes", "-5"], ["--episodes"]), (["--batch", "0"], ["--batch"]),
    (["--batch", "1.5"], ["--batch"]), (["--rounds", "0"], ["--rounds"]), (["--rank", "0"], ["--rank", "at least 1"]),
    (["--alpha", "0"], ["--alpha", "above 0"]), (["--lr", "nan"], ["--lr"]), (["--lr", "-1"], ["--lr"]), (["--lr", "inf"], ["--lr"]),
    (["--lr", "fast"], ["--lr"]), (["--xi", "-1"], ["--xi"]), (["--illegal", "nan"], ["--illegal"]), (["--epochs", "0"], ["--epochs"]),
    (["--clip", "0"], ["--clip"]), (["--kl-coef", "-0.1"], ["--kl-coef"]), (["--kl-target", "0"], ["--kl-target"]),
    (["--vf-coef", "-1"], ["--vf-coef"]), (["--gamma", "1.1"], ["--gamma", "at most 1"]), (["--seed", "-1"], ["--seed"]),
    (["--dtype", "int8"], ["--dtype"]), (["--sampling", "greedy"], ["--sampling"]), (["--actions", "A"], ["--actions"]),
    (["--actions", "A", "A"], ["--actions", "differ"]), (["--actions", "A", "B", "A"], ["--actions", "differ"]),
    (["--actions", "B", "moon", "moon7"], ["--actions", "told apart"]), (["--layout", "diagonal"], ["--layout", "original"]),
    (["--prompt", "haiku"], ["--prompt", "structured"]), (["--game", "ipd", "poker"], ["--game", "random"]), (["--actions", "", "A"], ["--actions", "non-empty"]),
    (["--actions", "moon", "moon7"], ["--actions", "told apart"]), (["--device", "abacus"], ["--device"]),
    (["--seed", "9" * 30], ["--seed"]), (["--rank", "9" * 15], ["--rank"]), (["--episodes", "9" * 30], ["--episodes"]),
    (["--device", "meta"], ["--device"]), (["--batch", "1", "--rounds", "1"], ["--batch"]), (["--actions", "<end_of_turn>", "moon"], ["--actions"]),
    (["--actions", "\u4e2d", "moon"], ["--actions", "unknown"]), (["--switch", "5"], ["--switch"]),
    (["--then", "kindness"], ["--then"]), (["--then", "game", "--episodes", "1"], ["--episodes", "phases"]), (["--then", "game", "--episodes", "256"], ["--episodes", "phases"]), (["--then", "game", "--switch", "0"], ["--switch"]),
    (["--then", "game", "--switch", "99999999"], ["--switch"]), (["--then", "game", "utilitarian", "--switch", "20", "10"], ["--switch"]),
    (["--opponent-reward", "game"], ["--opponent-reward"]), (["--opponent", "tests"], ["--opponent", "not a run folder"]),
    (["--init", "tests"], ["--init", "not a run folder"]), (["--init", "nowhere"], ["--init"]), (["--save-every", "0"], ["--save-every"]),
    (["--resume", "nowhere"], ["--resume"]), (["--rounds", "1e3"], ["--rounds"]), (["--gamma", "-0.1"], ["--gamma"]),
    (["--kl-coef", "nan"], ["--kl-coef"]), (["--xi", "inf"], ["--xi"]), (["--opponent", "0.5"], ["--opponent"]),
    (["--model", "no/such-model"], ["--model", "no/such-model"]), (["--model", "tests"], ["--model"]), (["--colour", "red"], ["--colour"]),
])
def test_bad_options(options, words, capsys, tmp_path):
    reward = [] if not options or "--reward" in options else ["--reward", "game"]
    with refused(capsys, *words):
        train.main([*reward, *options, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_what_is_too_long_in_one_wording_is_refused_at_once(capsys, tmp_path):
    """The first wording is short enough for the model, the second is not."""
    folder = damaged_model(tmp_path, lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace(": 2048", ": 60")))
    with refused(capsys, "--model", "tokens"):
        train.main(["--reward", "game", "--model", folder, "--prompt", "choice", "structured", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_folder_does_not_stand_in_the_way_of_a_strategy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "random").mkdir()
    assert train.parse_args(["--reward", "game", "--opponent", "random"]).strategy == envs.STRATEGIES["random"]


def damaged_model(tmp_path, change):
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "tiny", folder, ignore=shutil.ignore_patterns("*.py", "*.md", "__pycache__"))
    change(folder)
    return str(folder)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def only_a_pickle(folder):
    import torch
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")


@pytest.mark.parametrize("change", [truncate, only_a_pickle, lambda f: (f / "config.json").write_text("{"),
                                    lambda f: (f / "model.safetensors").unlink(), lambda f: (f / "tokenizer.json").unlink()])
def test_damaged_models_are_refused(change, capsys, tmp_path):
    with refused(capsys, "--model"):
        train.main(["--reward", "game", "--model", damaged_model(tmp_path, change), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_an_existing_folder_is_not_overwritten(capsys, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with refused(capsys, "--out", "--overwrite"):
        train.main(["--reward", "game", "--out", str(tmp_path)])
    with refused(capsys, "--out", "not a run folder"):
        train.main(["--reward", "game", "--out", str(tmp_path), "--overwrite"])
    with refused(capsys, "--out", "not a run folder"):
        train.main(["--reward", "game", "--out", str(tmp_path / "thesis.tex"), "--overwrite"])
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_overwrite_replaces_a_run_but_not_before_the_input_is_checked(capsys, tmp_path):
    out = tmp_path / "run"
    run(out, "--reward", "game", *SHORT)
    old = (out / "result.json").read_bytes()
    with refused(capsys, "--model"):
        train.main(["--reward", "game", "--out", str(out), "--overwrite", "--model", "no/such-model"])
    assert (out / "result.json").read_bytes() == old
    assert run(out, "--reward", "utilitarian", "--overwrite", *SHORT)["reward"] == "utilitarian"


def test_help_and_errors_come_from_the_script_itself():
    shown = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "python train.py --reward utilitarian" in shown.stdout
    failed = subprocess.run([sys.executable, "train.py", "--reward", "x"], cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stdout == "" and len(failed.stderr.strip().splitlines()) == 1
