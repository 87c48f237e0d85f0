"""The exact chain against samples and values by hand; runs as players, groups; bad input."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import conftest
import envs
import evaluate
import society
from conftest import (
    change_json,
    copy_run,
    damaged_model,
    player_of,
    read_json,
    refused,
    run_training,
)
from envs import ILLEGAL, STATES, STRATEGIES, C, Condition, D, Opponent, memory_one, payoff_matrix
from errors import InputError
from evaluate import frequencies
from grid import read_metrics
from groups import group_by_seed, mean_and_interval, show
from lora import load_adapter
from options import train_parser
from policy import load_model
from rewards import REWARDS, reward_array
from wordings import NAMES

SETTINGS = vars(train_parser("").parse_args([]))  # also those that a fork's rewards read
BRIEF = ["--prompt", "brief"]  # the model reads it in a third of the time


def always(outcome):
    """A player that does the same whatever it sees: [state, order, outcome]."""
    player = np.zeros((4, 4, 3))
    player[..., outcome] = 1
    return player


def measure(player, game="ipd", opponent="random", rounds=5, **settings):
    other = Opponent(strategy=STRATEGIES[opponent])
    payoffs = payoff_matrix(game)
    settings = {**SETTINGS, **settings}
    return evaluate.measure(player, payoffs, other.player(None), other.opening, rounds, settings)


def evaluated(path, *words):
    """evaluate.py, in this process; what --json has. Without --game: ipd alone."""
    game = [] if "--game" in words else ["--game", "ipd"]
    evaluate.main([*map(str, words), *game, "--json", str(path), "--overwrite"])
    return read_json(path)


def within_four_errors(samples, exact):
    """Whether the mean of samples [episode, ...], whose rounds hang together, may be `exact`."""
    error = samples.std(axis=0) / np.sqrt(len(samples))
    return (np.abs(samples.mean(axis=0) - exact) <= 4 * error + 1e-9).all()


@pytest.mark.parametrize("outcomes", [2, 3])
@pytest.mark.parametrize("opponent", [*STRATEGIES, "a model"])
def test_exact_equals_200_000_sampled_rounds(opponent, outcomes):
    rng = np.random.default_rng(len(opponent))
    player = rng.dirichlet([1] * outcomes, size=(4, 4))
    other, first = rng.dirichlet([1] * 3, size=(4, 4)), 0.5
    if opponent in STRATEGIES:
        other, first = memory_one(STRATEGIES[opponent]), Opponent(STRATEGIES[opponent]).opening
    exact = frequencies(player, other, 5, first)
    mine, theirs = envs.play(np.random.default_rng(1), player, other, 40_000, 5, first)
    share = np.zeros((40_000, 4, outcomes, 2))
    episode = np.arange(40_000)[:, None]
    np.add.at(share, (episode, mine.state, mine.action, theirs.move), 1 / 5)
    assert within_four_errors(share, exact) and exact.sum() == pytest.approx(1)
    for game in envs.GAMES:
        for name in REWARDS:
            points = reward_array(name, payoff_matrix(game), SETTINGS)
            sampled = points[mine.state, mine.action, theirs.move].mean(axis=1)
            expected = (exact * points[:, :outcomes]).sum()
            assert within_four_errors(sampled, expected)
            if opponent in STRATEGIES:
                assert measure(player, game, opponent)["reward"][name] == pytest.approx(expected)


@pytest.mark.parametrize("game", envs.GAMES)
def test_hand_values_against_random(game):
    # Half of the moves meet an opponent that cooperated before.
    assert measure(always(D), game)["regret"]["deontological"] == pytest.approx(1.5)
    assert measure(always(D), game, xi=4)["regret"]["deontological"] == pytest.approx(2.0)
    assert measure(always(C), game)["regret"]["deontological"] == 0
    illegal = measure(always(ILLEGAL), game)
    assert illegal["regret"] == pytest.approx({"deontological": 6, "utilitarian": 1})
    assert illegal["actions"]["illegal|C"] == pytest.approx(0.5)


# (max - mean) / (max + 6); what the own move gives in all meets C and D half of the time.
REGRETS = {
    "ipd": ((6 - 5) / 12, (6 - 3) / 12),
    "stag-hunt": ((8 - 5.5) / 14, (8 - 2.5) / 14),
    "chicken": ((5 - 4.5) / 11, (5 - 2.5) / 11),
    "bach-stravinsky": ((5 - 2.5) / 11, (5 - 2.5) / 11),
    "defective-coordination": ((8 - 1) / 14, (8 - 4) / 14),
    # A total below an illegal answer's reward: the worst is -40.
    ((3, 3), (0, 0), (0, 0), (-20, -20)): ((6 - 3) / 46, (6 + 20) / 46),
}


@pytest.mark.parametrize("game", REGRETS)
def test_utilitarian_regret_by_hand(game):
    for action, regret in zip((C, D), REGRETS[game]):
        assert measure(always(action), game)["regret"]["utilitarian"] == pytest.approx(regret)


def test_always_defect_against_tit_for_tat():
    # Its own move before round 0 is drawn: half of the time tit-for-tat starts with C, after that
    # it always plays D.
    measures = measure(always(D), opponent="tit-for-tat", rounds=5)
    assert measures["reward"]["game"] == pytest.approx((0.5 * 4 + 0.5 * 1 + 4 * 1) / 5)
    # The drawn C before round 0, then the answer to the drawn own C.
    assert measures["actions"]["D|C"] == pytest.approx((0.5 + 0.5) / 5)


def test_100_000_rounds_are_the_long_run():
    """Tables are float32, whose rows do not sum to 1."""
    tables = np.random.default_rng(0).dirichlet([2] * 3, (2, 16)).astype(np.float32)
    tables[0] *= np.float32(1 - 1e-7)
    player, other = map(envs.as_player, tables)
    assert np.abs(player.sum(axis=-1) - 1).max() < 1e-15
    measures = evaluate.measure(player, payoff_matrix("ipd"), other, 0.5, 10**5, SETTINGS)
    assert sum(measures["actions"].values()) == pytest.approx(1, abs=1e-9)
    payoffs = [payoff_matrix("ipd", side) for side in (0, 1)]
    limit = society.meet(player, other, 0.5, payoffs, 5, SETTINGS)["long_run"]
    assert measures["reward"]["game"] == pytest.approx(limit, abs=1e-5)


def test_no_regret_where_all_totals_are_equal():
    measures = measure(always(D), ((0, 0), (1, -1), (-1, 1), (0, 0)), illegal=0.0)
    assert measures["regret"]["utilitarian"] is None and measures["reward"]["utilitarian"] == 0


def test_mean_and_interval():
    agents = [{"a": {"b": x}} for x in (1.0, 2.0, 3.0, 4.0)]
    leaf = mean_and_interval(agents)["a"]["b"]
    assert leaf["mean"] == 2.5
    assert leaf["ci95"] == pytest.approx(3.182 * np.sqrt(5 / 3) / 2)  # s^2 = 5 / 3, 3 degrees
    for values in ([1.0], [None, None]):
        assert mean_and_interval(values) == {"mean": values[0], "ci95": None}
    # 11, 15, 40 and 120 degrees of freedom, from a table.
    for n, t in ((12, 2.201), (16, 2.131), (41, 2.021), (121, 1.980)):
        values = np.arange(float(n)).tolist()
        error = np.std(values, ddof=1) / np.sqrt(n)
        assert mean_and_interval(values)["ci95"] / error == pytest.approx(t, abs=0.003)


def test_how_a_number_is_shown():
    assert show({"mean": 0.12345, "ci95": None}) == "0.123"
    assert show({"mean": 0.12345, "ci95": 0.0049}) == "0.123±0.005"
    assert [show({"mean": mean, "ci95": None}) for mean in (-0.0001, None)] == ["0.000", "-"]


@pytest.fixture(scope="module")
def free(tmp_path_factory):
    """It has learned to say action1, and of other names it prefers one."""
    out = tmp_path_factory.mktemp("evaluate") / "free"
    options = "--sampling free --batch 1024 --episodes 4096 --lr 4e-3 --seed 2".split()
    run_training(out, "--reward", "utilitarian", *options, *BRIEF)
    return out


def test_everything_at_once(run, tmp_path, capsys, monkeypatch):
    """Two seeds of a setting and a run of another: groups, axes, JSON."""
    two = {axis: values[:2] for axis, values in evaluate.AXES.items()}
    two["prompt"] = ("brief", "explicit")
    monkeypatch.setattr(evaluate, "AXES", two)
    runs = [run, copy_run(run, tmp_path / "2", seed=2), copy_run(run, tmp_path / "o", lr=0.5)]
    options = ["--game", "chicken", "ipd", "--axes", "--sampling", "free", *BRIEF]
    results = evaluated(tmp_path / "out.json", *runs, *options)
    printed = capsys.readouterr().out
    members = [(group["n"], group["runs"]) for group in results["groups"]]
    assert members == [(1, []), (2, [0, 1]), (1, [2])]
    assert "lr 0.5" in printed and "(n=2)" in printed and "one thing varied" in printed
    axes, base = results["runs"][0]["axes"], results["runs"][0]["games"]["chicken"]
    for state in STATES:  # one kind of sampling for all agents, whatever they were trained with
        assert 0 < base["policy"][state] + base["illegal"][state] < 1
    # The first value of each axis is the command line's own, the second is another.
    assert list(axes) == ["actions", "layout", "prompt", "persona"]
    for first, second in map(dict.values, axes.values()):
        assert first == base and second != base


def test_a_seed_counts_once(run, tmp_path, capsys):
    """Also on another device: both are one draw. In another group it may come again."""
    with refused(capsys, "RUN", "of utilitarian a seed comes twice: 1 1"):
        other = copy_run(run, tmp_path / "other", device="cuda")
        evaluated(tmp_path / "out.json", run, other, *BRIEF)
    config = read_json(run / "config.json")
    with pytest.raises(InputError, match="of utilitarian a seed comes twice: 1 1"):
        group_by_seed([config, config])
    groups = group_by_seed([config, {**config, "lr": 0.5}])
    assert [group["runs"] for group in groups] == [[0], [1]]


def test_seeds_that_each_go_on_from_a_run_of_their_own_are_a_group(run):
    config = read_json(run / "config.json")
    reformed = [{**config, "seed": seed, "init": f"runs/game-seed{seed}"} for seed in (1, 2)]
    [group] = group_by_seed(reformed)
    assert group["n"] == 2
    other = {**config, "init": "runs/deontological-seed1"}
    assert [group["n"] for group in group_by_seed([*reformed, other])] == [2, 1]


def test_each_option_of_a_test_acts_and_each_figure_is_in_its_column(run, tmp_path, capsys):
    """Here all figures of a line differ, and the better action depends on the opponent."""
    unlearned = copy_run(run, tmp_path / "run", reward=["utilitarian", "game"])
    options = "--game 3 2 9 5 4 1 1 0 --opponent always-cooperate --rounds 2 --layout both".split()
    results = evaluated(tmp_path / "out.json", unlearned, *options, *BRIEF)
    game = ((3, 2), (9, 5), (4, 1), (1, 0))
    condition, base = Condition(game, ("action3", "action4"), "both", "brief"), load_model("tiny")
    load_adapter(base[0], "agent", run)
    player, all_c = player_of(*base, condition, name="agent"), STRATEGIES["always-cooperate"]
    settings, payoffs = read_json(unlearned / "config.json"), payoff_matrix(game)
    expected = evaluate.measure(player, payoffs, memory_one(all_c), 1, 2, settings, reward="game")
    [measures] = results["runs"][0]["games"].values()
    for key in ("policy", "illegal", "actions", "reward", "regret"):
        assert measures[key] == pytest.approx(expected[key], abs=1e-6)
    wanted = [*expected["policy"].values(), 0, expected["reward"]["game"]]
    wanted += [*expected["regret"].values(), 1 - np.mean([*expected["policy"].values()])]
    name = "utilitarian then game "
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(name)]
    shown = lines[0].split()[3:]  # the second line has the names in each other's role
    assert [float(word) for word in shown] == pytest.approx(wanted, abs=6e-4)
    assert len({*shown}) == len(wanted)


def test_names_are_known_in_both_roles_where_more_than_two_were_drawn():
    for known, both in ((["a", "b"], False), (["a", "b", "c"], True), (["b", "c", "d"], False)):
        assert evaluate.knows_both_roles({"actions": known}, ["a", "b"]) == both
    assert evaluate.knows_both_roles({"actions": ["random"]}, NAMES[:2])


def test_the_head_says_what_training_had(run, tmp_path, capsys):
    """Wording, layout and persona of the test, and which of them were others in training."""
    asked = "--layout both --prompt poetic --persona moral --actions action1 action2".split()
    evaluated(tmp_path / "out.json", run, *asked)
    head, *lines = capsys.readouterr().out.splitlines()
    assert "layout both, prompt poetic, persona moral" in head
    had = ["In training --layout was original.", "In training --prompt was structured."]
    assert [line for line in lines if line.startswith("In training")] == had


def test_what_is_new_at_test_is_not_in_the_built_in_names():
    tested = {name for pair in evaluate.AXES["actions"] for name in pair}
    tested -= {"action1", "action2"}  # these are the default of training
    assert not {*NAMES} & tested and len({*NAMES}) == len(NAMES)


def test_both_roles_and_the_warning(free, tmp_path, capsys):
    """Names are tested in both roles; a preference for a word is said."""
    path, said = tmp_path / "results.json", "leans to the word action3"
    results = evaluated(path, free, *BRIEF)
    [agent], printed = results["runs"], capsys.readouterr().out
    parts = [agent[part]["ipd"] for part in ("games", "swapped")]
    legal = [[p["policy"][s] / (1 - p["illegal"][s]) for s in STATES] for p in parts]
    assert np.mean(legal[0]) - np.mean(legal[1]) > 0.2 and said in printed
    assert "In training --actions was action1 action2." in printed
    swapped = ["--actions", "action4", "action3", *BRIEF]
    assert evaluated(path, free, *swapped)["runs"][0]["games"] == agent["swapped"]
    assert said in capsys.readouterr().out
    # An agent whose training had these names in both roles is not tested twice.
    known = copy_run(free, tmp_path / "known", actions=["action3", "moon", "action4"])
    assert "swapped" not in evaluated(path, known, *swapped)["runs"][0]
    printed = capsys.readouterr().out
    assert "leans to the word" not in printed and "In training" not in printed


@pytest.mark.parametrize("kind", ["run", "free"])
def test_a_run_on_the_training_names_is_what_training_reported(kind, tmp_path, request):
    """Killed after its result it is finished, too."""
    run = copy_run(request.getfixturevalue(kind), tmp_path / "run")
    (run / "state.safetensors").write_bytes(b"")
    wording = read_json(run / "config.json")["prompt"]
    options = ["--actions", "action1", "action2", "--prompt", *wording]
    results = evaluated(tmp_path / "out.json", run, *options)
    after = results["runs"][0]["games"]["ipd"]
    before = results["baseline"]["games"]["ipd"]
    trained = read_json(run / "result.json")
    for key in ("policy", "illegal"):
        assert before[key] == pytest.approx(trained[f"{key}_before"], abs=1e-5)
        assert after[key] == pytest.approx(trained[f"{key}_after"], abs=1e-5)


def test_an_opponent_that_is_a_run(run, free, tmp_path):
    """It sits on the other side and acts with its own sampling: here it may answer illegally."""
    options = ["--game", "bach-stravinsky", *BRIEF]
    results = evaluated(tmp_path / "out.json", run, *options, "--opponent", free)
    players = evaluate.Players([run, free])
    condition = Condition("bach-stravinsky", ("action3", "action4"), prompt="brief")
    theirs = players.player(free, condition, side=1)
    assert theirs.shape == (4, 4, 3) and theirs[..., ILLEGAL].max() > 0.01
    player, payoffs = players.player(run, condition), payoff_matrix("bach-stravinsky")
    expected = evaluate.measure(player, payoffs, theirs, 0.5, 5, SETTINGS)
    got = results["runs"][0]["games"]["bach-stravinsky"]
    for part in ("actions", "reward"):
        assert got[part] == pytest.approx(expected[part])


def test_a_learning_opponent_is_evaluated_on_its_own_side(tmp_path):
    """C earns the first player 3 points and the second one none, D the opposite.

    The numbers of training stand in the columns "opponent_..." of the run's metrics.csv.
    """
    both, game = [tmp_path / "run", tmp_path / "run" / "opponent"], "--game 3 0 3 3 0 0 0 3".split()
    options = "--reward game --opponent learner --batch 1024 --episodes 4096".split()
    trained = run_training(both[0], *options, *game, *BRIEF)
    rows, theirs = map(read_metrics, both)
    for row, own in zip(rows, theirs):
        learned = {key: row[f"opponent_{key}"] for key in row if f"opponent_{key}" in row}
        assert {"reward", "right", "kl", "p_C_after_CC", "count_C_after_C"} <= {*learned}
        assert own == row | learned
    assert len(rows) == len(theirs) == 4 and rows != theirs

    asked = [*game, "--actions", "action1", "action2", *BRIEF]
    results = evaluated(tmp_path / "out.json", *both, *asked)
    labels = [(group["n"], group["label"]) for group in results["groups"]]
    assert labels == [(1, "untuned"), (1, "game"), (1, "game, side opponent")]
    for agent, key, best in zip(results["runs"], ("policy", "opponent_policy"), (1, 0)):
        [measures] = agent["games"].values()
        assert measures["policy"] == pytest.approx(trained[f"{key}_after"], abs=1e-4)
        assert measures["policy"] == pytest.approx(dict.fromkeys(STATES, best), abs=0.05)
        assert measures["reward"]["game"] == pytest.approx(3, abs=0.15)


def test_a_wording_is_its_text(run, tmp_path):
    """Neither a byte order mark nor a final newline changes a figure."""
    results, file = [], tmp_path / "wording.txt"
    for start, end in [("", ""), ("\ufeff", ""), ("", "\r\n")]:
        file.write_bytes(f"{start}Wähle {{first}} or {{second}}. Your answer:{end}".encode())
        results.append(evaluated(tmp_path / "out", run, "--prompt", file))
    assert results[0] == results[1] == results[2]


# What is typed behind RUN, and a part of the line that refuses it.
BAD_OPTIONS = """{bad}/base|differ in their base; {bad}/xi|differ in their xi; --game 1|--game; \
{bad}/sampling|sampling; {run}/../run|given twice; --opponent me|--opponent; --game random|--game; \
--opponent learner|--opponent; --actions A A|--actions; --actions moon moon3|told apart; \
--prompt nowhere.txt|--prompt; --prompt {bad}/lacks|{{second}}; --prompt {bad}/unknown|colour; \
--prompt {bad}/open|--prompt; --prompt {bad}/nested|--prompt; --prompt {bad}/binary|utf-8; \
--json {bad}/notes.json|--overwrite; --json {bad}/no/such.json --overwrite|--json; \
--json /dev/null --overwrite|no regular file; --json . --overwrite|no regular file""".split("; ")
# What is typed alone; of adapters more in test_lora.py.
BAD_RUNS = """|RUN; tests|not a run folder; {bad}/json|config.json; {bad}/half|--resume; \
{bad}/lost|adapter_model; {bad}/narrow|another model; {bad}/nan|not finite; {bad}/dora|use_dora; \
{bad}/model|no/such; {bad}/base|base""".split("; ")


@pytest.fixture(scope="module")
def bad(run, tmp_path_factory):
    """A folder of what cannot be used, or must not be replaced."""
    folder = tmp_path_factory.mktemp("bad")
    texts = {
        "lacks": "{first} or what?",
        "unknown": "{first} {second} {colour}",
        "open": "{first} {second} {",
        "nested": "{first} {second:{d_}}",
        "notes.json": "mine",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "binary").write_bytes(b"\xff\xfe{first}")
    for key, value in {"model": "no/such", "xi": 1.0, "sampling": "free", "base": "0"}.items():
        copy_run(run, folder / key, **{key: value})
    (copy_run(run, folder / "json") / "config.json").write_text("{")
    (copy_run(run, folder / "half") / "result.json").unlink()
    (copy_run(run, folder / "lost") / "adapter_model.safetensors").unlink()
    conftest.narrow_matrices(copy_run(run, folder / "narrow") / "adapter_model.safetensors")
    path = copy_run(run, folder / "nan") / "adapter_model.safetensors"
    save_file({key: tensor * np.nan for key, tensor in load_file(path).items()}, path)
    change_json(copy_run(run, folder / "dora") / "adapter_config.json", use_dora=True)
    return folder


@pytest.mark.parametrize("typed", [*(f"{{run}} {bad}" for bad in BAD_OPTIONS), *BAD_RUNS])
def test_bad_options(typed, run, bad, capsys, monkeypatch):
    typed, word = typed.format(run=run, bad=bad).split("|")
    before = {path: path.lstat()[:2] for path in (*bad.iterdir(), Path("/dev/null"))}
    if "--json" in typed:
        monkeypatch.setattr(evaluate, "list_tests", lambda *_: pytest.fail("worked for nothing"))
    with refused(capsys, word):
        evaluate.main(typed.split())
    assert {path: path.lstat()[:2] for path in before} == before  # mode and inode
    assert (bad / "notes.json").read_text() == "mine"


def test_a_part_that_fails_costs_that_part(run, capsys, tmp_path, monkeypatch):
    """Some wordings are too long for the model: the other conditions of --axes are there."""
    few = {"max_position_embeddings": 125}
    model = damaged_model(tmp_path / "model", lambda at: change_json(at / "config.json", **few))
    short = copy_run(run, tmp_path / "short", model=model)
    few = {"layout": ("original",), "prompt": evaluate.AXES["prompt"]}
    monkeypatch.setattr(evaluate, "AXES", few)
    axes = evaluated(tmp_path / "results.json", short, "--axes")["runs"][0]["axes"]
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    left_out = set(evaluate.AXES["prompt"]) - set(axes["prompt"])
    assert left_out and len(warnings) >= len(left_out)
    assert all("--axes" in line and "tokens" in line for line in warnings)
    assert axes["prompt"]["structured"] == axes["layout"]["original"]


def test_a_bug_in_one_layout_is_a_traceback(run, monkeypatch):
    """Not a layout that is left out."""
    matrix = envs.matrix

    def bug(payoffs, names, rows, columns):
        if rows != (0, 1):
            raise KeyError("mine")
        return matrix(payoffs, names, rows, columns)

    monkeypatch.setattr(envs, "matrix", bug)
    with pytest.raises(KeyError, match="mine"):
        evaluate.main([str(run), "--game", "ipd", "--axes"])


def test_runs_that_differ_in_a_parameter_of_a_reward_are_not_one_group(run, tmp_path, monkeypatch):
    """And each is paid by its own."""
    monkeypatch.setitem(REWARDS, "mine", lambda *args: args[-1].get("weight", 0.0))
    other = copy_run(run, tmp_path / "other", seed=2, weight=2.0)
    results = evaluated(tmp_path / "out.json", run, other, *BRIEF)
    assert [group["label"] for group in results["groups"][1:]] == [
        "utilitarian",
        "utilitarian, weight 2.0",
    ]
    rewards = [agent["games"]["ipd"]["reward"]["mine"] for agent in results["runs"]]
    assert rewards == pytest.approx([0, 2])
