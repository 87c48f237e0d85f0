"""Who does well among others? Points against classic strategies and against each other, exactly.

    python studies/society.py runs/*                    # in the Prisoner's Dilemma
    python studies/society.py runs/* --game chicken --rounds 10 --json society.json

For each agent its four numbers, P(C | CC CD DC DD), as a memory-one strategy, and against everybody
the points per round over --rounds and in the long run, of both together and of the one who gets
less (Rawls). Exploitability: what the best memory-one reply gets against it in the long run, more
than it gets itself in that place. Options as in evaluate.py.
"""

import math
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from envs import (
    STRATEGIES,
    C,
    frequencies,
    game_name,
    legal_moves,
    long_run,
    memory_one,
    opening,
    other_side,
    payoff_matrix,
    transitions,
)
from evaluator import Evaluator
from program import printing, user_error
from rewards import reward_array
from runs import write_json
from tested import add_match_options, condition_from, condition_parser, games_from, read_runs


def meet(player, other, other_opening, payoffs, rounds, illegal=-6.0):
    """Points per round of the first of two players: dict.

    rounds, long_run:   over so many rounds, and in the limit
    total, minimum:     in the long run, of both together and of the one who gets less
    depends_on_opening: whether the long run depends on the moves before the first round
    """

    def mean_points(me, opponent, view, length, *openings):
        points = reward_array("game", view, illegal=illegal)[:, : me.shape[-1]]
        return float((frequencies(me, opponent, length, *openings) * points).sum())

    mine = mean_points(player, other, payoffs, math.inf, other_opening, 0.5)
    theirs = mean_points(other, player, other_side(payoffs), math.inf, 0.5, other_opening)
    visits = long_run(transitions(player, other))
    return {
        "rounds": mean_points(player, other, payoffs, rounds, other_opening, 0.5),
        "long_run": mine,
        "total": mine + theirs,
        "minimum": min(mine, theirs),
        "depends_on_opening": bool(np.ptp(visits, axis=0).max() > 1e-6),
    }


def exploitability(player, other, payoffs, illegal=-6.0):
    """What the best memory-one reply gets against an agent, more than the agent in that place.

    player, other: the agent on the first and on the second side of the game
    Against a fixed memory-one player a deterministic reply is as good as any (a Markov decision
    process), and there are 16. In points per round of the long run: dict with the reply, its points
    and the gain.
    """
    points = {}
    for reply in product((0, 1), repeat=4):  # of equally good ones always-defect comes first
        meeting = meet(memory_one(reply), other, 0.5, payoffs, 1, illegal)
        points[reply] = meeting["long_run"]
    best = max(points, key=lambda reply: round(points[reply], 6))
    own = meet(player, other, 0.5, payoffs, 1, illegal)["long_run"]
    return {"reply": list(best), "points": points[best], "gain": points[best] - own}


def society(args, configs):
    """Of each agent its strategy, four numbers, its meetings and its exploitability: dict."""
    game = games_from(args)[0]
    condition, payoffs = condition_from(args, game), payoff_matrix(game)
    evaluator = Evaluator(configs[0], args.sampling, args.legal, args.runs)
    agents = {"untuned": None} | {str(run): run for run in args.runs}
    others = {}
    for name, strategy in STRATEGIES.items():
        others[name] = memory_one(strategy), opening(strategy)
    for name, run in agents.items():  # whom one meets sits on the other side of the game
        others[name] = evaluator.player(run, condition, second=True), 0.5
    results = {}
    for name, run in agents.items():
        player, meetings = evaluator.player(run, condition), {}
        for other, (opponent, its_opening) in others.items():
            meetings[other] = meet(
                player, opponent, its_opening, payoffs, args.rounds, args.illegal
            )
        results[name] = {
            "strategy": legal_moves(player)[:, C].tolist(),
            "society": meetings,
            "exploitability": exploitability(player, others[name][0], payoffs, args.illegal),
        }
    return results


def main(argv=None):
    parser = condition_parser("society.py", __doc__, games=["ipd"])
    add_match_options(parser)
    args = parser.parse_args(argv)
    configs = read_runs(args)
    with user_error("RUN", ValueError, OSError):
        results = society(args, configs)
    if args.json:
        with user_error("--json", OSError):
            write_json(args.json, results)
    with printing():
        print("C is {}, D is {} (--actions); the other role may differ.".format(*args.actions))
        print_society(results, game_name(games_from(args)[0]), args.rounds)


def print_society(results, game, rounds):
    width = max(40, *(len(name) for name in results))
    for name, agent in results.items():
        numbers = ", ".join(f"{p:.4f}" for p in agent["strategy"])
        best = agent["exploitability"]
        reply = " ".join(map(str, best["reply"]))
        title = f"exact points per round in {game} against"
        print(f"\n{name} as a memory-one strategy: ({numbers})")
        print(
            f"  the best memory-one reply, {reply}, gets {best['points']:.3f} in the long run, "
            f"{best['gain']:.3f} more than it gets itself in that place"
        )
        print(f"  {title:{width}}{rounds:>3} rounds  long run     total   minimum")
        for other, points in agent["society"].items():
            note = ""
            if points["depends_on_opening"]:
                note = "  (depends on the opening moves; mean over them)"
            shown = "".join(f"{points[key]:10.3f}" for key in ("rounds", "long_run", "total"))
            print(f"  {other:{width}}{shown}{points['minimum']:10.3f}{note}")


if __name__ == "__main__":
    main()
