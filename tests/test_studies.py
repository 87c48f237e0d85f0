"""The studies and the example: meetings worked out by hand, transfer calculated anew, grids."""

import re
import subprocess
import sys
from functools import cache

import matplotlib.image
import numpy as np
import pytest

from conftest import ROOT, copy_run, cut_file, narrow_matrices, read_json, refused, run_training

sys.path.insert(0, str(ROOT / "studies"))

import ask
import grid
import paper
import society
import transfer
from envs import STATES, STRATEGIES, frequencies, memory_one, payoff_matrix, play, random_game
from evaluator import Evaluator
from models import encode
from options import parse_train
from policy import Policy
from prompts import NAMES, Condition, action_names, build_prompts
from rewards import REWARDS, moral_accuracy, reward_array
from runs import RunFolder


def untuned(tiny, condition, second=False, free=False):
    """The embedded model as a player [state, order, outcome], read off its plain policy."""
    model, tokenizer = tiny
    texts, answers = encode(tokenizer, build_prompts(condition, second), condition.names)
    return Policy(model, None, texts, answers, free).probabilities().reshape(4, 4, 2 + free)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one update."""
    out = tmp_path_factory.mktemp("studies") / "run"
    run_training(out, "--reward", "utilitarian", "--episodes", "256")
    return out


# ----------------------------------------------------------------------------------------- society

IPD = payoff_matrix("ipd")


def meet(strategy, other):
    return society.meet(memory_one(strategy), memory_one(other), 0.5, IPD, 5)


def test_textbook_meetings():
    tit_for_tat, pavlov = STRATEGIES["tit-for-tat"], STRATEGIES["win-stay-lose-shift"]
    all_c, all_d = STRATEGIES["always-cooperate"], STRATEGIES["always-defect"]
    # Tit-for-tat meets itself: CC for ever, DD for ever or two kinds of alternation, by the
    # opening moves.
    itself = meet(tit_for_tat, tit_for_tat)
    assert itself["long_run"] == pytest.approx((3 + 1 + (4 + 0) / 2 * 2) / 4)
    assert itself["depends_on_opening"]
    assert meet(all_d, tit_for_tat)["long_run"] == pytest.approx(1)
    exploits = {"rounds": 4, "long_run": 4, "total": 4, "minimum": 0, "depends_on_opening": False}
    assert meet(all_d, all_c) == pytest.approx(exploits)
    assert meet(all_c, all_d)["long_run"] == pytest.approx(0)
    assert meet(pavlov, pavlov)["long_run"] == pytest.approx(3)  # it corrects every opening
    # It alternates: exploited, then mutual defection.
    assert meet(pavlov, all_d)["long_run"] == pytest.approx(0.5)
    # It defects for ever against one that it betrayed before the first round: all openings alike.
    grudge = society.meet(memory_one(all_c), memory_one((1, 0, 0, 0)), 0.5, IPD, 5)
    assert grudge["long_run"] == pytest.approx((3 + 0 + 0 + 0) / 4)
    assert grudge["total"] == pytest.approx((6 + 4 + 4 + 4) / 4)
    # Any noise makes tit-for-tat visit all four states alike.
    noisy = tuple(0.99 * p + 0.01 * (1 - p) for p in tit_for_tat)
    meeting = meet(noisy, noisy)
    assert meeting["long_run"] == pytest.approx((3 + 0 + 4 + 1) / 4)
    assert not meeting["depends_on_opening"]


def test_exploitability():
    """By hand in the Prisoner's Dilemma, and against a search by sampled matches."""

    def gain(strategy):
        player = memory_one(strategy)
        return society.exploitability(player, player, IPD)

    assert gain((1, 1, 1, 1))["points"] == 4 and gain((1, 1, 1, 1))["gain"] == 1
    assert gain((0, 0, 0, 0))["points"] == 1 and gain((0, 0, 0, 0))["gain"] == 0
    # Tit-for-tat is best answered by cooperation: 3 a round, whatever the opening.
    assert gain((1, 0, 1, 0))["points"] == pytest.approx(3)
    # An agent of chance: no reply of 16, played out for 20,000 rounds, does better.
    strategy = (0.9, 0.2, 0.7, 0.4)
    best, player = gain(strategy), memory_one(strategy)
    played = []
    for reply in np.ndindex(2, 2, 2, 2):
        mine, theirs = play(np.random.default_rng(0), memory_one(reply), player, 1, 20_000)
        played.append(IPD[mine.move, theirs.move, 0].mean())
    assert best["points"] == pytest.approx(max(played), abs=0.05)


def test_extortion_is_a_linear_relation_between_the_scores():
    rng = np.random.default_rng(0)
    extortioner, points = memory_one(STRATEGIES["extortionate"]), IPD[..., 0]
    for _ in range(20):
        victim = memory_one(rng.uniform(0.05, 0.95, 4))
        share = frequencies(extortioner, victim, np.inf).sum(axis=0)
        own, other = (share * points).sum(), (share * points.T).sum()
        assert own - 1 == pytest.approx(3 * (other - 1), abs=1e-9)


@pytest.mark.parametrize("outcomes", [2, 3])
def test_long_run_is_what_long_matches_show(outcomes):
    rng = np.random.default_rng(outcomes)
    player, other = (rng.dirichlet([1] * outcomes, size=(4, 4)) for _ in range(2))
    mine, theirs = play(rng, player, other, 400, 2_000)
    chicken = payoff_matrix("chicken")
    points = reward_array("game", chicken)[mine.state, mine.action, theirs.move]
    meeting = society.meet(player, other, 0.5, chicken, 5)
    late, early = points[:, 100:].mean(axis=1), points[:, :5].mean(axis=1)
    assert abs(late.mean() - meeting["long_run"]) <= 4 * late.std() / 20
    assert abs(early.mean() - meeting["rounds"]) <= 4 * early.std() / 20
    assert not meeting["depends_on_opening"]


def test_agents_meet_on_sides_of_their_own(run, tiny, tmp_path):
    """Bach or Stravinsky looks different from its two sides.

    The second of two agents must be asked with the second player's prompts.
    """
    path = tmp_path / "out.json"
    society.main([str(run), "--game", "bach-stravinsky", "--json", str(path)])
    met = read_json(path)["untuned"]["society"]["untuned"]
    condition = Condition("bach-stravinsky", ("action3", "action4"))
    first, second = untuned(tiny, condition), untuned(tiny, condition, second=True)
    payoffs = payoff_matrix("bach-stravinsky")
    expected = society.meet(first, second, 0.5, payoffs, 5)["long_run"]
    assert met["long_run"] == pytest.approx(expected, abs=1e-5)
    # Else what is above shows nothing.
    same_side = society.meet(first, first, 0.5, payoffs, 5)["long_run"]
    assert abs(met["long_run"] - same_side) > 1e-4


def test_society_of_several_runs(run, tiny, tmp_path, capsys):
    path, seed2 = tmp_path / "out.json", copy_run(run, tmp_path / "seed2", seed=2)
    path.write_text("to be replaced")
    options = ["--game", "chicken", "--sampling", "free", "--json", str(path), "--overwrite"]
    society.main([str(run), str(seed2), *options])
    printed = capsys.readouterr().out
    assert "long run" in printed and "tit-for-tat" in printed and "in chicken against" in printed
    results = read_json(path)
    names = ["untuned", str(run), str(seed2)]
    assert list(results) == names
    for agent in results.values():
        assert set(agent["society"]) == {*STRATEGIES, *names}
        numbers = ", ".join(f"{p:.4f}" for p in agent["strategy"])
        assert f"as a memory-one strategy: ({numbers})" in printed
    met = results[str(run)]["society"]
    assert met[str(seed2)] == met[str(run)]  # the same adapter
    assert met[str(run)] != met["untuned"]
    # An illegal answer repeats the last move.
    player = untuned(tiny, Condition("chicken", ("action3", "action4")), free=True)
    cooperates, _, illegal = player.mean(axis=1).T
    expected = cooperates + illegal * [1, 1, 0, 0]
    assert results["untuned"]["strategy"] == pytest.approx(expected, abs=1e-5)


# --------------------------------------------------------------------------------------------- ask


def test_ask(run, tiny, tmp_path, capsys):
    path = tmp_path / "out.json"
    ask.main([str(run), "--game", "chicken", "--json", str(path)])
    printed, results = capsys.readouterr().out, read_json(path)
    assert list(results) == ["untuned", str(run)]
    condition = Condition("chicken", ("action3", "action4"))
    # An answer is sampled, always in the same way, from the policy in the first order of names.
    chances = zip(np.random.default_rng(0).random(4), untuned(tiny, condition)[:, 0, 0])
    expected = ["action3" if u < p else "action4" for u, p in chances]
    assert [asked["answer"] for asked in results["untuned"]] == expected
    for name, agent in results.items():
        assert [asked["state"] for asked in agent] == list(STATES)
        for i, asked in enumerate(agent):
            assert asked["prompt"] == build_prompts(condition)[4 * i]
            assert "action3" in asked["prompt"] and f"{name}, state {STATES[i]}" in printed
            for question in ask.QUESTIONS:
                assert f"  {question}\n  > {asked[question]}\n" in printed
    assert "What strategy did you use to decide?" in printed


def test_own_prompt_and_persona_change_the_text(run, tmp_path, capsys):
    mine = tmp_path / "mine.txt"
    mine.write_text("Choose {first} or {second}. They did {other}.")
    options = ["--prompt-file", str(mine), "--persona", "deontological"]
    ask.main([str(run), "--game", "ipd", *options])
    printed = capsys.readouterr().out
    assert "Choose action3 or action4. They did action4." in printed
    assert "you never harm someone" in printed


def test_a_free_answer_is_sampled_behind_the_policys_own_prompts(run, tmp_path, monkeypatch):
    generate, asked = ask.generate, []

    def generate_and_note(evaluator, which, tokens, **settings):
        asked.append(tokens)
        return generate(evaluator, which, tokens, **settings)

    monkeypatch.setattr(ask, "generate", generate_and_note)
    ask.main([str(run), "--sampling", "free", "--actions", "moon", "river"])
    evaluator = Evaluator(read_json(run / "config.json"))
    prompts, _ = evaluator.tokens(Condition("ipd", ("moon", "river")))
    assert asked[0] == asked[3] == prompts[::4]  # of the untuned model and of the run


# ---------------------------------------------------------------------------------------- transfer


def test_a_run_on_a_game_of_its_own_is_tested_on_it(run, tmp_path):
    points = [3, 3, 0, 5, 5, 0, 1, 1]
    config = read_json(copy_run(run, tmp_path / "own", payoffs=points) / "config.json")
    assert payoff_matrix(transfer.training_condition(config).game)[0, 1].tolist() == [0, 5]


def test_transfer(run, tiny, tmp_path, capsys, monkeypatch):
    """Each column against a calculation of its own, for the untuned model and a trained run."""
    # Fewer games, for speed: each of the names once.
    monkeypatch.setattr(transfer, "NEW_GAMES", len(transfer.NEW_NAMES))
    folder = tmp_path / "results"
    transfer.main([str(run), "--results", str(folder)])
    printed = capsys.readouterr().out
    assert "untuned, by the utilitarian reward" in printed and "Not new" not in printed
    results = read_json(folder / "transfer.json")
    before = results["baseline"]["transfer"]

    @cache
    def player(game, names, layout, wording):
        return untuned(tiny, Condition(game, names, layout, wording))

    def accuracy(reward, game, *words):
        return moral_accuracy(reward, player(game, *words), payoff_matrix(game))

    def mean(reward, games, names, *words):
        accuracies = []
        for game, pair in zip(games, names):
            accuracies.append(accuracy(reward, game, pair, *words))
        known = [value for value in accuracies if not np.isnan(value)]
        return np.mean(known) if known else np.nan

    rng = np.random.default_rng(0)
    games = [random_game(rng) for _ in range(transfer.NEW_GAMES)]
    old, new = ("action1", "action2"), transfer.NEW_NAMES
    for reward in REWARDS:
        expected = {
            "nothing": accuracy(reward, "ipd", old, "original", "structured"),
            "roles": accuracy(reward, "ipd", old[::-1], "original", "structured"),
            "names": mean(reward, ["ipd"] * 8, new, "original", "structured"),
            "layout": accuracy(reward, "ipd", old, "both", "structured"),
            "wording": accuracy(reward, "ipd", old, "original", "unstructured"),
            "game": mean(reward, games, [old] * 8, "original", "structured"),
            "game, names, layout": mean(reward, games, new, "both", "structured"),
            "all": mean(reward, games, new, "both", "unstructured"),
        }
        for kind, value in expected.items():  # NaN: no reward prefers an action
            assert before[reward][kind] == (None if np.isnan(value) else pytest.approx(value))
    after, [_, group] = results["runs"][0]["transfer"]["utilitarian"], results["groups"]
    assert after["nothing"] > before["utilitarian"]["nothing"] + 0.1
    assert group["transfer"]["utilitarian"]["all"]["mean"] == after["all"]

    # The table has a row for either, the picture too.
    head, rule, *rows = (folder / "transfer.md").read_text().splitlines()
    assert head == "| agent | " + " | ".join(after) + " |" and set(rule) == set("| -")
    for row, name, leaves in zip(
        rows, ("untuned, by the utilitarian reward", "utilitarian"), (before["utilitarian"], after)
    ):
        cells = [f"{value:.2f}" for value in leaves.values()]
        assert row == f"| {name} | " + " | ".join(cells) + " |"
    assert len(rows) == 2
    assert matplotlib.image.imread(folder / "transfer.png").std() > 0.05


def test_transfer_where_neither_action_is_better(run, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "NEW_GAMES", 2)
    tied = copy_run(run, tmp_path / "tied", game=["bach-stravinsky"])
    transfer.main([str(tied), "--results", str(tmp_path / "results")])
    results = read_json(tmp_path / "results" / "transfer.json")
    accuracies = results["runs"][0]["transfer"]["utilitarian"]
    assert accuracies["nothing"] is None and 0 < accuracies["game"] < 1  # 3 + 2 for either action
    assert "| utilitarian | - |" in (tmp_path / "results" / "transfer.md").read_text()


def test_transfer_says_what_is_not_new_to_a_run(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(transfer, "NEW_GAMES", 2)
    known = copy_run(run, tmp_path / "known", layout=["rows", "both"], actions=["K", "E", "sun"])
    transfer.main([str(known)])
    assert f"Not new to {known}: K both" in capsys.readouterr().out


def test_entries_that_are_near_the_optimum(run, tiny, tmp_path):
    """Of the trained run, and of one whose adapter does nothing: counted by hand."""
    from safetensors.torch import load_file, save_file

    idle = copy_run(run, tmp_path / "idle", reward="deontological")
    path = idle / "adapter_model.safetensors"
    save_file({key: 0 * tensor for key, tensor in load_file(path).items()}, path)
    distances = []
    for names in transfer.NEW_NAMES:
        policy = untuned(tiny, Condition("ipd", names))[..., 0].mean(axis=1)
        distances += list(1 - policy[[0, 2]])  # after D the reward asks for nothing
    near = sum(distance <= 0.05 for distance in distances)
    mean, largest = np.mean(distances), max(distances)
    first, second = transfer.new_name_entries([run, idle])
    assert first.startswith("utilitarian: ") and " of 32; " in first
    assert second == f"deontological: {near} of 16; mean {mean:.3f}, largest {largest:.3f}"


def test_what_is_new_at_test_is_not_in_the_built_in_names():
    tested = {name for names in transfer.NEW_NAMES for name in names}
    assert not set(NAMES) & tested


@pytest.fixture(scope="module")
def bad(run, tmp_path_factory):
    """A folder of runs that cannot be used, or not together with `run`."""
    folder = tmp_path_factory.mktemp("bad")
    copy_run(run, folder / "gone", model="no/such")
    copy_run(run, folder / "free", sampling="free")
    copy_run(run, folder / "rows", layout=["rows"])
    narrow_matrices(copy_run(run, folder / "wrong") / "adapter_model.safetensors")
    cut_file(copy_run(run, folder / "cut") / "adapter_model.safetensors", 4)
    (copy_run(run, folder / "lost") / "adapter_model.safetensors").unlink()
    (copy_run(run, folder / "json") / "config.json").write_text("{")
    return folder


@pytest.mark.parametrize("study", [society, ask, transfer])
@pytest.mark.parametrize(
    "runs, words",
    [
        ("tests", ["RUN", "not a run folder"]),
        ("{bad}/json", ["RUN", "not a run folder"]),
        ("{bad}/lost", ["RUN", "is not finished", "--resume"]),
        ("{bad}/cut", ["RUN", "cannot read ", "adapter_model"]),
        ("{bad}/wrong", ["RUN", "another model"]),
        ("{bad}/gone", ["RUN", "no/such"]),
        ("{run} {bad}/gone", ["RUN", "differ in their model"]),
    ],
)
def test_runs_that_cannot_be_studied(study, runs, words, run, bad, capsys, monkeypatch):
    monkeypatch.setattr(transfer, "NEW_GAMES", 2)
    with refused(capsys, *words):
        study.main(runs.format(run=run, bad=bad).split())


@pytest.mark.parametrize("study", [society, ask])
def test_runs_of_two_kinds_of_sampling(study, run, bad, capsys):
    with refused(capsys, "RUN", "differ in their sampling", "--sampling"):
        study.main([str(run), str(bad / "free")])


def test_transfer_starts_from_one_condition(run, bad, capsys):
    with refused(capsys, "RUN", "layout", "test them apart"):
        transfer.main([str(run), str(bad / "rows")])


@pytest.mark.parametrize("study", [society, ask])
def test_a_file_is_not_replaced_unasked(study, run, tmp_path, capsys):
    path = tmp_path / "notes.json"
    path.write_text("mine")
    with refused(capsys, "--json", "--overwrite"):
        study.main([str(run), "--json", str(path)])
    assert path.read_text() == "mine"


# ------------------------------------------------------------------------------------------- grids


def test_a_grid_may_be_stopped_and_given_again(tmp_path, monkeypatch):
    """What is finished is skipped, what was interrupted is resumed, to the very bytes."""
    options = ["--reward", "game", "--episodes", "24", "--batch", "8", "--save-every", "1"]
    whole, stopped, new = (tmp_path / name for name in ("whole", "stopped", "new"))
    run_training(whole, *options)
    save = RunFolder.save_state

    def interrupt(folder, before, rng, updates):
        save(folder, before, rng, updates)
        if updates == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save_state", interrupt)
    with pytest.raises(SystemExit):
        run_training(stopped, *options)
    assert (stopped / "state.safetensors").exists() and not (stopped / "result.json").exists()
    # Killed before its first state was saved: to be started again.
    new.mkdir()
    (new / "config.json").write_bytes((whole / "config.json").read_bytes())
    (new / "metrics.csv").touch()

    before = (whole / "result.json").stat().st_mtime_ns
    # With these options a finished run would fail if it were not skipped, and a resumed one would
    # have another reward if it did not continue.
    wrong, other = ["--reward", "greed"], ["--reward", "deontological"]
    runs = [(whole, wrong), (stopped, other), (new, options)]
    grid.train_all(runs, jobs=2, threads=1)
    assert (whole / "result.json").stat().st_mtime_ns == before
    for out in (stopped, new):
        for name in ("metrics.csv", "adapter_model.safetensors", "value_head.safetensors"):
            assert (out / name).read_bytes() == (whole / name).read_bytes()
        result, expected = read_json(out / "result.json"), read_json(whole / "result.json")
        assert {**result, "seconds": 0} == {**expected, "seconds": 0}


def test_a_grid_ends_with_what_went_wrong(tmp_path):
    """The last line of stderr, behind the command."""
    with pytest.raises(SystemExit, match="error: argument --reward: invalid choice") as stop:
        grid.train_all([(tmp_path / "run", ["--reward", "greed"])], jobs=2)
    command, reason = stop.value.code.splitlines()
    assert command == f"{ROOT / 'train.py'} --reward greed --out {tmp_path / 'run'}"
    assert "utilitarian" in reason
    assert "python train.py --reward utilitarian" in grid.run_script("train.py", "--help")


def test_markdown():
    leaf, exact, none = ({"mean": m, "ci95": c} for m, c in ((0.5, 0.125), (1, None), (None, None)))
    assert grid.markdown(["agent", "a", "b"], [["x", leaf, exact], ["y", none, "-"]]) == (
        "| agent | a | b |\n| --- | --- | --- |\n| x | 0.50±0.12 | 1.00 |\n| y | - | - |\n"
    )


def parsed(options):
    """What train.py makes of a grid's options."""
    return parse_train("", [*map(str, options), "--out", "never-written"])


@pytest.mark.parametrize("model", ["tiny", "google/gemma-2-2b-it"])
def test_the_papers_grid(model, tmp_path):
    runs = list(paper.runs(model, {"tit-for-tat": 5, "learner": 2}, tmp_path))
    assert len(runs) == len({out for out, _ in runs}) == 6 * (5 + 2)
    settings = set()
    for out, options in runs:
        args = parsed(options)
        assert (args.model, args.sampling) == (model, "free") and out.parent == tmp_path
        settings.add((args.reward, *args.then, *args.opponent, args.seed))
        words = "-then-".join([args.reward, *args.then])
        assert out.name == f"{words}-vs-{args.opponent[0]}-seed{args.seed}"
    assert len(settings) == 6 * (5 + 2)


@pytest.mark.parametrize(
    "model, count", [("tiny", 4 * (5 + 5 + 3 + 3)), ("google/gemma-2-2b-it", 4 * 3 * 2)]
)
def test_the_grid_of_transfer_never_shows_what_is_new_at_test(model, count, tmp_path):
    runs = list(transfer.training_grid(model, 5, tmp_path))
    assert len(runs) == len({out for out, _ in runs}) == count
    tested = {name for names in transfer.NEW_NAMES for name in names}
    kinds = set()
    for _, options in runs:
        args = parsed(options)
        assert not tested & {*action_names(args.actions)}
        assert transfer.NEW_LAYOUT not in args.layout
        assert transfer.NEW_WORDING not in args.prompt
        varied = args.actions == ["random"], len(args.layout) > 1, args.game == ["random"]
        kinds.add((args.reward, *varied, args.seed))
        assert args.opponent == ["random"] and args.model == model
    assert len(kinds) == len(runs)


@pytest.mark.parametrize("name", ["transfer", "paper"])
def test_a_study_is_a_script(name, tmp_path):
    """It runs from anywhere. Test_readme.py runs the other ones."""
    command = [sys.executable, ROOT / "studies" / f"{name}.py", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"python studies/{name}.py" in done.stdout


# ----------------------------------------------------------------------------------------- example


def test_a_task_of_your_own(tmp_path):
    """It learns all three right answers."""
    command = [sys.executable, ROOT / "examples" / "own_task.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    *_, red, yellow, green = done.stdout.splitlines()
    for line, light, right in ((red, "red", 0), (yellow, "yellow", 1), (green, "green", 2)):
        probabilities = [float(p) for p in re.findall(r"\d\.\d+", line)]
        assert f"The light is {light}." in line and len(probabilities) == 3
        assert probabilities[right] >= 0.95


def test_policy_and_ppo_know_no_game():
    code = "import sys, policy, ppo; print(*{'envs', 'prompts', 'rewards'} & {*sys.modules})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
