"""Does a generative classifier forget less? Real digits, five class groups of two, three seeds.

    python -m experiments.split_digits

The four plasticities of VAR against a network that is merely trained on (finetune), one that keeps
200 images (replay), and one retrained on everything (joint). Expected: last accuracy near 97 % for
adapter and copy with no image stored, near 20 % for finetune, near 99 % for joint. About 25
minutes on two idle CPU cores; interrupted, it goes on where it stopped.

The setting (class-incremental, generative against discriminative, nothing stored) is that of van de
Ven et al. 2021, "Class-incremental learning with generative classifiers", on smaller images.
"""

import sys
from pathlib import Path

from cil.command_line import parse
from cil.run import exit_code, run
from cil.table import publish

METHODS = "var-embedding,var-adapter,var-trunk,var-copy,finetune,replay,joint"
SEEDS = "0,1,2"


def main() -> None:
    options = [f"--methods=[{METHODS}]", f"--seeds=[{SEEDS}]", *sys.argv[1:]]
    config, fresh = parse("split_digits", options)
    runs = run("split_digits", config, fresh)
    command = " ".join(["python -m experiments.split_digits", *sys.argv[1:]])
    if runs:  # of several processes the first one alone has them
        publish(runs, Path(__file__).parent / "results" / "split_digits", command)


if __name__ == "__main__":
    sys.exit(exit_code(main))
