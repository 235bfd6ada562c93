"""From a recipe to one of Avalanche's strategies around a backbone; what it answers and keeps."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cil.config import DiscriminativeConfig
from cil.methods.recipes import Recipe
from cil.models.backbones import Classifier, Features
from cil.streams.stream import Stream, View


def new_strategy(
    recipe: Recipe,
    settings: DiscriminativeConfig,
    stream: Stream,
    backbone: Features,
    width: int,
    device: torch.device,
) -> Any:
    """The strategy, untrained but for its backbone, which makes `width` features of an image."""
    from avalanche.training import supervised
    from avalanche.training.plugins import EvaluationPlugin

    from cil.methods import avalanche_plugins as own

    arguments = _parts(recipe, settings, stream, backbone, width)
    learning = nn.ModuleList(part for part in arguments.values() if isinstance(part, nn.Module))
    if device.type == "cuda":
        learning.to(memory_format=torch.channels_last)
    learning.to(device)
    if recipe.kind != "slda":  # which learns by no gradient
        arguments["optimizer"] = _new_optimizer(learning, settings)
    if recipe.kind not in ("icarl", "scr"):  # which have losses of their own
        loss = own.OwnCrossEntropy() if recipe.own_classes else nn.CrossEntropyLoss()
        arguments["criterion"] = loss
    passes = {"ncm": 0, "fecam": 0, "slda": 1}  # once more for the statistics alone, or not at all
    found = getattr(supervised, recipe.strategy, None) or getattr(own, recipe.strategy)
    strategy = found(
        **arguments,
        train_mb_size=settings.batch_size,
        train_epochs=passes.get(recipe.kind, settings.epochs),
        eval_mb_size=settings.batch_size,
        device=device,
        evaluator=EvaluationPlugin(loggers=[]),  # the default one prints
    )
    _share_memory(strategy, settings.stored_images)
    return strategy


def _parts(
    recipe: Recipe, settings: DiscriminativeConfig, stream: Stream, backbone: Features, width: int
) -> dict[str, Any]:
    """The arguments that make the strategy what it is, its networks first."""
    from avalanche import models
    from avalanche.training import plugins

    from cil.methods import avalanche_plugins as own

    classes = len(stream.class_names)
    options: dict[str, Any] = dict(recipe.constants)
    options |= {name: getattr(settings, key) for name, key in recipe.options.items()}
    if recipe.memory is not None:
        options[recipe.memory] = settings.stored_images
    if "batch_size_mem" in options:  # no more than are stored can be replayed in a step
        options["batch_size_mem"] = min(settings.batch_size, settings.stored_images)
    match recipe.kind:
        case "icarl":
            head, train = nn.Linear(width, classes), stream.experiences[0].train
            assert isinstance(train, View)
            networks = {"feature_extractor": backbone, "classifier": head}
            return networks | options | {"buffer_transform": train.augment}
        case "scr":
            model = models.SCRModel(backbone, own.Projection(width))
            return {"model": model, "augmentations": own.Crops()} | options
        case "slda":
            sizes = {"input_size": width, "num_classes": classes}
            return {"slda_model": backbone} | sizes | options
        case "ncm":
            means = models.NCMClassifier(normalize=False)
            updates = plugins.CurrentDataNCMUpdate()
            model = models.TrainEvalModel(backbone, nn.Identity(), means)
            return {"model": model, "plugins": [updates]}
        case "fecam":
            gaussians = own.BatchedFeCAM(**options)
            model = models.TrainEvalModel(backbone, nn.Identity(), gaussians)
            return {"model": model, "plugins": [plugins.CurrentDataFeCAMUpdate()]}
    units = {"whole": classes, "bare": classes, "turned": 4 * len(stream.experiences[0].labels)}
    if recipe.kind in units:
        head = nn.Linear(width, units[recipe.kind], bias=recipe.kind != "bare")
    else:
        head = models.IncrementalClassifier(width, 1)
    parts = {"model": Classifier(backbone, head)}
    if recipe.plugin is None:
        return parts | options
    return parts | {"plugins": [getattr(own, recipe.plugin)(**options)]}


def _share_memory(strategy: Any, images: int) -> None:
    """Let every class have as much of the memory, as in the literature since iCaRL (1611.07725).

    By default each group gets as much, whatever its number of classes.
    """
    from avalanche.training.storage_policy import ClassBalancedBuffer, ExperienceBalancedBuffer

    from cil.methods.avalanche_plugins import ExactMemory

    for place, plugin in enumerate(list(strategy.plugins)):
        if isinstance(getattr(plugin, "storage_policy", None), ExperienceBalancedBuffer):
            plugin.storage_policy = ClassBalancedBuffer(plugin.mem_size)
        if hasattr(plugin, "x_memory"):
            mirrored = getattr(plugin.buffer_transform, "mirror", False)
            exact = ExactMemory(plugin, images, mirrored)
            strategy.plugins.insert(place + 1, exact)


def _new_optimizer(model: nn.Module, settings: DiscriminativeConfig) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=settings.momentum, **options)
    return torch.optim.Adam(model.parameters(), **options)


def answers(model: nn.Module, strategy: Any, images: Tensor) -> Tensor:
    """images (B, channels, H, W) -> scores (B, classes or more), as the strategy's own evaluation.

    That one reads Avalanche's test stream, where the protocol has images of its own choice.
    """
    scores_BC = model(images)
    if strategy is not None and hasattr(strategy, "predict"):  # slda: these were features
        scores_BC = strategy.predict(scores_BC)
    for plugin in getattr(strategy, "plugins", []):
        if hasattr(plugin, "bias_forward"):  # bic
            scores_BC = plugin.bias_forward(scores_BC)
    return scores_BC


def stored_images(strategy: Any) -> int:
    """The training images that it keeps at present, for learning from them again."""
    count = len(getattr(strategy, "dataset", None) or [])  # cumulative
    for owner in (strategy, *strategy.plugins):
        if hasattr(owner, "storage_policy"):
            count += len(owner.storage_policy.buffer)
        count += sum(len(held.buffer) for held in getattr(owner, "val_buffer", {}).values())  # bic
        count += sum(len(images) for images in getattr(owner, "x_memory", []))  # icarl
    return count


def carried(strategy: Any, model: nn.Module, paths: tuple[str, ...]) -> list[Any]:
    """What stands at these attributes of the strategy, its model or one of its plugins."""
    owners = (strategy, model, *strategy.plugins)
    kept = [_at(owner, path) for path in paths for owner in owners]
    return [each for each in kept if each is not None]


def carried_bytes(strategy: Any, model: nn.Module, paths: tuple[str, ...]) -> int:
    """Bytes of that."""
    kept = carried(strategy, model, paths)
    return sum(array.nbytes for each in kept for array in _arrays(each))


def _at(owner: Any, path: str) -> Any:
    """What stands at a dotted path of attributes and keys; None where there is nothing (yet)."""
    for name in path.split("."):
        owner = owner.get(name) if isinstance(owner, dict) else getattr(owner, name, None)
    return owner


def _arrays(kept: Any) -> Iterator[Tensor | np.ndarray]:
    """Every tensor and array within dictionaries, sequences, modules and Avalanche's wrappers."""
    if isinstance(kept, Tensor | np.ndarray):
        yield kept
    elif isinstance(kept, nn.Module):
        yield from kept.state_dict().values()
    elif isinstance(kept, dict):
        for value in kept.values():
            yield from _arrays(value)
    elif hasattr(kept, "__getitem__"):  # lists, and a memory's logits
        for item in range(len(kept)):
            yield from _arrays(kept[item])
    elif hasattr(kept, "data"):  # ParamData, of what belongs to a parameter
        yield from _arrays(kept.data)
