"""Who does well among others? Points against classic strategies and against each other, exactly.

    python experiments/society.py runs/*                    # in the Prisoner's Dilemma
    python experiments/society.py runs/* --game chicken --rounds 10 --json society.json

For each agent its four numbers, P(C | CC CD DC DD), as a memory-one strategy, and against everybody
the points per round over --rounds and in the long run, of both together and of the one who gets
less (Rawls). Exploitability: what the best memory-one reply gets against it in the long run, more
than it gets itself in that place. An agent sits where it learned, whom it meets on the other side,
with its own sampling; an illegal text counts as it did in training. Options as in evaluate.py.
"""

import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from envs import STRATEGIES, C, legal_moves, memory_one, opening, other_side, payoff_matrix
from evaluate import evaluate_parser, frequencies, prepare, shares, transitions
from rewards import reward_array
from runs import InputError, number, require_same, stop, write_json


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


def meet(player, other, other_opening, payoffs, rounds, illegal=-6.0):
    """Points per round of the first of two players: dict.

    rounds, long_run:   over so many rounds, and in the limit
    total, minimum:     in the long run, of both together and of the one who gets less
    depends_on_opening: whether the long run depends on the moves before the first round
    """

    def mean_points(share, view):
        points = reward_array("game", view, illegal=illegal)[:, : share.shape[1]]
        return float((share * points).sum())

    visits = long_run(transitions(player, other))
    stay = np.tile([other_opening / 2, (1 - other_opening) / 2], 2) @ visits
    mine = mean_points(shares(player, other, stay), payoffs)
    theirs = mean_points(shares(other, player, stay[[0, 2, 1, 3]]), other_side(payoffs))
    return {
        "rounds": mean_points(frequencies(player, other, rounds, other_opening), payoffs),
        "long_run": mine,
        "total": mine + theirs,
        "minimum": min(mine, theirs),
        "depends_on_opening": bool(np.ptp(visits, axis=0).max() > 1e-6),
    }


def exploitability(player, other, payoffs, illegal=-6.0):
    """What the best memory-one reply gets against an agent, more than the agent in that place.

    player, other: the agent on its own side of the game and on the other one
    Against a fixed memory-one player a deterministic reply is as good as any (a Markov decision
    process), and there are 16. Dict: the reply, its points per round in the long run, the gain.
    """
    points = {}
    for reply in product((0, 1), repeat=4):
        points[reply] = meet(memory_one(reply), other, 0.5, payoffs, 1, illegal)["long_run"]
    best = max(points, key=lambda reply: round(points[reply], 6))  # of equals always-defect
    own = meet(player, other, 0.5, payoffs, 1, illegal)["long_run"]
    return {"reply": list(best), "points": points[best], "gain": points[best] - own}


def society(players, condition, sampling, rounds, illegal):
    """Of each agent its strategy, four numbers, its meetings and its exploitability: dict."""
    agents, results = {"untuned": None} | {str(run): run for run in players.configs}, {}
    for name, run in agents.items():
        second, payoffs = players.second(run), payoff_matrix(condition.game)
        payoffs = other_side(payoffs) if second else payoffs
        player, across = (players.player(run, condition, s, sampling) for s in (second, not second))
        others = {key: (memory_one(p), opening(p)) for key, p in STRATEGIES.items()}
        for key, other in agents.items():
            others[key] = players.player(other, condition, not second), 0.5
        met = {key: meet(player, *it, payoffs, rounds, illegal) for key, it in others.items()}
        results[name] = {"strategy": legal_moves(player)[:, C].tolist(), "society": met}
        results[name]["exploitability"] = exploitability(player, across, payoffs, illegal)
    return results


def print_society(results, game, rounds):
    title, width = f"exact points per round in {game} against", max(40, *map(len, results))
    for name, agent in results.items():
        numbers = ", ".join(f"{p:.4f}" for p in agent["strategy"])
        reply, points, gain = agent["exploitability"].values()
        print(f"\n{name} as a memory-one strategy: ({numbers})")
        print(f"  the best memory-one reply, {' '.join(map(str, reply))}, gets {points:.3f} in the")
        print(f"  long run, {gain:.3f} more than it gets itself in that place")
        print(f"  {title:{width}}{rounds:>3} rounds  long run     total   minimum")
        for other, points in agent["society"].items():
            *numbers, depends = points.values()
            note = "  (depends on the opening moves; mean over them)" if depends else ""
            print(f"  {other:{width}}" + "".join(f"{x:10.3f}" for x in numbers) + note)


def main(argv=None):
    try:
        parser = evaluate_parser(__doc__, games=["ipd"])
        parser.option("--rounds", "per episode", type=number(int, 1, 10**6), default=5)
        args = parser.parse_args(argv)
        [condition], players = prepare(args, one=True)
        require_same("RUN", players.configs.values(), "illegal")
        illegal = players.configs[args.runs[0]]["illegal"]
        results = society(players, condition, args.sampling, args.rounds, illegal)
        if args.json:
            write_json(args.json, results)
        print("C is {}, D is {} (--actions); the other role may differ.".format(*args.actions))
        print(f"An illegal text counts {illegal:g} points, as in the runs' training (--illegal).")
        print_society(results, " ".join(args.game), args.rounds)
    except InputError as error:
        stop(error)


if __name__ == "__main__":
    main()
