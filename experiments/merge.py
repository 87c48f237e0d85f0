"""A run as a standalone model, base and adapter in one, with its tokenizer; in float32.

python experiments/merge.py RUN FOLDER
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from errors import InputError, about, stop
from evaluate import Players
from lora import merge_adapter
from options import Parser
from runs import writing


def main(argv=None):
    try:
        parser = Parser(__doc__)
        parser.option("run", "what is merged", metavar="RUN", type=Path)
        parser.option("folder", "a new one", metavar="FOLDER", type=Path)
        args = parser.parse_args(argv)
        if args.folder.exists():
            raise InputError(f"{args.folder} exists: choose another place", "FOLDER")
        players = Players([args.run])
        policy = players.policy(args.run)
        merge_adapter(policy.model.float(), policy.name)
        with about("FOLDER"), writing(args.folder):
            policy.model.save_pretrained(args.folder)
            policy.tokenizer.save_pretrained(args.folder)
        dtype = players.configs[args.run]["dtype"]
        print(f"Merged, from {dtype}, and saved in float32: {args.folder}")
    except InputError as error:
        stop(error)


if __name__ == "__main__":
    main()
