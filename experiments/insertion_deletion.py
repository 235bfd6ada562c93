"""Do explanations name the pixels that predictions rest on? Insertion and deletion, as a table.

    python -m experiments.insertion_deletion runs/split_digits/var-adapter/seed0
    python -m experiments.insertion_deletion RUN_OF_A_VAR RUN_OF_A_NETWORK --images=200

Of every run, of a VAR or a discriminative method, the predicted classes of test images, spread over
the classes, are explained: by token-wise mutual information (tmi: against the null class,
tmi_contrast: against the best wrong class; VAR only), by captum's occlusion, LIME, KernelSHAP,
saliency and integrated gradients, and at random: pixel by pixel, or by a map as coarse as the
squares of LIME, enlarged as TMI's maps are (random_map). Then the most important pixels go first,
as in RISE (arXiv 1806.07421): deleted to a constant, or put back into a blurred image. The areas
under the curves of the class's probability are means over the images, with their standard error.

The table, a CSV file and the curves go to experiments/results/NAME, NAME being
insertion_deletion_EXPERIMENT unless --name gives another. In the literature (arXiv 2510.12060, VAR
d16 on ImageNet at 256 px): TMI insertion 0.944, deletion 0.605, better than LIME and SHAP.
"""

import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from os.path import commonpath
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from cil import plots
from cil.environment import commit, device
from cil.errors import UserError
from cil.explain import best_wrong
from cil.insertion_deletion import Curves, Protocol, curves
from cil.records import figure_bytes, with_ending, write_bytes
from cil.robustness import check_one_experiment
from cil.run import exit_code
from cil.table import markdown, provenance, show
from experiments.asking import place_of, typed
from experiments.attributions import CAPTUM, RANDOM, Attribution, Effort, Model, attribute
from experiments.finished import Finished, add_arguments, every_label_in_turn, finished

TMI = ("tmi", "tmi_contrast")
METHODS = (*TMI, *CAPTUM, *RANDOM)
HEADINGS = ["model", "explanation", "insertion", "deletion", "evaluations", "s/img"]


def main() -> None:
    parser = ArgumentParser(
        prog="python -m experiments.insertion_deletion",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--images", type=int, default=100, help="test images (default: 100)")
    parser.add_argument("--methods", help=f"explanations, of {','.join(METHODS)} (default: all)")
    parser.add_argument("--step", type=int, help="pixels at a time (default: the image's side)")
    parser.add_argument(
        "--baseline", type=float, default=0.0, help="of deleted pixels, -1 to 1 (default: 0, grey)"
    )
    parser.add_argument("--kernel", type=int, default=11, help="of the blur (default: 11 pixels)")
    parser.add_argument("--sigma", type=float, default=5.0, help="of the blur (default: 5 pixels)")
    parser.add_argument(
        "--samples", type=int, default=200, help="altered images of LIME, KernelSHAP (default: 200)"
    )
    parser.add_argument(
        "--steps", type=int, default=20, help="of integrated gradients (default: 20)"
    )
    parser.add_argument("--name", help="of the files in experiments/results, or a path")
    add_arguments(parser)
    options = parser.parse_args()
    methods = chosen(options.methods)
    effort = Effort(options.samples, options.steps)
    effort.check()
    runs = [finished(folder, options) for folder in options.runs]
    check(runs, methods, options)
    default = f"insertion_deletion_{runs[0].run.experiment}"
    path = place_of(options.name, default, typed("insertion_deletion"))
    rows, lines = [], {}
    for name, run in named(runs).items():
        protocol = protocol_of(run, options)
        found, lines[name] = compared(name, run, methods, protocol, effort, options.images)
        rows += found
    publish(pd.DataFrame(rows), runs, lines, path)


def chosen(words: str | None) -> list[str]:
    """The explanations asked for.

    Raises:
        UserError: one does not exist, or none is named.
    """
    methods = list(METHODS) if words is None else [word for word in words.split(",") if word]
    strange = [name for name in methods if name not in METHODS]
    if strange or not methods:
        what = f"There is no explanation '{strange[0]}'" if strange else "--methods names none"
        raise UserError(f"{what}: choose from {', '.join(METHODS)}.")
    return methods


def check(runs: Sequence[Finished], methods: Sequence[str], options: Namespace) -> None:
    """Raises UserError, before anything is computed, where a run and the options do not fit."""
    views = [run.run for run in runs]
    check_one_experiment(views, commonpath(v.folder for v in views), "name others")
    if len(named(runs)) < len(runs):
        raise UserError("Two of the runs are of one method and one seed: name each once.")
    for run in runs:
        folder, side = run.run.folder, run.stream.image_size
        if not hasattr(run.method, "differentiable_scores"):
            raise UserError(f"{folder} is no run of a var or a discriminative method.")
        protocol_of(run, options).check(side)
        every_label_in_turn(run.labels, options.images)
        if not applicable(run, methods):
            raise UserError(f"{folder} has no tokens: {', '.join(methods)} is of a var method.")


def named(runs: Sequence[Finished]) -> dict[str, Finished]:
    """The runs by their methods' names; with their seeds where a method has several."""
    methods = Counter(run.run.method for run in runs)
    names = [
        f"{view.method} seed{view.seed}" if methods[view.method] > 1 else view.method
        for view in (run.run for run in runs)
    ]
    return dict(zip(names, runs, strict=True))


def protocol_of(run: Finished, options: Namespace) -> Protocol:
    step = run.stream.image_size if options.step is None else options.step
    return Protocol(step, options.baseline, options.kernel, options.sigma)


def applicable(run: Finished, methods: Sequence[str]) -> list[str]:
    return [name for name in methods if name not in TMI or Model(run).by_tokens]


Lines = dict[str, Curves]  # by explanation


def compared(
    title: str,
    run: Finished,
    methods: Sequence[str],
    protocol: Protocol,
    effort: Effort,
    count: int,
) -> tuple[list[dict], Lines]:
    """One row an explanation, and the curves."""
    model = Model(run)
    if hasattr(run.method.model, "requires_grad_"):
        run.method.model.requires_grad_(False)  # pixels alone are asked for gradients
    numbers = every_label_in_turn(run.labels, count)
    images = run.images(numbers).to(run.device)
    scores_BC = model.log_probabilities(images)
    labels_B = scores_BC.argmax(1)
    rivals_B = best_wrong(scores_BC, labels_B)
    right = (labels_B.cpu() == torch.tensor([run.labels[n] for n in numbers])).double().mean()
    rows, lines = [], {}
    names = applicable(run, methods)
    for name in tqdm(names, desc=title, disable=not run.trainer.progress):
        began = time.perf_counter()
        found = attribute(
            name, model, images, labels_B, rivals_B, protocol.baseline, effort, run.trainer.progress
        )
        seconds = time.perf_counter() - began
        lines[name] = curves(images, found.importance_BHW, labels_B, model.probabilities, protocol)
        rows.append(
            {"model": title, "seed": run.run.seed, "explanation": name}
            | summary(lines[name], found, seconds / count)
            | {"images": count, "accuracy": right.item(), **asdict(protocol), **asdict(effort)}
        )
    return rows, lines


def summary(found: Curves, of: Attribution, seconds: float) -> dict[str, float]:
    """Means over the images, their standard errors, and what the explanation cost an image."""
    values = {}
    for kind, auc_B in (("insertion", found.insertion_auc()), ("deletion", found.deletion_auc())):
        values[f"{kind}_auc"] = auc_B.mean().item()
        values[f"{kind}_error"] = auc_B.std().item() / len(auc_B) ** 0.5 if len(auc_B) > 1 else 0.0
    return values | {"evaluations": of.evaluations, "seconds_an_image": seconds}


def publish(
    table: pd.DataFrame, runs: Sequence[Finished], lines: dict[str, Lines], path: Path
) -> None:
    """Print the table; write it, its numbers and the curves."""
    views, first = [run.run for run in runs], runs[0]
    cells = [
        [
            row.model,
            row.explanation,
            f"{row.insertion_auc:.3f}±{row.insertion_error:.3f}",
            f"{row.deletion_auc:.3f}±{row.deletion_error:.3f}",
            f"{row.evaluations:,.0f}",
            f"{row.seconds_an_image:.3g}",
        ]
        for row in table.itertuples()
    ]
    caption = explained(table)
    show("insertion and deletion", HEADINGS, cells, caption, texts=2)
    line = typed("insertion_deletion")
    where = f"Explained at commit {commit()}, on {device(first.trainer)}."
    text = "\n\n".join([*provenance(views, line), where, caption, markdown(HEADINGS, cells)])
    write_bytes(with_ending(path, ".md"), (text + "\n").encode())
    table = table.assign(commit=commit(), device=device(first.trainer), command=line)
    write_bytes(with_ending(path, ".csv"), table.to_csv(index=False).encode())
    for name, drawn in lines.items():
        ending = ".svg" if len(lines) == 1 else f"_{name.replace(' ', '_')}.svg"
        write_bytes(with_ending(path, ending), figure_bytes(drawing(name, drawn), "svg"))
    print(f"written: {path}.md, .csv and the curves beside them")


def drawing(name: str, drawn: Lines) -> plots.Figure:
    def means(values: str) -> dict[str, tuple[Tensor, Tensor]]:
        return {kind: (c.fractions_S, getattr(c, values).mean(0)) for kind, c in drawn.items()}

    both = {"insertion": means("insertion_BS"), "deletion": means("deletion_BS")}
    return plots.changing_pixels(both, f"{name}: mean over test images")


def explained(table: pd.DataFrame) -> str:
    """What the numbers are."""
    row = table.iloc[0]
    accuracies = table.groupby("model", sort=False)["accuracy"].first()
    right = ", ".join(f"{name} {value:.1%}" for name, value in accuracies.items())
    return (
        f"Areas under the probability of the predicted class, mean over {row['images']} test "
        "images and standard error: insertion, the higher the better, into the image blurred by a "
        f"Gaussian of {row['kernel']} pixels and sigma {row['sigma']:g}; deletion, the lower the "
        f"better, to {row['baseline']:g} (of -1 to 1); {row['step']} pixels a step. evaluations: "
        "log p(image | class) of one image and class for a VAR, answers for a network, a gradient "
        "being three; for an image, beyond classifying it. LIME and KernelSHAP: "
        f"{row['samples']} altered images; integrated gradients: {row['steps']} steps. Models "
        f"compare within themselves alone. Predicted rightly: {right}."
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
