"""The whole command in seconds: the settings that the tests of whole commands share."""

from pathlib import Path

TINY = [
    "--tokenizer.steps=5",
    "--tokenizer.channels=4",
    "--var.first_steps=5",
    "--var.steps=5",
    "--var.views=1",
    "--var.depth=1",
    "--var.width=16",
    "--var.heads=2",
    "--diffusion.first_steps=5",
    "--diffusion.steps=5",
    "--diffusion.views=1",
    "--diffusion.depth=1",
    "--diffusion.width=16",
    "--diffusion.schedule=[[2,1]]",
    "--discriminative.epochs=1",
    "--samples.per_class=1",
    "--samples.steps=2",
    "--trainer.accelerator=cpu",
    "--trainer.progress=false",
    "--trainer.jobs=1",
    "--wandb.mode=disabled",
]


def folders(runs: Path) -> list[str]:
    """Where a command is to put its records, and beside them what it makes once."""
    return [f"--runs={runs}", f"--cache={runs}-cache"]
