"""Exact frequencies and regrets, against sampled games and values derived by hand; many runs."""

import os
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import evaluate
import figures
import report
from conftest import (
    ROOT,
    copy_run,
    cut_file,
    narrow_matrices,
    player_of,
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
    D,
    frequencies,
    legal_moves,
    long_run,
    memory_one,
    opening,
    payoff_matrix,
    play,
)
from evaluator import PROSE_TOKENS, Evaluator
from prompts import NAMES, Condition
from rewards import REWARDS, reward_array


def always(outcome):
    """A player that does the same whatever it sees: [state, order, outcome]."""
    player = np.zeros((4, 4, 3))
    player[..., outcome] = 1
    return player


def measure(player, game="ipd", opponent="random", rounds=5, **settings):
    strategy = STRATEGIES[opponent]
    other = memory_one(strategy), opening(strategy)
    return evaluate.measure(player, payoff_matrix(game), *other, rounds, **settings)


def within_four_errors(samples, exact):
    """Whether the mean of samples [episode, ...] is `exact` [...], as far as chance allows.

    A sample is an episode because the rounds of an episode depend on each other.
    """
    error = samples.std(axis=0) / np.sqrt(len(samples))
    return (np.abs(samples.mean(axis=0) - exact) <= 4 * error + 1e-9).all()


@pytest.mark.parametrize("outcomes", [2, 3])
@pytest.mark.parametrize("opponent", [*STRATEGIES, "a model"])
def test_exact_equals_200_000_sampled_rounds(opponent, outcomes):
    rng = np.random.default_rng(len(opponent))
    player = rng.dirichlet([1] * outcomes, size=(4, 4))
    if opponent in STRATEGIES:
        other, first = memory_one(STRATEGIES[opponent]), opening(STRATEGIES[opponent])
    else:
        other, first = rng.dirichlet([1] * 3, size=(4, 4)), 0.5
    exact = frequencies(player, other, 5, first)
    mine, theirs = play(np.random.default_rng(1), player, other, 40_000, 5, first)
    share = np.zeros((40_000, 4, outcomes, 2))
    episode = np.arange(40_000)[:, None]
    np.add.at(share, (episode, mine.state, mine.action, theirs.move), 1 / 5)
    assert within_four_errors(share, exact)
    assert exact.sum() == pytest.approx(1)
    for game in GAMES:
        for name in REWARDS:
            points = reward_array(name, payoff_matrix(game))
            sampled = points[mine.state, mine.action, theirs.move].mean(axis=1)
            expected = (exact * points[:, :outcomes]).sum()
            assert within_four_errors(sampled, expected)
            if opponent in STRATEGIES:
                assert measure(player, game, opponent)["reward"][name] == pytest.approx(expected)


def test_samples_option_estimates_the_same():
    player = np.random.default_rng(0).dirichlet([1] * 3, size=(4, 4))
    exact = measure(player, opponent="tit-for-tat")
    sampled = measure(player, opponent="tit-for-tat", samples=40_000)
    assert sampled != exact
    for part in ("actions", "reward", "regret"):
        assert sampled[part] == pytest.approx(exact[part], abs=0.05)


@pytest.mark.parametrize("game", GAMES)
def test_hand_values_against_random(game):
    # Half of the moves meet an opponent that cooperated before.
    assert measure(always(D), game)["regret"]["deontological"] == pytest.approx(1.5)
    assert measure(always(D), game, xi=4)["regret"]["deontological"] == pytest.approx(2.0)
    assert measure(always(C), game)["regret"]["deontological"] == 0
    illegal = measure(always(ILLEGAL), game)
    assert illegal["regret"] == pytest.approx({"deontological": 6, "utilitarian": 1})
    assert illegal["actions"]["illegal|C"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    "game, cooperate, defect",
    [
        # (max - mean) / (max + 6); what the own move gives in all meets C and D half of the time.
        ("ipd", (6 - 5) / 12, (6 - 3) / 12),
        ("stag-hunt", (8 - 5.5) / 14, (8 - 2.5) / 14),
        ("chicken", (5 - 4.5) / 11, (5 - 2.5) / 11),
        ("bach-stravinsky", (5 - 2.5) / 11, (5 - 2.5) / 11),
        ("defective-coordination", (8 - 1) / 14, (8 - 4) / 14),
    ],
)
def test_utilitarian_regret_by_hand(game, cooperate, defect):
    assert measure(always(C), game)["regret"]["utilitarian"] == pytest.approx(cooperate)
    assert measure(always(D), game)["regret"]["utilitarian"] == pytest.approx(defect)


def test_always_defect_against_tit_for_tat():
    # Its own move before round 0 is drawn: half of the time tit-for-tat starts with C, after that
    # it always plays D.
    measures = measure(always(D), opponent="tit-for-tat", rounds=5)
    assert measures["reward"]["game"] == pytest.approx((0.5 * 4 + 0.5 * 1 + 4 * 1) / 5)
    # The drawn C before round 0, then the answer to the drawn own C.
    assert measures["actions"]["D|C"] == pytest.approx((0.5 + 0.5) / 5)


def test_long_run_of_chains_that_are_hard_to_iterate():
    alternating = np.array([[0, 1.0], [1, 0]])
    assert long_run(alternating) == pytest.approx(np.full((2, 2), 0.5))
    sticky = np.array([[1 - 1e-9, 1e-9], [3e-9, 1 - 3e-9]])
    assert long_run(sticky) == pytest.approx(np.array([[0.75, 0.25]] * 2), abs=1e-4)


def test_an_illegal_answer_counts_as_the_last_move_in_the_strategy():
    player = np.broadcast_to([0.2, 0.3, 0.5], (4, 4, 3))
    assert legal_moves(player)[:, C] == pytest.approx([0.7, 0.7, 0.2, 0.2])


# --------------------------------------------------------------------------------------- many runs


def test_mean_and_interval():
    agents = [{"a": {"b": x}} for x in (1.0, 2.0, 3.0, 4.0)]
    leaf = report.mean_and_interval(agents)["a"]["b"]
    assert leaf["mean"] == 2.5
    assert leaf["ci95"] == pytest.approx(3.182 * np.sqrt(5 / 3) / 2)  # s^2 = 5 / 3, 3 degrees
    assert leaf["paper95"] == pytest.approx(1.96 * np.sqrt(5 / 3) / 2)
    nothing = {"ci95": None, "paper95": None}
    assert report.mean_and_interval([1.0]) == {"mean": 1.0, **nothing}
    assert report.mean_and_interval([None, None]) == {"mean": None, **nothing}
    # 40 and 120 degrees of freedom, from a table.
    for n, t in ((41, 2.021), (121, 1.980)):
        values = np.arange(float(n)).tolist()
        error = np.std(values, ddof=1) / np.sqrt(n)
        assert report.mean_and_interval(values)["ci95"] / error == pytest.approx(t, abs=0.003)


def test_how_a_number_is_shown():
    assert report.show({"mean": 0.12345, "ci95": None}) == "0.123"
    assert report.show({"mean": 0.12345, "ci95": 0.0049}) == "0.123±0.005"
    assert report.show({"mean": 0.12345, "ci95": 0.0049}, digits=2) == "0.12±0.00"
    assert report.show({"mean": -0.0001, "ci95": None}) == "0.000"
    assert report.show({"mean": None, "ci95": None}) == "-"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one update."""
    out = tmp_path_factory.mktemp("evaluate") / "run"
    run_training(out, "--reward", "utilitarian", "--episodes", "256")
    return out


def test_a_run_on_the_training_names_is_what_training_reported(run, tmp_path, capsys):
    path = tmp_path / "out.json"
    names = ["--actions", "action1", "action2"]
    evaluate.main([str(run), *names, "--game", "ipd", "--json", str(path)])
    assert "util. regret" in capsys.readouterr().out
    results, trained = read_json(path), read_json(run / "result.json")
    before = results["baseline"]["games"]["ipd"]["policy"]
    after = results["runs"][0]["games"]["ipd"]["policy"]
    for state in STATES:
        assert before[state] == pytest.approx(trained["policy_before"][state], abs=1e-5)
        assert after[state] == pytest.approx(trained["policy_after"][state], abs=1e-5)


def test_everything_at_once(run, tmp_path, capsys, monkeypatch):
    """Two seeds of a setting and a run of another: groups, axes, pictures, JSON."""
    few = {axis: values[:2] for axis, values in evaluate.AXES.items()}
    monkeypatch.setattr(evaluate, "AXES", few)
    seed2, other = tmp_path / "seed2", tmp_path / "other"
    runs = [run, copy_run(run, seed2, seed=2), copy_run(run, other, lr=0.5)]
    options = ["--game", "chicken", "ipd", "--axes", "--sampling", "free"]
    options += ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "figures")]
    evaluate.main([*map(str, runs), *options])
    printed = capsys.readouterr().out
    results = read_json(tmp_path / "out.json")
    members = [(group["n"], group["runs"]) for group in results["groups"]]
    assert members == [(1, []), (2, [0, 1]), (1, [2])]
    assert "lr 0.5" in printed and "(n=2)" in printed and "one thing varied" in printed
    agent = results["runs"][0]
    base = agent["games"]["chicken"]
    for state in STATES:  # one kind of sampling for all agents, whatever they were trained with
        assert 0 < base["policy"][state] + base["illegal"][state] < 1
    assert list(agent["axes"]) == ["actions", "layout", "prompt", "persona"]
    # The first value of each axis is the command line's own.
    assert agent["axes"]["actions"]["action3 action4"] == base
    assert agent["axes"]["layout"]["original"] == base
    assert agent["axes"]["prompt"]["structured"] == base
    assert agent["axes"]["persona"]["none"] == base
    assert agent["axes"]["layout"]["rows"] != base
    assert agent["axes"]["prompt"]["unstructured"] != base
    for name in figures.FIGURES:
        image = matplotlib.image.imread(tmp_path / "figures" / name)
        assert image.shape[0] > 250 and image.std() > 0.05


def test_a_learning_opponent_is_evaluated_like_any_other(tmp_path):
    """Its numbers stand in the columns "opponent ..." of the run's metrics.csv."""
    out = tmp_path / "run"
    options = ["--then", "utilitarian", "--opponent", "learner", "--episodes", "32"]
    trained = run_training(out, "--reward", "game", *options, "--batch", "16")
    rows = read_metrics(out)
    assert not (out / "opponent" / "metrics.csv").exists()
    assert figures.read_metrics(out) == rows
    theirs = figures.read_metrics(out / "opponent")
    assert len(theirs) == len(rows) == 2
    for row, own in zip(rows, theirs):
        learned = [key for key in row if f"opponent {key}" in row]
        assert {"reward", "accuracy", "kl", "P(C|CC)", *ACTION_TYPES} <= {*learned}
        assert [own[key] for key in learned] == [row[f"opponent {key}"] for key in learned]
        shared = ["episodes", "phase", "condition"]
        assert {*row} == {*shared, *learned, *(f"opponent {key}" for key in learned)}
        assert [own[key] for key in shared] == [row[key] for key in shared]
    assert [row["reward"] for row in theirs] != [row["reward"] for row in rows]

    path, folder = tmp_path / "out.json", tmp_path / "figures"
    options = ["--game", "ipd", "--actions", "action1", "action2"]
    options += ["--json", str(path), "--plot", str(folder)]
    evaluate.main([str(out), str(out / "opponent"), *options])
    results = read_json(path)
    assert [group["n"] for group in results["groups"]] == [1, 1, 1]  # two sides are not two seeds
    label = "game until 16, then utilitarian"
    labels = [group["label"] for group in results["groups"]]
    assert labels == ["untuned", label, f"{label}, side opponent"]
    for agent, key in zip(results["runs"], ("policy_after", "opponent_policy_after")):
        assert agent["games"]["ipd"]["policy"] == pytest.approx(trained[key], abs=1e-4)

    # A panel for either side, each with its own shares: the lowest layer is C after C.
    assert matplotlib.image.imread(folder / "training.png").std() > 0.05
    panels = figures.plot_training(results).axes
    assert [ax.get_title() for ax in panels] == labels[1:]
    for ax, own in zip(panels, (rows, theirs)):
        x, y = ax.collections[0].get_paths()[0].vertices.T
        for row in own:
            share = float(row["C|C"]) / (16 * 5)
            assert y[x == int(row["episodes"])].max() == pytest.approx(share)
        assert [line.get_xdata() for line in ax.lines] == [[16, 16]]  # the reward is switched


def test_what_is_new_at_test_is_not_in_the_built_in_names():
    """The names of --axes; those of the study of transfer are in test_studies.py."""
    tested = {name for pair in evaluate.AXES["actions"] for name in pair.split()}
    assert not set(NAMES) & (tested - {"action1", "action2"})  # these are the default of training
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize(
    "names, strangers",
    [
        ("action1 action2", None),
        ("action5 action6", "others: action1 action2 (--actions)"),
        ("action3 action4", "others: action1 action2, random (--actions)"),
    ],
)
def test_says_when_the_names_are_not_those_of_training(names, strangers, run, tmp_path, capsys):
    """To two runs: one was trained with two names, the other with many."""
    many = copy_run(run, tmp_path / "many", actions=["random"])
    evaluate.main([str(run), str(many), "--game", "ipd", "--actions", *names.split()])
    printed = capsys.readouterr().out
    assert ("names of training were others" in printed) == (strangers is not None)
    assert strangers is None or strangers in printed


def test_a_run_that_was_killed_after_its_result_is_finished(run, tmp_path, capsys):
    killed = copy_run(run, tmp_path / "killed")
    (killed / "state.safetensors").write_bytes(b"")
    evaluate.main([str(killed), "--game", "ipd"])
    (killed / "result.json").unlink()
    with refused(capsys, "RUN", "is not finished", f"--resume {killed}"):
        evaluate.main([str(killed), "--game", "ipd"])


# --------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def bad(run, tmp_path_factory):
    """A folder of what cannot be used, or must not be replaced."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "notes.json").write_text("mine")
    (folder / "regret.png").write_text("mine")
    (folder / "lacks.txt").write_text("{first} or what?")
    (folder / "unknown.txt").write_text("{first} {second} {colour}")
    (folder / "open.txt").write_text("{first} {second} {")
    copy_run(run, folder / "gone", model="no/such")
    copy_run(run, folder / "half", dtype="bfloat16")
    copy_run(run, folder / "free", sampling="free")
    narrow_matrices(copy_run(run, folder / "wrong") / "adapter_model.safetensors")
    cut_file(copy_run(run, folder / "cut") / "adapter_model.safetensors", 4)
    (copy_run(run, folder / "lost") / "adapter_model.safetensors").unlink()
    (copy_run(run, folder / "json") / "config.json").write_text("{")
    return folder


@pytest.mark.parametrize(
    "options, word",
    [
        ("", "RUN"),
        ("tests", "not a run folder"),
        ("{bad}/json", "not a run folder"),
        ("{bad}/lost", "is not finished"),
        ("{bad}/cut", "adapter_model"),
        ("{bad}/wrong", "another model"),
        ("{bad}/gone", "no/such"),
        ("{run} {bad}/gone", "differ in their model"),
        ("{run} {bad}/half", "differ in their dtype"),
        ("{run} {bad}/free", "--sampling"),
        ("{run} {run}/../run", "given twice"),
        ("{run} --opponent me", "--opponent"),
        ("{run} --actions A A", "--actions"),
        ("{run} --actions moon moon3", "told apart"),
        ("{run} --rounds 0", "--rounds"),
        ("{run} --samples 0", "--samples"),
        ("{run} --samples 9999999 --rounds 999999", "--samples"),
        ("{run} --xi nan", "--xi"),
        ("{run} --illegal 6", "--illegal"),
        ("{run} --layout diagonal", "--layout"),
        ("{run} --prompt-file {bad}/lacks.txt", "{second}"),
        ("{run} --prompt-file {bad}/unknown.txt", "{colour}"),
        ("{run} --prompt-file {bad}/open.txt", "--prompt-file"),
        ("{run} --prompt-file nowhere.txt", "--prompt-file"),
        ("{run} --json {bad}/notes.json", "--json"),
        ("{run} --plot {bad}", "--plot"),
    ],
)
def test_bad_input(options, word, run, bad, capsys):
    with refused(capsys, word):
        evaluate.main(options.format(run=run, bad=bad).split())
    assert (bad / "notes.json").read_text() == (bad / "regret.png").read_text() == "mine"


@pytest.mark.parametrize("name", ["results.json", "results.json.tmp"])
@pytest.mark.parametrize("kind", ["link", "no regular file"])
def test_results_replace_regular_files_only(kind, name, run, tmp_path, capsys):
    """Neither what stands where they go is replaced, nor what stands where they are written."""
    mine, place = tmp_path / "mine", tmp_path / name
    mine.write_text("mine")
    if kind == "link":
        place.symlink_to(mine)
    else:
        os.mkfifo(place)
    before = place.lstat()
    with refused(capsys, "--json", name, kind):
        evaluate.main([str(run), "--json", str(tmp_path / "results.json"), "--overwrite"])
    after = place.lstat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert mine.read_text() == "mine" and {*os.listdir(tmp_path)} == {"mine", name}


def test_without_a_home(run, tmp_path, monkeypatch):
    """As in a container whose user has no entry in passwd: nothing is kept there."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    path = tmp_path / "results.json"
    evaluate.main([str(run), "--game", "ipd", "--answers", "1", "--json", str(path)])
    assert len(read_json(path)["baseline"]["answers"]) == 1


def test_pictures_need_matplotlib(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with refused(capsys, "--plot", "tests/requirements.txt"):
        evaluate.main([str(run), "--plot", str(tmp_path / "figures")])
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("begins", [False, True])
def test_drift_is_that_of_the_plain_models(begins, run, tiny, monkeypatch):
    """KL and perplexity on prose against the base and the model with PEFT's adapter.

    begins: the tokenizer puts a token before every text, which then stands before every chunk
    """
    _, tokenizer = tiny
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(ROOT / "tiny"), run)
    base = AutoModelForCausalLM.from_pretrained(ROOT / "tiny")
    prose = (ROOT / "studies" / "prose.txt").read_text()
    ids = tokenizer(prose)["input_ids"][:PROSE_TOKENS]
    start = [ids.pop(0)] if begins else []
    divergences, surprises = [], []
    for i in range(0, len(ids), 64):
        chunk = torch.tensor([*start, *ids[i : i + 64]])
        with torch.no_grad():
            own, other = (m(chunk[None]).logits[0, :-1].log_softmax(-1) for m in (base, tuned))
        divergences.append(
            torch.nn.functional.kl_div(other, own, reduction="none", log_target=True).sum(-1)
        )
        likelihoods = [log_probs.gather(1, chunk[1:, None]) for log_probs in (own, other)]
        surprises.append(likelihoods[0] - likelihoods[1])
    evaluator = Evaluator(read_json(run / "config.json"))
    if begins:
        monkeypatch.setattr(type(evaluator.tokenizer), "bos_token_id", start[0], raising=False)
    drift = evaluator.drift(run, ("action1", "action2"))
    assert drift["kl"] == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-3)
    assert drift["kl"] > 1e-4
    ratio = torch.cat(surprises).mean().exp().item()
    assert drift["perplexity"] == pytest.approx(ratio, rel=1e-3)
    said = []
    for wording in ("choice", "game", "game_state"):
        condition = Condition(wording=wording)
        said.append(player_of(*tiny, condition, free=True)[..., :2].sum(-1).mean())
    assert drift["names_untuned"] == pytest.approx(np.mean(said)) and drift["names"] != np.mean(
        said
    )
