"""A run as a standalone model, base and adapter in one, with its tokenizer; in float32.

python experiments/merge.py RUN FOLDER
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluate import Players
from lora import merge_adapter
from runs import InputError, Parser, stop


def main(argv=None):
    try:
        parser = Parser(__doc__)
        parser.option("run", "what is merged", metavar="RUN", type=Path)
        parser.option("folder", "a new one", metavar="FOLDER", type=Path)
        args = parser.parse_args(argv)
        if args.folder.exists():
            raise InputError("FOLDER", f"{args.folder} exists: choose another place")
        players = Players([args.run])
        policy, dtype = players.policy(args.run), players.configs[args.run]["dtype"]
        merge_adapter(policy.model.float(), policy.name)
        for part in (policy.model, policy.tokenizer):
            part.save_pretrained(args.folder)
        print(f"Merged, from {dtype}, and saved in float32: {args.folder}")
    except (OSError, ValueError) as error:
        stop(InputError("FOLDER", error))


if __name__ == "__main__":
    main()
