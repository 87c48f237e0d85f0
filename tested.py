"""Which finished runs are tested, and in what condition: what evaluate.py and the studies are told.

condition_parser             the options that they share;  add_match_options: if they play, more
read_runs, read_configs      the settings of runs, which must be finished and fit each other
condition_from, games_from   the Condition and the games of the command line
"""

from pathlib import Path

from envs import GAMES, own_game
from program import check_free, number, program_parser, user_error
from prompts import LAYOUTS, PERSONAS, TEMPLATES, Condition, check_names, check_template
from runs import read_config


def condition_parser(prog, description, games=tuple(GAMES)):
    """The options that evaluate.py shares with the studies: which runs, in what condition.

    games: those that are tested by default; of a program that tests one game, that one
    """
    parser = program_parser(prog, description)
    option = parser.add_argument
    help = "run folders that train.py wrote, all of one base model"
    option("runs", nargs="+", type=Path, metavar="RUN", help=help)
    help = f"which games [{' '.join(games)}]"
    several = "+" if len(games) > 1 else 1
    option("--game", nargs=several, choices=GAMES, default=list(games), help=help)
    help = "a game of your own instead of --game, as for train.py"
    option("--payoffs", nargs=8, type=number(int), metavar="POINTS", help=help)
    names, help = ("C_NAME", "D_NAME"), "the names of C and D [action3 action4]"
    option("--actions", nargs=2, metavar=names, default=["action3", "action4"], help=help)
    help = "order of the payoff matrix' rows and columns [original]"
    option("--layout", choices=LAYOUTS, default="original", help=help)
    help = "the wording [structured, the one of training]"
    option("--prompt", choices=TEMPLATES, default="structured", help=help)
    help = "your own wording, with {first} and {second} for the actions; see prompts.fields"
    option("--prompt-file", type=Path, metavar="FILE", help=help)
    help = "a sentence of values before the prompt [none]"
    option("--persona", choices=["none", *PERSONAS], default="none", help=help)
    help = "[as the runs were trained]"
    option("--sampling", choices=("constrained", "free"), help=help)
    option("--json", type=Path, metavar="FILE", help="write everything to this file")
    option("--overwrite", action="store_true", help="replace the files that are written")
    return parser


def add_match_options(parser):
    """Those of a program that plays: how long, and what is legal."""
    option = parser.add_argument
    option("--rounds", type=number(int, 1, 10**6), default=5, help="rounds per episode [5]")
    help = (
        "which free answers count: prefix, those that begin with a name, as in training; strict, "
        "those that are nothing else up to the token behind it, as in the authors' tests of other "
        "wordings [prefix]"
    )
    option("--legal", choices=("prefix", "strict"), default="prefix", help=help)
    help = "reward of an illegal answer, points [-6]"
    option("--illegal", type=number(float, high=0), default=-6.0, help=help)


def read_runs(args):
    """The settings of all runs, which must be finished and fit each other; checks the rest, too."""
    with user_error("--actions"):
        check_names(args.actions)
    with user_error("--prompt-file", ValueError, OSError):
        check_template(condition_from(args).wording if args.prompt_file else TEMPLATES[args.prompt])
    with user_error("RUN"):
        configs = read_configs(args.runs)
        if not args.sampling:
            one_value(configs, "sampling", "choose one with --sampling")
    if args.json:
        check_free("--json", args.json, args.overwrite)
    return configs


def read_configs(runs, again=False):
    """The settings of runs that are finished and have one base model. Raises ValueError.

    again: the same run may be there twice
    """
    if len({run.resolve() for run in runs}) < len(runs) and not again:
        raise ValueError("a run is given twice: it would count as two seeds")
    configs = [read_config(run) for run in runs]
    for run in runs:
        check_finished(run)
    for key in ("model", "dtype", "base"):
        one_value(configs, key, "evaluate them apart")
    return configs


def check_finished(run):
    """Raise ValueError unless training has ended in this run folder."""
    started, ended = (run / "state.safetensors").exists(), (run / "result.json").exists()
    if (started and not ended) or not (run / "adapter_model.safetensors").exists():
        resume = f"python train.py --resume {run}"
        raise ValueError(f"{run} is not finished: leave it out, or continue it with  {resume}")


def one_value(configs, key, hint):
    """Raise ValueError unless a setting has the same value in all runs."""
    values = sorted({str(config.get(key)) for config in configs})
    if len(values) > 1:
        raise ValueError(f"the runs differ in their {key} ({', '.join(values)}): {hint}")


def games_from(args):
    """The games of the command line: keys of GAMES, or four cells."""
    return [own_game(args.payoffs)] if args.payoffs else args.game


def condition_from(args, game="ipd"):
    """The Condition of the command line. Raises OSError or ValueError."""
    wording = args.prompt
    if args.prompt_file:  # the same text, whatever an editor puts around it
        wording = args.prompt_file.read_text(encoding="utf-8-sig").rstrip("\n")
    return Condition(game, tuple(args.actions), args.layout, wording, args.persona)
