"""train.py: what a user types, what the run folder holds, and what happens to bad input."""

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from transformers.utils import logging

import conftest
import envs
import options
import rewards
import train
from conftest import ROOT, change_json, copy_run, player_of, read_json, refused, run_training
from envs import ACTION_TYPES, STATES, C, Condition, by_state, payoff_matrix
from grid import read_metrics
from policy import load_model
from ppo import Learner
from rewards import share_right

SHORT = ["--episodes", "48", "--batch", "16", "--prompt", "brief"]  # enough for a run folder
ADAPTER = "adapter_model.safetensors"


def parse(*options):
    """The settings of a command line that names no reward."""
    return train.parse(["--reward", "game", "--out", "never-written", *options])[0]


def probabilities(row, side=""):
    """P(C | state) in a row of metrics.csv: dict of float by STATES."""
    return {state: float(row[f"{side}p_C_after_{state}"]) for state in STATES}


def counts(row, side=""):
    """What was played in a row of metrics.csv: dict of int by ACTION_TYPES."""
    return {kind: int(row[f"{side}count_{kind.replace('|', '_after_')}"]) for kind in ACTION_TYPES}


# All seeds and opponents, with the default batch: experiments/learning.py. An update takes the same
# time whatever the batch: this large one has less noise and needs fewer updates.
SETTINGS = {"xi": 3.0, "illegal": -6.0, "gamma": 0.0}
LEARN = "--batch 1024 --episodes 14336".split()


OPTIMA = "game 0000, utilitarian 1111, deontological 1*1*, game+deontological 1010".split(", ")


@pytest.mark.parametrize("optimum", OPTIMA)
def test_learns_the_optimum_worked_out_by_hand(optimum, tmp_path):
    reward, best = optimum.split()
    result = run_training(tmp_path / "run", "--reward", reward, *LEARN)
    for state, p_best in zip(STATES, best):
        if p_best != "*":
            assert abs(result["policy_before"][state] - int(p_best)) > 0.05
            assert abs(result["policy_after"][state] - int(p_best)) <= 0.05


def test_learns_to_be_legal(tmp_path):
    result = run_training(tmp_path / "run", "--reward", "utilitarian", "--sampling", "free", *LEARN)
    assert 0.2 <= np.mean(list(result["illegal_before"].values())) <= 0.7
    assert max(result["illegal_after"].values()) <= 0.02
    assert min(result["policy_after"].values()) >= 0.95


def test_shadow_of_the_future(tmp_path):
    options = ["--reward", "game", "--gamma", "0.9", *LEARN]
    assert run_training(tmp_path / "run", *options)["policy_after"]["CC"] >= 0.95


def test_unlearning(tmp_path):
    """Two rewards: phases of equal length, 9.5 updates; the second begins with a whole update."""
    options = "--reward game utilitarian --batch 1024 --episodes 19456".split()
    result = run_training(tmp_path / "run", *options)
    rows = read_metrics(tmp_path / "run")
    assert [row["phase"] for row in rows] == ["game"] * 10 + ["utilitarian"] * 9
    assert max(probabilities(rows[10]).values()) <= 0.05
    assert min(result["policy_after"].values()) >= 0.95
    assert result["reward"] == ["game", "utilitarian"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of seed 1 and one of seed 2, short ones."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in zip("abc", "112"):
        options = ["--reward", "utilitarian", "--sampling", "free", "--seed", seed]
        run_training(folder / name, *options, *SHORT)
    return folder


@pytest.mark.parametrize("opponent", ["tit-for-tat", "learner"])
def test_until_stops_as_soon_as_all_have_learned(opponent, tmp_path):
    options = ["--reward", "utilitarian", "--opponent", opponent, "--lr", "5e-4", "--until", "0.8"]
    result = run_training(tmp_path / "run", *options)
    rows = read_metrics(tmp_path / "run")
    for side in ("", "opponent_") if opponent == "learner" else ("",):
        assert np.mean(list(result[f"{side}policy_after"].values())) >= 0.8  # all states prefer C
    least = [min(float(row[key]) for key in row if key.endswith("right")) for row in rows]
    assert len(rows) > 2 and max(least) < 0.8


def test_until_looks_at_the_learner_that_has_a_better_action(tmp_path, capsys):
    """All is one to the first player, and then to the second: NaN, wherever it stands."""
    options = ["--reward", "game", "--opponent", "learner", "--until", "0.6", "--batch", "1024"]
    for game in ("1 0 1 3 1 0 1 3", "0 1 0 1 3 1 3 1"):
        out = tmp_path / game[:1]
        run_training(out, *options, "--game", *game.split())
        last = read_metrics(out)[-1]
        assert [last["right"], last["opponent_right"]].count("nan") == 1
        assert int(last["episodes"]) < 25600 and "Learned" in capsys.readouterr().out
    run_training(tmp_path / "run", *options, *SHORT, "--game", *["1"] * 8)  # all is one: to the end
    assert len(read_metrics(tmp_path / "run")) == 3


UNTIL = {"": 0.97, "--until 0.9": 0.9, "--game 3 3 0 4 4 0 1 1": 0.97}  # eight words, one game
NEVER = """--model tiny; --until 1; --recipe paper; --actions random --until 1; \
--layout rows both; --prompt poetic choice; --game random; --game ipd chicken; \
--gamma 0.5""".split("; ")


@pytest.mark.parametrize("options, until", [*UNTIL.items(), *((never, 1) for never in NEVER)])
def test_where_training_stops_early_by_default(options, until):
    assert parse("--model", "folder", *options.split()).until == until


@pytest.mark.parametrize("options, falls", [("", 0), ("--actions random", 1)])
def test_the_rate_falls_to_0_where_conditions_vary(options, falls, tmp_path, monkeypatch):
    rates, update = [], Learner.update

    def look(self, *args, **settings):
        rates.append(self.optimizer.param_groups[0]["lr"])
        return update(self, *args, **settings)

    monkeypatch.setattr(Learner, "update", look)
    own = f"--reward game --lr 1e-3 --episodes 32 --batch 8 --prompt brief {options}".split()
    run_training(tmp_path / "run", *own)
    last = 2.5e-4 if falls else 1e-3
    assert np.allclose(rates, np.linspace(1e-3, last, 4), rtol=1e-9)


def test_until_waits_for_an_update_of_the_last_phase(tmp_path):
    options = ["--reward", "game", "utilitarian", "--until", "0.01", *SHORT, "--episodes", "64"]
    run_training(tmp_path / "run", *options)
    phases = [row["phase"] for row in read_metrics(tmp_path / "run")]
    assert phases == ["game", "game", "utilitarian"]


def test_same_seed_same_bytes(runs):
    for file in ("metrics.csv", ADAPTER, "value_head.safetensors"):
        a, b, c = ((runs / name / file).read_bytes() for name in "abc")
        assert a == b and a != c


def test_what_a_run_writes(runs):
    rows, result = read_metrics(runs / "a"), read_json(runs / "a" / "result.json")
    assert [int(row["episodes"]) for row in rows] == [16, 32, 48]
    assert [int(row["update"]) for row in rows] == [1, 2, 3] and next(iter(rows[0])) == "update"
    for row in rows:
        assert sum(counts(row).values()) == 16 * 5
        cooperation = np.mean(list(probabilities(row).values()))
        assert float(row["right"]) == pytest.approx(cooperation, abs=1e-5)
    assert float(rows[0]["kl"]) == pytest.approx(0, abs=1e-6)  # it starts as the base model
    assert float(rows[-1]["kl"]) > 1e-4
    assert float(rows[0]["kl_coef"]) == 0.5 > float(rows[1]["kl_coef"])

    keys = "reward opponent seed policy_before policy_after illegal_before illegal_after seconds"
    assert list(result) == keys.split()
    assert [result[k] for k in keys.split()[:3]] == [["utilitarian"], "tit-for-tat", 1]
    assert result["policy_before"] == pytest.approx(probabilities(rows[0]), abs=1e-5)
    config = read_json(runs / "a" / "config.json")
    assert config["lr"] == options.EMBEDDED["lr"] and config["sampling"] == "free"
    assert "torch" in config["versions"] and not {"out", "resume", "overwrite"} & {*config}


def test_every_setting_arrives(tmp_path, monkeypatch):
    """One update with nothing at its default, replayed by hand from the untuned policy."""
    given, create = {}, Learner.__init__

    def record(self, policy, **settings):
        given.update(settings)
        create(self, policy, **settings)

    monkeypatch.setattr(Learner, "__init__", record)
    out = tmp_path / "run"
    run_training(
        out,
        *"--reward game+deontological --game 3 2 -1 0 0 -2 2 3 --opponent 0.9 0.2 0.6 0.4".split(),
        *"--sampling free --actions moon river --layout both --prompt unstructured".split(),
        *"--xi 2 --illegal -4 --rounds 7 --episodes 50 --batch 50 --seed 9 --rank 4".split(),
        *"--alpha 12 --lr 0.001 --epochs 3 --kl-coef 0.15 --kl-target 5".split(),
    )
    assert given == {"lr": 0.001, "epochs": 3, "kl_coef": 0.15, "kl_target": 5, "gamma": 0}
    adapter = read_json(out / "adapter_config.json")
    assert (adapter["r"], adapter["lora_alpha"]) == (4, 12)

    game = ((3, 2), (-1, 0), (0, -2), (2, 3))
    condition = Condition(game, ("moon", "river"), "both", "unstructured")
    player = player_of(*load_model("tiny", "cpu"), condition, free=True)
    opponent = envs.memory_one((0.9, 0.2, 0.6, 0.4))
    mine, theirs = envs.play(np.random.default_rng(9), player, opponent, 50, 7)
    points, played = [], dict.fromkeys(ACTION_TYPES, 0)
    rounds = mine.state, mine.action, mine.move, theirs.move
    for state, action, move, other in zip(*(array.ravel() for array in rounds)):
        after_c = state in (0, 2)  # the opponent's last move is the second letter of CC CD DC DD
        played["C D illegal".split()[action] + "|" + "DC"[after_c]] += 1
        penalty = 2 * (move == 1 and after_c)
        points.append(-4 if action == envs.ILLEGAL else game[2 * move + other][0] - penalty)
    row = read_metrics(out)[0]
    assert float(row["reward"]) == pytest.approx(np.mean(points), abs=1e-5)
    assert counts(row) == played
    assert row["phase"] == "game+deontological"
    shown = [row[key] for key in ("game", "actions", "layout", "prompt")]
    assert shown == ["3,2 -1,0 0,-2 2,3", "moon river", "both", "unstructured"]
    # The opponent's P(C) is 0.9, 0.6, 0.2, 0.4 in CC CD DC DD: C has 2.6, 1.4, -0.2 and 0.6 points,
    # D -1.8, 0.8, -0.4 and 1.2.
    best = [player[:3, :, C], player[3:, :, 1]]
    assert float(row["right"]) == pytest.approx(np.concatenate(best).mean(), abs=1e-5)


def test_last_batch_may_be_smaller_and_beta_fixed(tmp_path):
    options = "--reward game --episodes 52 --batch 16 --rounds 3 --kl-target 0".split()
    run_training(tmp_path / "run", *options)
    rows = read_metrics(tmp_path / "run")
    assert [int(row["episodes"]) for row in rows] == [16, 32, 48, 52]
    assert sum(counts(rows[-1]).values()) == 4 * 3
    assert {row["kl_coef"] for row in rows} == {"0.5"} and float(rows[-1]["kl"]) > 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_any_causal_model_trains(kind, tmp_path, tiny, monkeypatch):
    """Another architecture, random weights, the embedded tokenizer; its defaults, the paper's.

    Its folder is kept as an absolute path: the run may be evaluated from anywhere.
    """
    folder = tmp_path / "model"
    model = conftest.random_model(kind)
    model.resize_token_embeddings(len(tiny[1]))
    model.save_pretrained(folder)
    tiny[1].save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    options = ["--reward", "utilitarian", "--model", "model", "--episodes", "2"]
    shown = ("sampling", "rank", "batch", "lr", "epochs")
    defaults = {"": ("free", 16, 256, 3e-4, 1), "--recipe paper": ("free", 64, 1, 1.41e-5, 1)}
    for extra, expected in defaults.items():
        run_training(tmp_path / "run", *options, *extra.split(), "--overwrite")
        config = read_json(tmp_path / "run" / "config.json")
        assert tuple(config[key] for key in shown) == expected
        assert config["model"] == str(folder.resolve())


def test_every_update_plays_one_draw_of_what_is_listed(tmp_path):
    """Against always-defect, whose rounds show which game was played by what they are worth."""
    out = tmp_path / "run"
    result = run_training(
        out,
        *"--reward utilitarian --opponent always-defect --game stag-hunt random".split(),
        *"--actions moon river K --layout rows both --prompt structured game".split(),
        *"--episodes 96 --batch 4 --epochs 1 --lr 1e-9".split(),
    )
    rows = read_metrics(out)
    games = [row["game"] for row in rows]
    for row, game in zip(rows, games):
        cells = envs.GAMES["stag-hunt"]
        if game != "stag-hunt":
            cells = [tuple(map(int, cell.split(","))) for cell in game.split()]
        # Of 20 rounds; the opponent plays D.
        cooperations = counts(row)["C|C"] + counts(row)["C|D"]
        total = cooperations * sum(cells[1]) + (20 - cooperations) * sum(cells[3])
        assert float(row["reward"]) == pytest.approx(total / 20, abs=1e-4)
        assert float(row["kl"]) == pytest.approx(0, abs=1e-5)  # the reference has the same prompts
    pairs = {tuple(shlex.split(row["actions"])) for row in rows}
    assert pairs == set(permutations(["moon", "river", "K"], 2))
    assert {row["layout"] for row in rows} == {"rows", "both"}
    assert {row["prompt"] for row in rows} == {"structured", "game"}
    assert 6 < games.count("stag-hunt") < 18

    condition = Condition("stag-hunt", ("moon", "river"), "rows", "structured")
    untuned = player_of(*load_model("tiny", "cpu"), condition)
    assert result["policy_before"] == pytest.approx(by_state(untuned, C), abs=1e-6)


@pytest.mark.parametrize("names", ["action1 action2", "action2 action1"])
def test_says_what_it_does_when_the_names_change_places(names, tmp_path, capsys):
    options = ["--reward", "utilitarian", "--episodes", "1280", "--actions", *names.split()]
    run_training(tmp_path / "run", *options)
    own, right, other = capsys.readouterr().out.split("Strategy: ")[1].splitlines()[:3]
    assert own.endswith("-> always cooperate")
    rows = read_metrics(tmp_path / "run")
    before = f"{float(rows[0]['right']):.2f}"  # of the untuned model: the first row's
    assert right == f"How often it does what its reward asks for: {before} -> 1.00"
    assert other == "With the two action names in each other's role: always defect"


def test_where_either_action_will_do_nothing_is_right(tmp_path, capsys):
    """Equal points against a random opponent: each action has the same expected reward."""
    options = ["--reward", "equality", "--opponent", "random", "--episodes", "256"]
    run_training(tmp_path / "run", *options)
    printed = capsys.readouterr().out
    assert "Strategy: " in printed and "reward asks for" not in printed and "nan" not in printed


def test_two_learners(tmp_path):
    """Both learn tit for tat. From random first moves, it earns tit for tat 2 points a round."""
    out, reward = tmp_path / "run", "game+deontological"
    result = run_training(out, "--reward", reward, "--opponent", "learner", *LEARN)
    rows = read_metrics(out)
    for side in ("", "opponent_"):
        policy = result[f"{side}policy_after"]
        for state, best in zip(STATES, (1, 0, 1, 0)):
            assert abs(policy[state] - best) <= 0.05
        assert float(rows[-1][f"{side}reward"]) == pytest.approx(2, abs=0.1)
        for row in rows:
            assert sum(counts(row, side).values()) == 1024 * 5
    assert (out / ADAPTER).read_bytes() != (out / "opponent" / ADAPTER).read_bytes()


def test_a_learning_opponent_reads_is_paid_and_is_judged_from_its_own_side(tmp_path):
    """In a game that is not the same from both sides; the first update is replayed by hand."""
    game = "bach-stravinsky"
    options = ["--game", game, "--opponent", "learner", "--episodes", "32", "--batch", "16"]
    agents, opponent, _ = train.setup(parse(*options))
    assert opponent is agents[1]
    # A cell's points change places between the two players' prompts.
    tokenizer = agents[0].policy.tokenizer
    tries = [agent.trie(Condition(game)) for agent in agents]
    mine, theirs = (" ".join(map(tokenizer.decode, trie.prompts)) for trie in tries)
    assert mine.index("3, 2") < mine.index("2, 3") and theirs.index("2, 3") < theirs.index("3, 2")

    result = run_training(tmp_path / "run", "--reward", "game", *options)
    payoffs, condition = payoff_matrix(game), Condition(game)
    rows = read_metrics(tmp_path / "run")
    for row in rows:
        mine = envs.memory_one(list(probabilities(row).values()))
        theirs = envs.memory_one(list(probabilities(row, "opponent_").values()))
        facing = envs.replies(theirs)
        right = share_right("game", mine, payoffs, SETTINGS, facing)
        assert float(row["right"]) == pytest.approx(right, abs=1e-4)
        view = payoff_matrix(game, side=1)
        right = share_right("game", theirs, view, SETTINGS, envs.replies(mine))
        assert float(row["opponent_right"]) == pytest.approx(right, abs=1e-4)
        assert row["reward"] != row["opponent_reward"]
    assert probabilities(rows[0]) == pytest.approx(result["policy_before"], abs=1e-5)
    theirs = probabilities(rows[0], "opponent_")
    assert theirs == pytest.approx(result["opponent_policy_before"], abs=1e-5)

    model, tokenizer = load_model("tiny", "cpu")
    players = [player_of(model, tokenizer, condition, side=side) for side in (0, 1)]
    seen = envs.play(np.random.default_rng(1), *players, 16, 5)
    points = payoffs[seen[0].move, seen[1].move].mean(axis=(0, 1))
    for side, own, mean in zip(("", "opponent_"), seen, points):
        assert float(rows[0][f"{side}reward"]) == pytest.approx(mean, abs=1e-5)
        assert counts(rows[0], side) == envs.action_counts(own)
    assert envs.action_counts(seen[0]) != envs.action_counts(seen[1])


def test_a_trained_run_as_opponent_and_as_start(runs, tmp_path):
    trained = read_json(runs / "a" / "result.json")["policy_after"]
    options = ["--reward", "game", "--sampling", "free", *SHORT]
    options += ["--opponent", str(runs / "a"), "--init", str(runs / "a")]
    result = run_training(tmp_path / "run", *options)
    assert result["policy_before"] == pytest.approx(trained, abs=1e-6)
    assert result["policy_after"] != result["policy_before"]  # it goes on learning
    first = read_metrics(tmp_path / "run")[0]
    assert float(first["kl"]) > 1e-4  # the reference is the base model, not where it starts
    _, opponent, _ = train.setup(parse("--opponent", str(runs / "a"), "--checkpointing"))
    frozen = opponent.player(Condition(prompt="brief"))
    assert by_state(frozen, C) == pytest.approx(trained, abs=1e-6)
    assert frozen.shape == (4, 4, 3)  # free in training, it may answer illegally here, too
    assert opponent.side == 1


def test_a_constant_opponent_has_always_played_its_move(tmp_path, capsys):
    """Also before the first round; and the regrets are of what was played."""
    options = "--reward game --opponent always-defect --rounds 1 --prompt brief --batch 16"
    result = run_training(tmp_path / "run", *options.split(), "--episodes", "16")
    [row] = read_metrics(tmp_path / "run")
    played = counts(row)
    c, d = played["C|D"], played["D|D"]
    assert c + d == 16 and c > 0 and d > 0  # and nothing after C
    total = (4 * c + 2 * d) / 16
    assert float(row["utilitarian_regret"]) == pytest.approx((6 - total) / 12, abs=1e-5)
    before, after = result["policy_before"]["CC"], result["policy_after"]["CC"]
    assert f"P(C | CC){before:25.3f} {after:7.3f}\n" in capsys.readouterr().out
    assert f"{before:.3f}" != f"{after:.3f}"


def test_in_a_thread_where_chmod_is_refused(tmp_path, monkeypatch):
    """As in a server of notebooks; a network mount knows no modes; verbosity is the caller's."""
    for name in ("chmod", "fchmod", "utime", "chown"):
        monkeypatch.setattr(os, name, Mock(side_effect=PermissionError))
    options = ["--layout", "both", "--prompt", "unstructured", "poetic", *SHORT]
    level = logging.get_verbosity()
    logging.set_verbosity(17)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run_training, tmp_path / "run", "--reward", "game", *options).result()
    assert logging.get_verbosity() == 17 and logging.is_progress_bar_enabled()
    logging.set_verbosity(level)


# What is typed, and behind the bar a part of the line that refuses it, which names the option, too.
BAD_OPTIONS = """\
--reward game kind|utilitarian; --colour red|; --until 0.9 --gamma 0.5|--gamma; \
--until 0.9 --actions random|vary; --episodes 256 --reward game utilitarian|phase; \
--model no/such-model|no/such-model; --game ipd poker|random; --game 1 2 3 4 5 6 7 8.5|eight; \
--game 1 2 3 4 5 6 7 chicken|eight; --opponent nobody|tit-for-tat; \
--opponent 1 0 1 2|from 0 to 1; --opponent tests|not a run folder; --actions A B A|twice; \
--actions '' A|non-empty; --actions B moon moon7|told apart; \
--actions '<end_of_turn>' moon|special; --actions \u4e2d moon|unknown; \
--episodes 257 --batch 256 --rounds 1|from two; --resume nowhere|no folder""".split("; ")
BAD_VALUES = """--until 0; --sampling greedy; --layout diagonal; --episodes 0; \
--episodes 1e30; --batch 1.5; --rounds 1e3; --xi -1; --xi inf; --illegal nan; --lr nan; --lr 0; \
--illegal 1; --lr fast; --rank 0; --rank 999999999999999; --alpha 0; --epochs 0; --kl-coef -0.1; \
--kl-target -1; --gamma 1.1; --seed -1; --device abacus; --seed 99999999999999999999; \
--device meta; --dtype int8; --save-every -1; --init nowhere; --prompt haiku""".split("; ")


@pytest.mark.parametrize("typed", ["|--reward", *BAD_OPTIONS, *(f"{bad}|" for bad in BAD_VALUES)])
def test_bad_options(typed, capsys, tmp_path):
    typed, words = typed.split("|")
    options = shlex.split(typed)
    if options and not {"--reward", "--resume"} & {*options}:
        options += ["--reward", "game"]
    out = [] if "--resume" in options else ["--out", str(tmp_path / "run")]
    with refused(capsys, words, *options[:1]):
        train.main([*options, *out])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wordings", [["odd"], ["structured", "odd"]])
def test_a_wording_of_a_fork_with_a_slip(wordings, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(envs.TEMPLATES, "odd", "{frist} or {second}?")
    with refused(capsys, "--prompt", "no field {frist}"):
        run_training(tmp_path / "run", "--reward", "game", "--prompt", *wordings)


def poison(name):
    """A function: put NaN into the first tensor by name in a file of a folder."""

    def change(tensors):
        tensors[min(tensors)][0] = float("nan")
        return tensors

    return lambda folder: conftest.change_tensors(folder / name, change)


UNUSABLE = [
    ("--init", poison(ADAPTER), ["not finite", ADAPTER]),
    ("--init", poison("value_head.safetensors"), ["not finite", "value_head"]),
    ("--init", lambda run: change_json(run / "config.json", rank=3), ["rank", "3", "8"]),
    ("--opponent", lambda run: change_json(run / "config.json", base="0"), ["base"]),
    ("--opponent", lambda run: (run / "result.json").unlink(), ["not finished"]),
]


@pytest.mark.parametrize("option, damage, words", UNUSABLE)
def test_runs_that_cannot_be_taken(option, damage, words, runs, capsys, tmp_path):
    other = copy_run(runs / "a", tmp_path / "other")
    damage(other)
    with refused(capsys, option, *words):
        run_training(tmp_path / "run", "--reward", "game", option, str(other))
    assert not (tmp_path / "run").exists()


def test_help_and_errors_come_from_the_script_itself():
    command = [sys.executable, "train.py"]
    settings = {"cwd": ROOT, "capture_output": True, "text": True}
    shown = subprocess.run([*command, "--help"], check=True, **settings)
    assert "python train.py --reward utilitarian" in shown.stdout
    failed = subprocess.run([*command, "--reward", "x"], check=False, **settings)
    assert failed.returncode == 2 and failed.stdout == ""
    assert len(failed.stderr.strip().splitlines()) == 1


def test_a_wording_in_a_file_is_kept_whole(tmp_path):
    """In the settings, in metrics.csv, and after a resume."""
    text = 'Now "{first}",\nor {second}? Your answer:'
    (tmp_path / "mine.txt").write_text(text)
    run_training(
        tmp_path / "run", "--reward", "game", *SHORT, "--prompt", str(tmp_path / "mine.txt")
    )
    assert read_json(tmp_path / "run" / "config.json")["prompt"] == [text]
    assert {row["prompt"] for row in read_metrics(tmp_path / "run")} == {text}


def test_the_penalty_may_fall(tmp_path):
    """Linearly, as the learning rate does: it is used in full in the first update."""
    options = "--kl-coef 0.4 --kl-final 0.1 --kl-target 0 --episodes 48 --batch 16".split()
    run_training(tmp_path / "run", "--reward", "game", *options)
    used = [float(row["kl_coef"]) for row in read_metrics(tmp_path / "run")]
    assert used == pytest.approx([0.4, 0.3, 0.2])


@pytest.mark.parametrize("place", ["fields", "reward", "learner"])
def test_a_bug_is_a_traceback_and_leaves_no_folder(place, tmp_path, monkeypatch):
    """Whatever kind of exception it is; then the corrected command runs."""

    def bug(*_, **__):
        raise KeyError("mine")

    with monkeypatch.context() as patch:
        if place == "fields":
            patch.setattr(envs, "fields", bug)
        elif place == "reward":
            patch.setitem(rewards.REWARDS, "game", bug)
        else:
            patch.setattr(Learner, "report", bug)
        with pytest.raises(KeyError, match="mine"):
            run_training(tmp_path / "run", "--reward", "game", *SHORT)
    assert not (tmp_path / "run").exists()
    run_training(tmp_path / "run", "--reward", "game", *SHORT)


def test_out_of_memory_keeps_its_traceback_and_says_what_takes_less(tmp_path, monkeypatch):
    monkeypatch.setattr(Learner, "update", Mock(side_effect=torch.OutOfMemoryError("no room")))
    with pytest.raises(torch.OutOfMemoryError) as error:
        run_training(tmp_path / "run", "--reward", "game", *SHORT)
    assert "--checkpointing" in error.value.__notes__[0]


# METHOD of the paper: episodes, one at a time, learning rate, optimizer steps, LoRA, beta, target.
PAPER = {"episodes": 1000, "batch": 1, "lr": 1.41e-5, "epochs": 1, "rank": 64, "alpha": 32}
PAPER |= {"kl_coef": 0.2, "kl_target": 6, "xi": 3, "illegal": -6, "sampling": "free", "until": 1}


@pytest.mark.parametrize("opponent, rounds", [("tit-for-tat", 5), ("learner", 3)])
@pytest.mark.parametrize("model", ["tiny", "google/gemma-2-2b-it"])
def test_the_papers_settings(model, opponent, rounds):
    args = parse("--recipe", "paper", "--model", model, "--opponent", opponent)
    assert {key: getattr(args, key) for key in PAPER} == PAPER and args.rounds == rounds
    assert parse("--recipe", "paper", "--opponent", opponent, "--rounds", "7").rounds == 7


def test_a_recipe_is_the_plain_options_that_it_stands_for(tmp_path):
    """The same bytes; what the command line gives goes before it."""
    recipe = "--reward utilitarian --recipe moral --episodes 16 --batch 8".split()
    plain = (
        "--reward utilitarian --opponent random --sampling constrained --prompt brief --kl-final 0 "
        "--game ipd contested random --kl-target 0 --kl-coef 0.3 --rank 16 --alpha 32 --epochs 1 "
        "--actions random --layout original rows columns --lr 1e-3 --episodes 16 --batch 8"
    ).split()
    for name, typed in (("a", recipe), ("b", plain)):
        run_training(tmp_path / name, *typed)
    for file in ("metrics.csv", ADAPTER, "value_head.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
