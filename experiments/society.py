"""Who does well among others? Points against classic strategies and against each other, exactly.

    python experiments/society.py runs/*                    # in the Prisoner's Dilemma
    python experiments/society.py runs/* --game chicken --rounds 10 --json society.json

For each agent its four numbers, P(C | CC CD DC DD), as a memory-one strategy, and against everybody
the points per round over --rounds and in the long run, of both together and of the one who gets
less (Rawls). Exploitability: the points of the best memory-one reply to it in the long run, less
those that the agent itself would get in that place. An agent sits where it learned, whom it meets
on the other side, with its own sampling; an illegal text counts as it did in training. The options
of evaluate.py are here, too, but for --opponent and --axes, and --game takes one.
"""

import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from envs import MIRROR, STRATEGIES, C, Opponent, legal_moves, memory_one, payoff_matrix
from errors import InputError, about, stop
from evaluate import (
    asked_of,
    evaluate_parser,
    first_state,
    frequencies,
    prepare,
    shares,
    transitions,
)
from groups import in_brief
from options import COUNT
from rewards import reward_array
from runs import require_same, save_json


def long_run(chain):
    """Share of time in each state in the limit of many steps, by first state: [4, 4] -> [4, 4].

    Rows are equal where the long run does not depend on the start. The limit of the average over
    time always exists, also for a chain that alternates: that is why half a step is mixed in, which
    changes no average.
    """
    power = (chain + np.eye(len(chain))) / 2
    for _ in range(64):  # 2^64 steps
        power = power @ power
        power /= power.sum(axis=1, keepdims=True)
    return power


def meet(player, other, other_opening, payoffs, rounds, settings):
    """Points per round of the first of two players: dict.

    payoffs:  as the player sees them, and as the other one does: two arrays
    settings: of the runs, for what an illegal answer counts

    rounds, long_run:   over so many rounds, and in the limit
    total, minimum:     in the long run, of both together and of the one who gets less
    depends_on_opening: whether the long run depends on the moves before the first round
    """
    mine, theirs = payoffs
    visits = long_run(transitions(player, other))
    stay = first_state(other_opening) @ visits
    own = mean_points(shares(player, other, stay), mine, settings)
    others = mean_points(shares(other, player, stay[MIRROR]), theirs, settings)
    first_rounds = frequencies(player, other, rounds, other_opening)
    return {
        "rounds": mean_points(first_rounds, mine, settings),
        "long_run": own,
        "total": own + others,
        "minimum": min(own, others),
        "depends_on_opening": bool(np.ptp(visits, axis=0).max() > 1e-6),
    }


def mean_points(share, payoffs, settings):
    """Points per round of a player, from its share of rounds [state, outcome, other's move]."""
    points = reward_array("game", payoffs, settings)[:, : share.shape[1]]
    return float((share * points).sum())


def exploitability(player, other, payoffs, settings):
    """What the best memory-one reply gets against an agent, more than the agent in that place.

    player, other: the agent on its own side of the game and on the other one
    Against a fixed memory-one player a deterministic reply is as good as any (a Markov decision
    process), and there are 16. Dict: the reply, its points per round in the long run, the gain.
    """
    points = {}
    for reply in product((0, 1), repeat=4):
        points[reply] = meet(memory_one(reply), other, 0.5, payoffs, 1, settings)["long_run"]
    best = max(points, key=lambda reply: round(points[reply], 6))  # of equals always-defect
    own = meet(player, other, 0.5, payoffs, 1, settings)["long_run"]
    return {"reply": list(best), "points": points[best], "gain": points[best] - own}


def society(players, condition, sampling, rounds):
    """Of each agent its strategy, four numbers, its meetings and its exploitability: dict."""
    agents = {"untuned": None}
    for run in players.configs:
        agents[str(run)] = run
    settings = next(iter(players.configs.values()))  # what an illegal text counts is one in all
    results = {}
    for name, run in agents.items():
        side = players.side(run)
        payoffs = [payoff_matrix(condition.game, s) for s in (side, 1 - side)]
        player = players.player(run, condition, side, sampling)
        across = players.player(run, condition, 1 - side, sampling)
        met = {}
        for key, strategy in STRATEGIES.items():
            opening = Opponent(strategy=strategy).opening
            other = memory_one(strategy)
            met[key] = meet(player, other, opening, payoffs, rounds, settings)
        for key, other_run in agents.items():
            other = players.player(other_run, condition, 1 - side, sampling)
            met[key] = meet(player, other, 0.5, payoffs, rounds, settings)
        results[name] = {
            "strategy": legal_moves(player)[:, C].tolist(),
            "society": met,
            "exploitability": exploitability(player, across, payoffs, settings),
        }
    return results


def print_society(results, game, rounds):
    title = f"exact points per round in {game} against"
    width = max(40, *map(len, results))
    for name, agent in results.items():
        numbers = ", ".join(f"{p:.4f}" for p in agent["strategy"])
        best = agent["exploitability"]
        reply = " ".join(map(str, best["reply"]))
        print(f"\n{name} as a memory-one strategy: ({numbers})")
        print(f"  the best memory-one reply, {reply}, gets {best['points']:.3f} in the")
        print(f"  long run, {best['gain']:.3f} more than it gets itself in that place")
        print(f"  {title:{width}}{rounds:>3} rounds  long run     total   minimum")
        for other, points in agent["society"].items():
            shown = ""
            for key in ("rounds", "long_run", "total", "minimum"):
                shown += f"{points[key]:10.3f}"
            if points["depends_on_opening"]:
                shown += "  (depends on the opening moves; mean over them)"
            print(f"  {other:{width}}{shown}")


def main(argv=None):
    try:
        parser = evaluate_parser(__doc__, games=["ipd"])
        parser.option("--rounds", "per episode", type=COUNT, default=5)
        args = parser.parse_args(argv)
        [condition], players = prepare(args, one=True)
        with about("RUN"):
            require_same(players.configs.values(), "illegal")
        results = society(players, condition, args.sampling, args.rounds)
        illegal = players.configs[args.runs[0]]["illegal"]
        asked = asked_of(args, condition, players)
        save_json(args, {**asked, "illegal": illegal, "agents": results})
        print("C is {}, D is {} (--actions); the other role may differ.".format(*args.actions))
        print(f"The wording is {in_brief(condition.prompt)} (--prompt).")
        print(f"An illegal text counts {illegal:g} points, as in the runs' training (--illegal).")
        print_society(results, " ".join(args.game), args.rounds)
    except InputError as error:
        stop(error)


if __name__ == "__main__":
    main()
