"""Cut the data this folder ships: short protein chains with their secondary structure, in TAPE's raw JSON.

usage: python make_cut.py SOURCE OUTPUT     SOURCE holds secondary_structure_train.json and ..._valid.json
"""

import gzip
import json
import sys
from pathlib import Path

SHORTEST, LONGEST = 50, 180
SIZES = {"train": ("train", 0, 320), "valid": ("valid", 0, 80), "test": ("valid", 80, 160)}
"""{split: (source, first and last of the chains of fitting length)}."""


def main(source: Path, output: Path) -> None:
    """Write the three splits, each record with sequence, labels and identifier."""
    for split, (name, first, last) in SIZES.items():
        records = json.loads((source / f"secondary_structure_{name}.json").read_text())
        fitting = [one for one in records if SHORTEST <= len(one["primary"]) <= LONGEST and all(one["valid_mask"])]
        kept = [{key: one[key] for key in ("id", "primary", "ss3", "ss8")} for one in fitting[first:last]]
        folder = output / "secondary_structure"
        folder.mkdir(parents=True, exist_ok=True)
        text = "[\n" + ",\n".join(json.dumps(one, separators=(",", ":")) for one in kept) + "\n]\n"
        (folder / f"secondary_structure_{split}.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
