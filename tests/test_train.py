"""train.py: what a user types, what the run folder holds, and what happens to bad input."""

import shlex
import subprocess
import sys
from itertools import permutations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import agents
import evaluate
from conftest import (
    ROOT,
    change_json,
    cut_file,
    damaged_model,
    player_of,
    random_model,
    read_json,
    read_metrics,
    refused,
    run_training,
)
from envs import (
    ACTION_TYPES,
    GAMES,
    ILLEGAL,
    STATES,
    STRATEGIES,
    C,
    action_counts,
    by_state,
    memory_one,
    other_side,
    payoff_matrix,
    play,
    replies,
)
from lora import load_adapter
from models import load_model
from options import DEFAULTS, opponent_strategy, parse_train
from ppo import Learner
from prompts import Condition
from rewards import moral_accuracy

SHORT = ["--episodes", "48", "--batch", "16"]  # enough to have a run folder


def setup(*options):
    """What `agents.setup` returns, without a run."""
    return agents.setup(parse_train("", ["--reward", "game", "--out", "never-written", *options]))


def probabilities(row, side=""):
    """P(C | state) in a row of metrics.csv: dict of float by STATES."""
    return {state: float(row[f"{side}P(C|{state})"]) for state in STATES}


# ---------------------------------------------------------------------------------------- learning
# All seeds, rewards and opponents, with the default batch, are in benchmarks/learning.py; here one
# of each. An update takes the same time whatever the batch: this large one has less noise and needs
# fewer updates.
LEARN = "--batch 1024 --episodes 14336".split()


@pytest.mark.parametrize(
    "reward, best",
    [
        ("game", "0000"),
        ("utilitarian", "1111"),
        ("deontological", "1*1*"),
        ("game+deontological", "1010"),
    ],
)
def test_learns_the_optimum_worked_out_by_hand(reward, best, tmp_path):
    result = run_training(tmp_path / "run", "--reward", reward, *LEARN)
    for state, p_best in zip(STATES, best):
        if p_best != "*":
            assert abs(result["policy_before"][state] - int(p_best)) > 0.05
            assert abs(result["policy_after"][state] - int(p_best)) <= 0.05


def test_learns_to_be_legal(tmp_path):
    options = ["--reward", "utilitarian", "--sampling", "free", *LEARN]
    result = run_training(tmp_path / "run", *options)
    assert 0.2 <= np.mean(list(result["illegal_before"].values())) <= 0.7
    assert max(result["illegal_after"].values()) <= 0.02
    assert min(result["policy_after"].values()) >= 0.95


def test_shadow_of_the_future(tmp_path):
    options = ["--reward", "game", "--gamma", "0.9", *LEARN]
    assert run_training(tmp_path / "run", *options)["policy_after"]["CC"] >= 0.95


def test_unlearning(tmp_path):
    options = "--reward game --then utilitarian --switch 10240 --episodes 17408".split()
    result = run_training(tmp_path / "run", *options, "--batch", "1024")
    rows = read_metrics(tmp_path / "run")
    assert [row["phase"] for row in rows] == ["game"] * 10 + ["utilitarian"] * 7
    assert max(probabilities(rows[10]).values()) <= 0.05
    assert min(result["policy_after"].values()) >= 0.95


# ---------------------------------------------------------------------------------- the run folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of seed 1 and one of seed 2, short ones."""
    folder = tmp_path_factory.mktemp("runs")
    for name, options in (("a", "--seed 1 --merge"), ("b", "--seed 1"), ("c", "--seed 2")):
        free = "--reward utilitarian --sampling free".split()
        run_training(folder / name, *free, *SHORT, *options.split())
    return folder


@pytest.mark.parametrize("opponent", ["tit-for-tat", "learner"])
def test_until_stops_as_soon_as_all_have_learned(opponent, tmp_path):
    options = ["--reward", "utilitarian", "--opponent", opponent, "--lr", "5e-4", "--until", "0.8"]
    result = run_training(tmp_path / "run", *options)
    rows = read_metrics(tmp_path / "run")
    for side in ("", "opponent_") if opponent == "learner" else ("",):
        assert np.mean(list(result[f"{side}policy_after"].values())) >= 0.8  # all states prefer C
    sides = ["accuracy"] + ["opponent accuracy"] * (opponent == "learner")
    least = [min(float(row[side]) for side in sides) for row in rows]
    assert len(rows) > 2 and max(least) < 0.8


@pytest.mark.parametrize(
    "options, until",
    [
        ("", None),
        ("--model folder", 0.97),
        ("--model folder --until 0.9", 0.9),
        ("--model folder --paper", None),
        ("--model folder --actions random", None),
        ("--model folder --game ipd chicken", None),
        ("--model folder --gamma 0.5", None),
    ],
)
def test_where_training_stops_early_by_default(options, until):
    words = ["--reward", "game", "--out", "never-written", *options.split()]
    assert parse_train("", words).until == until


def test_until_waits_for_an_update_of_the_last_phase(tmp_path):
    options = ["--reward", "game", "--then", "utilitarian", "--switch", "20", "--until", "0.01"]
    run_training(tmp_path / "run", *options, *SHORT, "--episodes", "64")
    phases = [row["phase"] for row in read_metrics(tmp_path / "run")]
    assert phases == ["game", "game", "utilitarian"]


def test_same_seed_same_bytes(runs):
    for file in ("metrics.csv", "adapter_model.safetensors", "value_head.safetensors"):
        a, b, c = ((runs / name / file).read_bytes() for name in "abc")
        assert a == b and a != c


def test_metrics(runs):
    rows = read_metrics(runs / "a")
    assert [int(row["episodes"]) for row in rows] == [16, 32, 48]
    for row in rows:
        assert sum(int(row[kind]) for kind in ACTION_TYPES) == 16 * 5
        assert -6 <= float(row["reward"]) <= 6
        cooperation = np.mean(list(probabilities(row).values()))
        assert float(row["accuracy"]) == pytest.approx(cooperation, abs=1e-5)
    assert float(rows[0]["kl"]) == pytest.approx(0, abs=1e-6)  # it starts as the base model
    assert float(rows[-1]["kl"]) > 1e-4
    embedded, *_ = DEFAULTS["kl_coef"]
    assert float(rows[0]["kl_coef"]) == embedded > float(rows[1]["kl_coef"])


def test_result_and_config(runs):
    result = read_json(runs / "a" / "result.json")
    keys = "reward opponent seed seconds policy_before policy_after illegal_before illegal_after"
    assert list(result) == keys.split()
    assert [result[key] for key in ("reward", "opponent", "seed")] == [
        "utilitarian",
        "tit-for-tat",
        1,
    ]
    first = read_metrics(runs / "a")[0]
    assert result["policy_before"] == pytest.approx(probabilities(first), abs=1e-5)
    config = read_json(runs / "a" / "config.json")
    assert config["lr"] == DEFAULTS["lr"][0] and config["sampling"] == "free"
    assert "torch" in config["versions"]


def test_adapter_reproduces_the_policy_after(runs):
    """The saved adapter, on a fresh base, is what result.json reports; so is the merged model."""
    run = runs / "a"
    reported = read_json(run / "result.json")["policy_after"]
    model, tokenizer = load_model(ROOT / "tiny", "cpu")
    load_adapter(model, "player", run)
    player = player_of(model, tokenizer, Condition(), free=True, name="player")
    assert by_state(player, C) == pytest.approx(reported, abs=1e-5)
    merged = player_of(*load_model(run / "merged", "cpu"), Condition(), free=True)
    assert by_state(merged, C) == pytest.approx(reported, abs=1e-5)


def test_every_setting_arrives(tmp_path, monkeypatch):
    """One update with nothing at its default, replayed by hand from the untuned policy."""
    given = {}
    create = Learner.__init__

    def record(self, parameters, **settings):
        given.update(settings)
        create(self, parameters, **settings)

    monkeypatch.setattr(Learner, "__init__", record)
    out = tmp_path / "run"
    run_training(
        out,
        *"--reward game+deontological --game bach-stravinsky --opponent 0.9 0.2 0.6 0.4".split(),
        *"--sampling free --actions moon river --layout both --prompt unstructured".split(),
        *"--xi 2 --illegal -4 --rounds 7 --episodes 50 --batch 50 --seed 9 --rank 4".split(),
        *"--alpha 12 --lr 0.001 --epochs 3 --clip 0.3 --kl-coef 0.15 --kl-target 5".split(),
        *"--vf-coef 0.25 --gamma 0.5".split(),
    )
    assert given == {
        "lr": 0.001,
        "epochs": 3,
        "clip": 0.3,
        "kl_coef": 0.15,
        "kl_target": 5,
        "vf_coef": 0.25,
        "gamma": 0.5,
    }
    adapter = read_json(out / "adapter_config.json")
    assert (adapter["r"], adapter["lora_alpha"]) == (4, 12)

    payoffs = payoff_matrix("bach-stravinsky")
    condition = Condition("bach-stravinsky", ("moon", "river"), "both", "unstructured")
    player = player_of(*load_model("tiny", "cpu"), condition, free=True)
    opponent = memory_one((0.9, 0.2, 0.6, 0.4))
    mine, theirs = play(np.random.default_rng(9), player, opponent, 50, 7)
    points, counts = [], dict.fromkeys(ACTION_TYPES, 0)
    rounds = mine.state, mine.action, mine.move, theirs.move
    for state, action, move, other in zip(*(array.ravel() for array in rounds)):
        after_c = state in (0, 2)  # the opponent's last move is the second letter of CC CD DC DD
        counts["C D illegal".split()[action] + "|" + "DC"[after_c]] += 1
        penalty = 2 * (move == 1 and after_c)
        points.append(-4 if action == ILLEGAL else payoffs[move, other, 0] - penalty)
    row = read_metrics(out)[0]
    assert float(row["reward"]) == pytest.approx(np.mean(points), abs=1e-5)
    assert {kind: int(row[kind]) for kind in counts} == counts
    assert row["phase"] == "game+deontological"
    # The opponent's P(C) is 0.9, 0.6, 0.2, 0.4 in CC CD DC DD: C has 2.7, 1.8, 0.6 and 1.2 points,
    # D -1.8, 0.8, -0.4 and 1.2: a tie, which does not count.
    assert float(row["accuracy"]) == pytest.approx(player[:3, :, C].mean(), abs=1e-5)


def test_last_batch_may_be_smaller(tmp_path):
    options = "--reward game --episodes 20 --batch 16 --rounds 3".split()
    run_training(tmp_path / "run", *options)
    rows = read_metrics(tmp_path / "run")
    assert [int(row["episodes"]) for row in rows] == [16, 20]
    assert sum(int(rows[1][kind]) for kind in ACTION_TYPES) == 4 * 3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_any_causal_model_trains(kind, tmp_path, tiny):
    """Another architecture, random weights, the embedded tokenizer; its defaults, the paper's."""
    folder = tmp_path / "model"
    model = random_model(kind)
    model.resize_token_embeddings(len(tiny[1]))
    model.save_pretrained(folder)
    tiny[1].save_pretrained(folder)
    options = ["--reward", "utilitarian", "--model", str(folder), "--episodes", "2"]
    shown = ("sampling", "rank", "batch", "lr", "epochs")
    for extra, expected in (
        ([], ("free", 16, 256, 3e-4, 1)),
        (["--paper"], ("free", 64, 1, 1.41e-5, 4)),
    ):
        run_training(tmp_path / "run", *options, *extra, "--overwrite")
        config = read_json(tmp_path / "run" / "config.json")
        assert tuple(config[key] for key in shown) == expected


def test_a_fixed_beta_and_chosen_layers(tmp_path, capsys):
    out = tmp_path / "run"
    run_training(out, "--reward", "game", *SHORT, "--kl-fixed", "--targets", "q_proj", "v_proj")
    assert {row["kl_coef"] for row in read_metrics(out)} == {"0.5"}
    adapted = {key.split(".")[-3] for key in load_file(out / "adapter_model.safetensors")}
    assert adapted == {"q_proj", "v_proj"}
    with refused(capsys, "--targets", "no linear layer qproj"):
        run_training(tmp_path / "other", "--reward", "game", "--targets", "qproj")


def test_a_name_that_is_hardly_ever_said_is_warned_of(tmp_path, capsys):
    run_training(tmp_path / "run", "--reward", "game", *SHORT)
    assert "warning" not in capsys.readouterr().err
    options = ["--reward", "game", "--actions", "action", "action1", *SHORT]
    run_training(tmp_path / "other", *options)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "--actions" in warnings[0] and "'action'" in warnings[0]


def test_every_update_plays_one_draw_of_what_is_listed(tmp_path):
    """Against always-defect, whose rounds show which game was played by what they are worth."""
    out = tmp_path / "run"
    result = run_training(
        out,
        *"--reward utilitarian --opponent always-defect --game stag-hunt random".split(),
        *"--actions moon river K --layout rows both --prompt structured game".split(),
        *"--episodes 96 --batch 4 --epochs 1 --lr 1e-9".split(),
    )
    games, pairs, layouts, wordings = [], set(), set(), set()
    for row in read_metrics(out):
        game, names, layout, wording = row["condition"].split("; ")
        games.append(game)
        pairs.add(tuple(names.split()))
        layouts.add(layout)
        wordings.add(wording)

        cells = GAMES["stag-hunt"]
        if game != "stag-hunt":
            cells = [tuple(map(int, cell.split(","))) for cell in game.split()]
        # Of 20 rounds; the opponent plays D.
        cooperations = int(row["C|C"]) + int(row["C|D"])
        total = cooperations * sum(cells[1]) + (20 - cooperations) * sum(cells[3])
        assert float(row["reward"]) == pytest.approx(total / 20, abs=1e-4)
        assert float(row["kl"]) == pytest.approx(0, abs=1e-5)  # the reference has the same prompts
    assert pairs == set(permutations(["moon", "river", "K"], 2))
    assert layouts == {"rows", "both"} and wordings == {"structured", "game"}
    assert 6 < games.count("stag-hunt") < 18

    condition = Condition("stag-hunt", ("moon", "river"), "rows", "structured")
    untuned = player_of(*load_model("tiny", "cpu"), condition)
    assert result["policy_before"] == pytest.approx(by_state(untuned, C), abs=1e-6)


# ------------------------------------------------------------------------- who is on the other side


def test_two_learners(tmp_path):
    """Both learn tit for tat. From random first moves, it earns tit for tat 2 points a round."""
    out, reward = tmp_path / "run", "game+deontological"
    result = run_training(out, "--reward", reward, "--opponent", "learner", *LEARN)
    rows = read_metrics(out)
    for side in ("", "opponent "):
        policy = result[f"{side}policy_after".replace(" ", "_")]
        for state, best in zip(STATES, (1, 0, 1, 0)):
            assert abs(policy[state] - best) <= 0.05
        assert float(rows[-1][f"{side}reward"]) == pytest.approx(2, abs=0.1)
        for row in rows:
            assert sum(int(row[f"{side}{kind}"]) for kind in ACTION_TYPES) == 1024 * 5
    assert {row["phase"] for row in rows} == {reward}
    files = out / "adapter_model.safetensors", out / "opponent" / "adapter_model.safetensors"
    assert files[0].read_bytes() != files[1].read_bytes()
    assert read_json(out / "opponent" / "config.json")["side"] == "opponent"
    assert not (out / "opponent" / "metrics.csv").exists()  # the run's own has its columns

    evaluated = [str(out), str(out / "opponent"), "--json", str(tmp_path / "out.json")]
    where = "--game ipd --actions action1 action2 --plot".split()
    evaluate.main([*evaluated, *where, str(tmp_path / "figures")])
    results = read_json(tmp_path / "out.json")
    assert [group["n"] for group in results["groups"]] == [1, 1, 1]  # two sides are not two seeds
    labels = [group["label"] for group in results["groups"]]
    assert labels[1:] == [reward, f"{reward}, side opponent"]
    for agent, key in zip(results["runs"], ("policy_after", "opponent_policy_after")):
        assert agent["games"]["ipd"]["policy"] == pytest.approx(result[key], abs=1e-4)


def test_a_learning_opponent_is_paid_and_judged_from_its_own_side(tmp_path):
    """In a game that is not the same from both sides; the first update is replayed by hand."""
    options = "--reward game --opponent learner --game bach-stravinsky --episodes 32 --batch 16"
    result = run_training(tmp_path / "run", *options.split())
    payoffs, condition = payoff_matrix("bach-stravinsky"), Condition("bach-stravinsky")
    rows = read_metrics(tmp_path / "run")
    for row in rows:
        mine = memory_one(list(probabilities(row).values()))
        theirs = memory_one(list(probabilities(row, "opponent ").values()))
        accuracy = moral_accuracy("game", mine, payoffs, replies=replies(theirs))
        assert float(row["accuracy"]) == pytest.approx(accuracy, abs=1e-4)
        accuracy = moral_accuracy("game", theirs, other_side(payoffs), replies=replies(mine))
        assert float(row["opponent accuracy"]) == pytest.approx(accuracy, abs=1e-4)
        assert row["reward"] != row["opponent reward"]
    assert probabilities(rows[0]) == pytest.approx(result["policy_before"], abs=1e-5)
    theirs = probabilities(rows[0], "opponent ")
    assert theirs == pytest.approx(result["opponent_policy_before"], abs=1e-5)

    model, tokenizer = load_model("tiny", "cpu")
    player = player_of(model, tokenizer, condition)
    opponent = player_of(model, tokenizer, condition, second_player=True)
    mine, theirs = play(np.random.default_rng(1), player, opponent, 16, 5)
    points = payoffs[mine.move, theirs.move].mean(axis=(0, 1))
    for side, seen, mean in (("", mine, points[0]), ("opponent ", theirs, points[1])):
        assert float(rows[0][f"{side}reward"]) == pytest.approx(mean, abs=1e-5)
        counts = {kind: int(rows[0][side + kind]) for kind in ACTION_TYPES}
        assert counts == action_counts(seen)
    assert action_counts(mine) != action_counts(theirs)


def test_both_players_see_the_game_from_their_own_side():
    """Bach or Stravinsky: a cell's points change places between the two players' prompts."""
    learners, opponent = setup("--opponent", "learner", "--game", "bach-stravinsky")
    texts = []
    for agent in learners:
        trie = agent.policy(Condition("bach-stravinsky")).shards[0].trie
        texts.append(" ".join(map(agent.tokenizer.decode, trie.tokens)))
    mine, theirs = texts
    assert opponent is None
    assert mine.index("3, 2") < mine.index("2, 3")
    assert theirs.index("2, 3") < theirs.index("3, 2")


def test_a_trained_run_as_opponent_and_as_start(runs, tmp_path):
    trained = read_json(runs / "a" / "result.json")["policy_after"]
    options = ["--reward", "game", "--sampling", "free", *SHORT]
    options += ["--opponent", str(runs / "a"), "--init", str(runs / "a")]
    result = run_training(tmp_path / "run", *options)
    assert result["policy_before"] == pytest.approx(trained, abs=1e-6)
    first = read_metrics(tmp_path / "run")[0]
    assert float(first["kl"]) > 1e-4  # the reference is the base model, not where it starts
    _, opponent = setup("--opponent", str(runs / "a"))
    frozen = opponent(Condition())
    assert by_state(frozen, C) == pytest.approx(trained, abs=1e-6)
    # It was trained with free sampling, so it may answer illegally here, too.
    assert frozen.shape == (4, 4, 3)


@pytest.mark.parametrize("other", ["--rank 3", "--targets q_proj"])
def test_a_start_of_another_shape_is_refused(other, runs, capsys, tmp_path):
    options = ["--reward", "game", "--init", str(runs / "a"), *other.split()]
    with refused(capsys, "--init", "--rank 8 --alpha 16"):
        run_training(tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("names", ["action1 action2", "action2 action1"])
def test_says_what_it_does_when_the_names_change_places(names, tmp_path, capsys):
    options = ["--reward", "utilitarian", "--episodes", "1280", "--actions", *names.split()]
    run_training(tmp_path / "run", *options)
    own, other = capsys.readouterr().out.split("In a word: ")[1].splitlines()[:2]
    assert own.endswith("-> always cooperate")
    assert other == "With the two action names in each other's role: always defect"


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "typed, words",
    [
        ("", ["--reward"]),
        ("--reward kind", ["--reward", "utilitarian"]),
        ("--colour red", ["--colour"]),
        # What is learned, from whom.
        ("--then virtue", ["--then"]),
        ("--payoffs 1 2 3", ["--payoffs"]),
        ("--payoffs 1 2 3 4 5 6 7 8 --game chicken", ["--payoffs", "--game"]),
        ("--until 0.9 --gamma 0.5", ["--until", "--gamma"]),
        ("--until 0.9 --actions random", ["--until"]),
        ("--until 0.9 --game random", ["--until"]),
        ("--until 0.9 --layout rows columns", ["--until"]),
        ("--until 0", ["--until", "above 0"]),
        ("--then game --episodes 1", ["--episodes", "phases"]),
        ("--then game --episodes 256", ["--episodes", "phases"]),
        ("--switch 5", ["--switch"]),
        ("--then game --switch 0", ["--switch"]),
        ("--then game --switch 99999999", ["--switch"]),
        ("--then game utilitarian --switch 20 10", ["--switch"]),
        ("--model no/such-model", ["--model", "no/such-model"]),
        ("--model tests", ["--model"]),
        ("--game poker", ["--game", "ipd"]),
        ("--game ipd poker", ["--game", "random"]),
        ("--opponent nobody", ["--opponent", "tit-for-tat"]),
        ("--opponent 0.5", ["--opponent"]),
        ("--opponent 1 0 1", ["--opponent", "four"]),
        ("--opponent 1 0 1 2", ["--opponent", "each from 0 to 1"]),
        ("--opponent nan 0 1 0", ["--opponent", "four"]),
        ("--opponent tests", ["--opponent", "not a run folder"]),
        # What is read and answered.
        ("--sampling greedy", ["--sampling"]),
        ("--actions A", ["--actions"]),
        ("--actions A A", ["--actions", "differ"]),
        ("--actions A B A", ["--actions", "differ"]),
        ("--actions '' A", ["--actions", "non-empty"]),
        ("--actions moon moon7", ["--actions", "told apart"]),
        ("--actions B moon moon7", ["--actions", "told apart"]),
        ("--actions '<end_of_turn>' moon", ["--actions"]),
        ("--actions \u4e2d moon", ["--actions", "unknown"]),
        ("--layout diagonal", ["--layout", "original"]),
        ("--prompt haiku", ["--prompt", "structured"]),
        # How much is played, and what it earns.
        ("--episodes 0", ["--episodes", "at least 1"]),
        ("--episodes -5", ["--episodes"]),
        ("--episodes 999999999999999999999999999999", ["--episodes"]),
        ("--batch 0", ["--batch"]),
        ("--batch 1.5", ["--batch"]),
        ("--batch 1 --rounds 1", ["--batch"]),
        ("--rounds 0", ["--rounds"]),
        ("--rounds 1e3", ["--rounds"]),
        ("--xi -1", ["--xi"]),
        ("--xi inf", ["--xi"]),
        ("--illegal nan", ["--illegal"]),
        # LoRA and PPO.
        ("--lr nan", ["--lr"]),
        ("--lr -1", ["--lr"]),
        ("--lr inf", ["--lr"]),
        ("--lr fast", ["--lr"]),
        ("--rank 0", ["--rank", "at least 1"]),
        ("--rank 999999999999999", ["--rank"]),
        ("--alpha 0", ["--alpha", "above 0"]),
        ("--epochs 0", ["--epochs"]),
        ("--clip 0", ["--clip"]),
        ("--kl-coef -0.1", ["--kl-coef"]),
        ("--kl-coef nan", ["--kl-coef"]),
        ("--kl-target 0", ["--kl-target"]),
        ("--vf-coef -1", ["--vf-coef"]),
        ("--gamma 1.1", ["--gamma", "at most 1"]),
        ("--gamma -0.1", ["--gamma"]),
        # Where and how it runs.
        ("--seed -1", ["--seed"]),
        ("--seed 999999999999999999999999999999", ["--seed"]),
        ("--device abacus", ["--device"]),
        ("--device meta", ["--device"]),
        ("--dtype int8", ["--dtype"]),
        ("--init tests", ["--init", "not a run folder"]),
        ("--init nowhere", ["--init"]),
        ("--save-every 0", ["--save-every"]),
        ("--resume nowhere", ["--resume"]),
    ],
)
def test_bad_options(typed, words, capsys, tmp_path):
    options = shlex.split(typed)
    if options and "--reward" not in options:
        options += ["--reward", "game"]
    with refused(capsys, *words):
        run_training(tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def only_a_pickle(folder):
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "damage",
    [
        lambda model: cut_file(model / "model.safetensors", 1000),
        lambda model: (model / "model.safetensors").unlink(),
        only_a_pickle,
        lambda model: (model / "config.json").write_text("{"),
        lambda model: (model / "tokenizer.json").unlink(),
    ],
)
def test_damaged_models_are_refused(damage, capsys, tmp_path):
    model = damaged_model(tmp_path / "model", damage)
    with refused(capsys, "--model"):
        run_training(tmp_path / "run", "--reward", "game", "--model", model)
    assert not (tmp_path / "run").exists()


def test_what_is_too_long_in_one_wording_is_refused_at_once(capsys, tmp_path):
    """The first wording is short enough for the model, the second is not."""

    def shorten(folder):
        change_json(folder / "config.json", max_position_embeddings=60)

    model = damaged_model(tmp_path / "model", shorten)
    options = ["--reward", "game", "--model", model, "--prompt", "choice", "structured"]
    with refused(capsys, "--model", "tokens"):
        run_training(tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_a_folder_does_not_stand_in_the_way_of_a_strategy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "random").mkdir()
    args = parse_train("", ["--reward", "game", "--opponent", "random"])
    assert opponent_strategy(args.opponent) == STRATEGIES["random"]


def test_an_existing_folder_is_not_overwritten(capsys, tmp_path):
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("years of work")
    with refused(capsys, "--out", "--overwrite"):
        run_training(tmp_path, "--reward", "game")
    with refused(capsys, "--out", "not a run folder"):
        run_training(tmp_path, "--reward", "game", "--overwrite")
    with refused(capsys, "--out", "not a run folder"):
        run_training(thesis, "--reward", "game", "--overwrite")
    assert thesis.read_text() == "years of work"


def test_overwrite_replaces_a_run_but_not_before_the_input_is_checked(capsys, tmp_path):
    out = tmp_path / "run"
    options = ["--episodes", "16", "--batch", "16"]
    run_training(out, "--reward", "game", *options)
    before = (out / "result.json").read_bytes()
    with refused(capsys, "--model"):
        run_training(out, "--reward", "game", "--overwrite", "--model", "no/such-model")
    assert (out / "result.json").read_bytes() == before
    result = run_training(out, "--reward", "utilitarian", "--overwrite", *options)
    assert result["reward"] == "utilitarian"


def test_help_and_errors_come_from_the_script_itself():
    command = [sys.executable, "train.py"]
    settings = {"cwd": ROOT, "capture_output": True, "text": True}
    shown = subprocess.run([*command, "--help"], check=True, **settings)
    assert "python train.py --reward utilitarian" in shown.stdout
    failed = subprocess.run([*command, "--reward", "x"], check=False, **settings)
    assert failed.returncode == 2 and failed.stdout == ""
    assert len(failed.stderr.strip().splitlines()) == 1
